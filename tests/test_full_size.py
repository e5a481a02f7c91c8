"""`benchmarks.full_size`: its runner with steps that do as told, and every step in small, in this process."""
import json
import os
import re
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks import full_size, kept_parts
from benchmarks.full_size_steps import STEPS, Step
from benchmarks.options import TIME_UP
from benchmarks.time_limit import TimeLimit
from submit.dev_splits import ROOT


def double(name, seconds=0.0, status=0, left=0, **more):
    return Step(name, "tests.step_double", name, "{data}", f"{{out}} {seconds} {status} {left}", **more)


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """Give the runner these steps; records lie in a folder of their own."""
    def chosen(*given):
        monkeypatch.setattr(full_size, "STEPS", given)
        return full_size.main(["--device", "cpu", "--tiny", "--minutes", "5"])

    monkeypatch.setattr(full_size, "TINY", tmp_path / "tiny")
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(ROOT)
    return chosen


def test_steps_are_run_once_and_what_fails_or_is_left_is_said(steps, tmp_path, capsys, monkeypatch):
    assert steps(double("one"), double("two")) == 0
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == {"one.json", "two.json"}
    capsys.readouterr()
    monkeypatch.setattr(full_size, "run_step", None)  # done: nothing is run again
    assert steps(double("one"), double("two")) == 0
    assert capsys.readouterr().out.count(" done ") == 2


def test_a_failing_step_does_not_stop_the_others(steps, capsys):
    assert steps(double("bad", status=1), double("some", status=3, left=7), double("good")) == 1
    shown = capsys.readouterr()
    assert "bad: failed with exit status 1" in shown.err and shown.err.endswith("failed: bad\n")
    assert [line.split()[:3] for line in shown.out.splitlines()] == [["bad", "to", "be"], ["some", "7", "left"],
                                                                    ["good", "done", "tests.step_double"]]
    assert steps(double("some", status=3, left=7), double("good")) == TIME_UP


def test_a_step_that_overruns_is_killed_with_what_it_started(steps, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(full_size, "DYING", 1.0)
    monkeypatch.setattr(full_size, "GRACE", 0.0)
    command = [sys.executable, "-m", "tests.step_double", str(tmp_path / "slow.json"), "60", "0", "0"]
    status = full_size.run_step(command, 8.0, {})
    assert status is None
    child = int((tmp_path / "slow.pid").read_text())
    time.sleep(0.2)
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"  # dead, if nobody asked for its end yet


def test_no_step_starts_without_its_time_or_its_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(full_size, "RECORDS", tmp_path)
    place = full_size.Place(False, tmp_path)
    long = Step("long", "x", "long", "{data}", "", 5.0)
    needy = Step("needy", "x", "needy", "{data}", "", sets=("cifar10", "mnist"))
    start = Step("start", "x", "start", "{start}", "")
    photos = Step("photos", "x", "photos", "{photos}", "")
    monkeypatch.setattr(full_size, "run_step", None)
    assert full_size.run_all([long, needy, start, photos], place, TimeLimit(2), {}) == []
    assert "long: no time, needs 5 minutes of which 2.0 are left" in capsys.readouterr().err
    assert full_size.state(needy, place) == "needs --data with cifar10, mnist"
    assert full_size.state(photos, place) == "needs --photos FOLDER"
    assert full_size.state(start, place) == "needs --start WHEEL" and full_size.state(long, place) == "to be done"
    (tmp_path / "long_gpu.json").write_text('{"left": 3}')
    assert full_size.state(long, place) == "3 left"
    (tmp_path / "long_gpu.json").write_text("{}")
    assert full_size.state(long, place) == "done"


@pytest.mark.parametrize("arguments, message", [
    (["--only", "nothing"], "--only: expected some of profile, mutual scoring, .* found nothing"),
    (["--device", "cpu"], "--device cpu: expected --tiny with it: full size is meant for a GPU, found none"),
    pytest.param([], "--device: expected a CUDA GPU, or --device cpu --tiny, found no CUDA GPU here",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"))])
def test_bad_input_ends_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        full_size.main(arguments)
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_the_list_names_every_step_and_runs_none(capsys, monkeypatch):
    monkeypatch.setattr(full_size, "run_step", None)
    full_size.main(["--list"])
    assert [line[:22].strip() for line in capsys.readouterr().out.splitlines()] == [step.name for step in STEPS]


def test_records_of_a_gpu_lie_beside_those_of_a_cpu():
    place = full_size.Place(False, Path("d"), Path("w"))
    records = [place.out(step) for step in STEPS]
    assert len(set(records)) == len(STEPS)
    assert all(path.name.endswith("_gpu.json") for path, step in zip(records, STEPS, strict=True) if not step.weights)
    command = place.command(next(step for step in STEPS if step.name == "zoo"), 7.5)
    assert command[1:7] == ["-m", "benchmarks.contest_zoo", "--data", "d", "--recipe", "contest"]
    assert command[-3:] == ["7.50", "--out", str(full_size.RECORDS / "contest_zoo_contest_gpu.json")]


@pytest.mark.parametrize("step", [step for step in STEPS if not step.weights], ids=lambda step: step.name)
def test_every_step_runs_in_small(step, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KIT_DEVICE", "cpu")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "tiny").symlink_to(ROOT / "benchmarks" / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("submit.calibration.LEAST_S", 1e-3)  # rates that nobody looks at
    place = full_size.Place(True)
    status = import_module(step.module).main(place.command(step, 60.0)[3:])
    record = json.loads(place.out(step).read_text())
    assert status == 0 and place.left(step) == 0 and {"command", "environment", "peak_memory_gib"} <= record.keys()
    kept = list((tmp_path / "runs").rglob("*.pt"))
    assert not kept or step.name == "tsbd"  # no weights are left, but for what a speed is measured on
    assert os.environ["KIT_DEVICE"] == "cpu"


def test_parts_are_kept_until_all_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []
    parts = {name: lambda name=name: calls.append(name) or {"value": name} for name in "abc"}
    limit = TimeLimit(1.0, clock=lambda: 59.0 * len(calls))
    found, left = kept_parts.measured_parts("x", torch.device("cpu"), parts, limit)
    assert (found, left) == ({"a": {"value": "a"}}, 2)  # the next would end too late
    found, left = kept_parts.measured_parts("x", torch.device("cpu"), parts, TimeLimit())
    assert list(found) == ["a", "b", "c"] and left == 0 and calls == ["a", "b", "c"]
    kept_parts.measured_parts("x", torch.device("cpu"), parts, TimeLimit())
    assert calls == ["a", "b", "c"] * 2  # a later call measures anew
