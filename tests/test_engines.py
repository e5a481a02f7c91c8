"""The same results wherever the work is done, and nothing lost where a worker dies."""
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest

import submit.engines
from data.scenes import write_retrieval_split
from submit.cli import _use_engine
from submit.engines import HERE, Engine, chosen_engine, each
from tests.engine_doubles import always_die, die_once, fail, meet, square, visible_gpus, write_or_die
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
    for items in ([1, 2], [1]):  # also a single piece is done by a worker, not here
        with refuses(f"--engine local: expected workers that live, found 3 that died, {len(items)} pieces not done: "):
            list(each(always_die, items, Engine("local", 2)))


def test_workers_stop_where_the_process_that_asked_was_killed(tmp_path):
    """Bug: they went through all pieces that were handed out, and wrote beside the run that was started next."""
    work = "each(partial(write_slowly, folder=sys.argv[1]), range(200), Engine('local', 4))"
    lines = ["import sys", "from functools import partial", "from submit.engines import Engine, each",
             "from tests.engine_doubles import write_slowly", f"list({work})"]
    process = subprocess.Popen([sys.executable, "-c", "\n".join(lines), tmp_path], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 4 and time.monotonic() < end:
        time.sleep(0.05)
    process.kill()
    process.wait()
    written = len(list(tmp_path.iterdir()))
    time.sleep(1.5)
    assert written >= 4 and len(list(tmp_path.iterdir())) <= written + 1  # handed out were four more


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
    (seen,) = [answer for _, answer in each(visible_gpus, [0], Engine("slurm", 2, "cuda"))]
    assert seen[1:3] == ("cuda", "0")  # a job has a GPU of its own


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
    assert chosen_engine("local", 0, "cuda:1") == HERE
    assert chosen_engine("slurm", 7, "cuda") == Engine("slurm", 7, "cuda")  # Slurm hands GPUs to jobs, and they wait
    with refuses("--workers: expected at most 2, as many as there are GPUs, found 3"):
        chosen_engine("local", 3, "cuda")
    with refuses("--workers: expected at most 1, as many as there are GPUs, found 2"):
        chosen_engine("local", 2, "cuda:1")
    with refuses("--engine: expected one of local, ray, slurm, found mpi"):
        chosen_engine("mpi", 1, "cpu")
    with refuses("--engine: expected one of local, ray, slurm, found mpi"):
        chosen_engine("mpi", 1, "cuda")
    with refuses("--workers: expected >= 1, found -1"):
        Engine("local", -1)


@pytest.fixture
def two_gpus(monkeypatch):
    """This machine, as if it had two."""
    monkeypatch.setattr(submit.engines, "_device_count", lambda: 2)
    monkeypatch.setenv("KIT_DEVICE", "cuda")


def test_each_worker_has_a_gpu_of_its_own_and_none_idles(two_gpus, tmp_path):
    found = [answer for _, answer in each(partial(meet, folder=tmp_path, parties=2), range(6), Engine("local", 2))]
    owners = {(process, device) for process, device, _ in found}
    assert sorted(device for _, device in owners) == ["cuda:0", "cuda:1"] and len(dict(owners)) == 2
    assert {parties for *_, parties in found} == {2}


def test_the_gpu_of_a_killed_worker_is_taken_over(two_gpus, tmp_path):
    found = [answer for _, answer in each(partial(die_once, folder=tmp_path), ITEMS * 2, Engine("local", 2))]
    owners = set(found)
    assert len(found) == 2 * len(ITEMS) and (tmp_path / "died").exists()
    assert len(owners) == len({process for process, _ in owners})  # a worker keeps its GPU
    assert {device for _, device in owners} <= {"cuda:0", "cuda:1"}


@pytest.mark.parametrize(("gpus", "device"), [(1, "cuda"), (2, "cuda:1"), (2, "cpu")])
def test_one_gpu_or_a_chosen_one_is_left_as_it_is(monkeypatch, tmp_path, gpus, device):
    monkeypatch.setattr(submit.engines, "_device_count", lambda: gpus)
    monkeypatch.setenv("KIT_DEVICE", device)
    here = submit.engines._surroundings(HERE, tmp_path)
    assert submit.engines._piece(square, here, (0, 1))[1][2] == device


@pytest.fixture
def ray_of_two_gpus():
    """A Ray of this machine that believes in two GPUs."""
    ray = pytest.importorskip("ray")
    ray.shutdown()
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, logging_level="ERROR",
             log_to_driver=False)
    yield
    ray.shutdown()


def test_ray_gives_each_worker_a_gpu_and_never_waits_for_more(on_cpu, ray_of_two_gpus, refuses, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refuses("--workers: expected at most 2, as many as there are GPUs, found 3"):
        chosen_engine("ray", 3, "cuda")
    engine = chosen_engine("ray", 0, "cuda")
    assert engine == Engine("ray", 2, "cuda")
    found = {answer for _, answer in each(visible_gpus, range(6), engine)}
    assert sorted(gpu for _, _, gpu, _ in found) == ["0", "1"] and len({process for process, *_ in found}) == 2
    assert {(device, folder) for _, device, _, folder in found} == {("cuda", str(tmp_path))}


def test_a_cluster_without_gpus_is_refused_at_once(on_cpu, monkeypatch, refuses):
    monkeypatch.setattr(submit.engines, "_ray_gpus", lambda: 0)
    with refuses("--engine ray: expected a cluster with a free GPU, or --device cpu, found none"):
        chosen_engine("ray", 0, "cuda")


def test_gpus_of_other_machines_need_not_be_here(monkeypatch):
    monkeypatch.setenv("KIT_DEVICE", "auto")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(submit.engines, "_ray_gpus", lambda: 4)
    assert _use_engine("ray", 0, "cuda") == ("cuda", Engine("ray", 4, "cuda"))
    assert os.environ["KIT_DEVICE"] == "cpu"
    assert _use_engine("slurm", 3, "cuda") == ("cuda", Engine("slurm", 3, "cuda"))
    assert _use_engine("ray", 2, "auto") == ("cpu", Engine("ray", 2))


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
