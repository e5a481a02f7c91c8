"""`benchmarks.contest_zoo`: networks trained, judged and dropped within a time; the tables of detectors."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import contest_zoo
from benchmarks.detector_tables import held_out_verdicts, lines, tables, without
from benchmarks.detector_verdicts import asked_detectors
from benchmarks.options import TIME_UP, record_file
from benchmarks.time_limit import TimeLimit
from benchmarks.work_pool import within_time
from data.zoo_recipes import jobs, read_recipe

RECIPE = """
attacks = ["badnets", "blended"]
[victim]
widths = [2, 2, 2, 2]
epochs = 1
batch = 128
[[sets]]
name = "digits"
size = 16
images = 300
clean = 2
floor_accuracy = 0.0
floor_success = 0.0
"""


class Ticking:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KIT_DEVICE", "cpu")
    (tmp_path / "few.toml").write_text(RECIPE)
    return tmp_path


def call(*more):
    status = contest_zoo.main(["--recipe", "few.toml", "--detectors", "trodo", "--out", "record.json", *more])
    return status, json.loads(Path("record.json").read_text())


def test_networks_are_judged_and_dropped_and_found_again(recipe, capsys, monkeypatch):
    status, first = call("--minutes", "0")
    assert status == TIME_UP and first["left"] == 4 and first["n"] == 0 and first["detectors"] == {}
    assert first["left_by_kind"] == {"digits": 4}
    status, record = call("--workers", "2")
    assert status == 0 and (record["of"], record["n"], record["left"]) == (4, 4, 0)
    assert record["detectors"]["trodo"]["models"] == 4 and 0 <= record["detectors"]["trodo"]["auroc"] <= 100
    assert {"model", "set", "attack", "ratio", "target", "ACC", "ASR", "radius", "seconds", "trodo"} \
        == record["models"][0].keys()
    assert not [path for path in (recipe / "runs").rglob("*") if path.is_file() and path.suffix != ".json"]
    assert "4 of 4 networks, 0 below their floors, 0 left" in capsys.readouterr().out
    monkeypatch.setattr(contest_zoo, "build_zoo", None)  # nothing is trained again
    assert call()[1]["models"] == record["models"]


def test_networks_below_a_floor_are_counted_and_in_no_table_and_changed_settings_are_measured_anew(recipe):
    (recipe / "few.toml").write_text(RECIPE.replace("floor_success = 0.0", "floor_success = 1.0"))
    record = call()[1]
    assert (record["n"], record["left"]) == (2, 0) and record["detectors"]["trodo"]["auroc"] is None
    assert "ASR" in record["failed"]["digits-badnets-0.1-0"] and len(record["failed"]) == 2
    (recipe / "few.toml").write_text(RECIPE)  # they count now, and no detector has seen them
    assert call("--minutes", "0")[1]["left"] == 2
    (recipe / "few.toml").write_text(RECIPE.replace("epochs = 1", "epochs = 2"))
    assert call("--minutes", "0")[1]["left"] == 4


@pytest.mark.parametrize("arguments, message", [
    (("--recipe", "none"), "recipe: expected a TOML file or one of tiny, half, cpu, contest, found none"),
    (("--detectors", "guess"), "--detectors: expected some of ours, trodo, report, mmbd"),
    (("--device", "tpu"), "expected auto, cpu, cuda or cuda:N, found tpu"),
    (("--workers", "0"), "--workers: expected > 0, found 0"),
    (("--recipe", "cpu"), "--data: expected the folder that holds cifar10/, found nothing")])
def test_bad_input_ends_in_one_line(recipe, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        contest_zoo.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_the_order_is_drawn_once_and_its_beginning_holds_everything():
    work = jobs(read_recipe("contest"))
    order = contest_zoo.in_fair_order(work)
    assert sorted(job.name for job in order) == sorted(job.name for job in work) and order != list(work)
    first = order[:36]
    assert {job.set_name for job in first} == {"cifar10", "mnist", "gtsrb32"}
    assert sum(job.attack is None for job in first) == 18
    assert {job.ratio for job in first if job.attack} == {0.1, 0.05, 0.01} and any(job.victim.radius for job in first)
    assert order == contest_zoo.in_fair_order(work)


def test_what_would_not_end_in_time_is_passed_over():
    clock = Ticking()
    limit = TimeLimit(10, clock=clock)
    assert limit.fits("new") and limit.expected("new") == 0
    limit.took("slow", 300.0)
    limit.took("quick", 100.0)
    assert limit.expected("new") == 200.0 and limit.expected("slow") == 300.0
    clock.now = 350.0
    assert limit.fits("quick") and limit.fits("new") and not limit.fits("slow")
    done = []

    def work(item):
        done.append(item)
        clock.now += 130
        if item == "quick 2":
            raise ValueError("broken")
        return item.upper()

    items = ["slow 1", "quick 1", "quick 2", "quick 3"]
    found = list(within_time(work, items, lambda item: item.split()[0], limit, workers=1, initializer=lambda: None))
    assert done == ["quick 1", "quick 2"]  # then it is 610
    assert found[0] == ("quick 1", "QUICK 1", None)
    assert found[1][:2] == ("quick 2", None) and str(found[1][2]) == "broken"
    assert limit.minutes_left() == 0


def network(set_name, attack, p, suspect=0):
    return ({"model": f"{set_name}-{attack}", "set": set_name, "attack": attack, "target": 0 if attack else None},
            {"p": p, "suspect": suspect, "seconds": 1.0})


def test_figures_that_few_networks_do_not_give_are_left_out():
    rows, found = zip(network("a", None, 0.5), network("a", "sig", 0.01), network("b", None, 0.2), strict=True)
    scores, truth = -np.log10([f["p"] for f in found]), np.array([False, True, False])
    assert held_out_verdicts(rows, scores, truth) == [None, None, False]  # sets of clean networks alone choose nothing
    assert set(without("set", rows, scores, truth)) == {"b"} and without("attack", rows, scores, truth) == {}
    ours = tables(rows, {"ours": found})["detectors"]["ours"]
    assert ours["own_threshold"]["accuracy"] == 100 and ours["held_out_threshold"]["models"] == 1
    assert "AUROC 100.0 own 100.0 % held-out threshold 100.0 %" in lines({"ours": ours})[0]
    assert tables(rows[:1], {"ours": found[:1]})["detectors"]["ours"]["auroc"] is None


def test_names(refuses):
    assert asked_detectors("ours,mmbd") == ["ours", "mmbd"]
    assert record_file("x", torch.device("cpu")).name == "x.json"
    assert record_file("x", torch.device("cuda")).name == "x_gpu.json"
    with refuses("--detectors: expected some of ours, trodo, report, mmbd, with commas between, found best"):
        asked_detectors("ours,best")
