"""The same results wherever the work is done, and nothing lost where a worker dies."""
import json
import os
import shutil
from functools import partial

import numpy as np
import pytest

import submit.engines
from data.scenes import write_retrieval_split
from submit.engines import HERE, Engine, chosen_engine, each
from tests.engine_doubles import always_die, fail, square, write_or_die
from tests.test_score_command import run

ITEMS = [5, 2, 7, 3, 0, 1]


def _found(module):
    try:
        __import__(module)
    except ImportError:
        return False
    return True


pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray.*")  # of its own future defaults
ELSEWHERE = [Engine("local", 2), pytest.param(Engine("ray", 2), marks=pytest.mark.skipif(
    not _found("ray"), reason="ray is not installed"))]


@pytest.fixture(scope="module", autouse=True)
def leave_ray():
    yield
    if _found("ray"):
        import ray

        ray.shutdown()


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv("KIT_DEVICE", "cpu")


def test_without_an_engine_work_is_done_in_order_in_this_process(on_cpu):
    found = list(each(square, ITEMS))
    assert found == [(i, (x * x, os.getpid(), "cpu")) for i, x in enumerate(ITEMS)]
    assert list(each(square, [])) == [] and list(each(square, [], Engine("local", 2))) == []


@pytest.mark.parametrize("engine", ELSEWHERE, ids=lambda e: e.name)
def test_other_processes_answer_the_same_with_the_same_settings(on_cpu, engine):
    found = dict(each(square, ITEMS, engine))
    assert {i: r[0] for i, r in found.items()} == {i: x * x for i, x in enumerate(ITEMS)}
    assert {r[2] for r in found.values()} == {"cpu"} and os.getpid() not in {r[1] for r in found.values()}


@pytest.mark.parametrize("engine", ELSEWHERE, ids=lambda e: e.name)
def test_nothing_is_lost_where_a_worker_is_killed(on_cpu, tmp_path, engine):
    found = dict(each(partial(write_or_die, folder=tmp_path), ITEMS, engine))
    assert found == dict(enumerate(ITEMS)) and (tmp_path / "died").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"died", *map(str, ITEMS)}


def test_work_that_always_kills_its_worker_ends_the_run(on_cpu, refuses):
    with refuses("--engine local: expected workers that live, found 3 that died, 2 pieces not done: "):
        list(each(always_die, [1, 2], Engine("local", 2)))


def test_what_work_raises_ends_the_run(on_cpu):
    for engine in (HERE, Engine("local", 2)):
        with pytest.raises(ValueError, match="piece 4 failed"):
            list(each(fail, [4], engine))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")  # submitit's
@pytest.mark.skipif(not _found("submitit"), reason="submitit is not installed")
def test_jobs_of_slurm_by_a_stand_in(on_cpu, tmp_path, monkeypatch):
    stand_in = partial(submit.engines._slurm, cluster="local", folder=tmp_path / "slurm")
    monkeypatch.setitem(submit.engines.RUNNERS, "slurm", stand_in)
    found = dict(each(square, ITEMS, Engine("slurm", 2)))
    assert {i: r[0] for i, r in found.items()} == {i: x * x for i, x in enumerate(ITEMS)}


@pytest.mark.skipif(not _found("submitit") or shutil.which("srun"), reason="submitit is not installed, or Slurm is")
def test_without_slurm_its_engine_is_refused(refuses):
    with refuses(r"--engine slurm: expected the commands of Slurm \(srun\) on this machine, found none"):
        list(each(square, [1], Engine("slurm", 2)))


@pytest.mark.parametrize(("engine", "module"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_package_says_how_to_install_it(monkeypatch, refuses, engine, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with refuses(rf"--engine {engine}: expected the package {module} \(pip install -r requirements-extras.txt\)"):
        list(each(square, [1], Engine(engine, 2)))


def test_workers_never_outnumber_gpus(monkeypatch, refuses):
    monkeypatch.setattr(submit.engines, "_device_count", lambda: 2)
    assert chosen_engine("local", 0, "cuda") == Engine("local", 2)
    assert chosen_engine("local", 0, "cpu") == HERE and chosen_engine("local", 5, "cpu") == Engine("local", 5)
    with refuses("--workers: expected at most 2, as many as there are GPUs, found 3"):
        chosen_engine("local", 3, "cuda")
    with refuses("--engine: expected one of local, ray, slurm, found mpi"):
        chosen_engine("mpi", 1, "cpu")
    with refuses("--workers: expected >= 1, found -1"):
        Engine("local", -1)


def test_pieces_take_turns_on_the_gpus(monkeypatch):
    monkeypatch.setenv("KIT_DEVICE", "cuda")
    devices = [submit.engines._piece(square, {"KIT_DEVICE": "cuda"}, 2, (i, 1))[1][2] for i in range(3)]
    assert devices == ["cuda:0", "cuda:1", "cuda:0"]
    assert submit.engines._piece(square, {"KIT_DEVICE": "cuda"}, 1, (0, 1))[1][2] == "cuda"


@pytest.mark.parametrize("engine", ELSEWHERE, ids=lambda e: e.name)
def test_scores_do_not_depend_on_the_engine(capsys, tmp_path, engine):
    write_retrieval_split(tmp_path / "scenes", seed=3, queries=20)
    command = ["score", "retrieval", "--data", tmp_path / "scenes", "--device", "cpu", "--json"]
    status, out, _ = run(capsys, *command, "--engine", engine.name, "--workers", 2, "--runs", tmp_path / "runs")
    _, alone, _ = run(capsys, *command, "--runs", tmp_path / "alone")
    found, expected = (json.loads(text)["results"][0] for text in (out, alone))
    assert status == 0 and found["parts"] == expected["parts"] and found["value"] == expected["value"]
    for name in ("query", "database"):
        files = [next(tmp_path.glob(f"{runs}/*/predictions/retrieval/{name}_embeddings-000000.npy"))
                 for runs in ("runs", "alone")]
        np.testing.assert_allclose(*map(np.load, files), atol=1e-6)
