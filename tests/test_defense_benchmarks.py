"""The benchmarks of defenses on inputs that take no time: the two ways of TSBD agree, the tables are whole."""
import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import defense_ablations, defense_sweep, tsbd_speed, victim_repairs
from benchmarks.options import TIME_UP
from benchmarks.time_limit import TimeLimit
from data.attacks import ATTACKS
from data.model_zoo import read_zoo
from data.victims import normalise
from data.zoo_recipes import jobs
from defense.activeness_tuning import TuningConfig
from defense.defenses import DEFENSES
from defense.tsbd import TSBDConfig, defend
from defense.unlearning import UnlearningConfig
from submit.dev_splits import TINY_ZOO
from submit.sweeps import read_sweep
from submit.zoo_victims import read_victim

NAME = "digits-badnets-0.1-0"


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    sample = next(model for model in read_zoo(TINY_ZOO).models if model.name == NAME)
    return read_victim(sample, None, tmp_path_factory.mktemp("triggers"), device=torch.device("cpu"))


def test_the_obvious_way_gives_the_same_weights(victim):
    images, labels = victim.train.images[:24], victim.train.labels[:24]
    config = TSBDConfig(neurons=0.15, unlearning=UnlearningConfig(rate=1e-3, batch=24, epochs=3),
                        tuning=TuningConfig(batch=24, epochs=2, steps=0, radius=0.01))  # one batch: no order
    model = copy.deepcopy(victim.model).double()  # in 32 bits rounding decides about some of the weights
    slow = tsbd_speed.obvious(model, images, labels, 10, victim.scale, 0, config, workers=0)
    fast = defend(model, normalise(images, victim.scale), labels, config,
                  generator=torch.Generator().manual_seed(0)).model
    for (name, one), other, given in zip(slow.named_parameters(), fast.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
        assert not torch.equal(one, given)


def test_both_ways_are_timed_and_judged(victim):
    config = TSBDConfig(neurons=0.15, unlearning=UnlearningConfig(batch=16, epochs=1),
                        tuning=TuningConfig(batch=16, epochs=1, steps=0))
    found = tsbd_speed.compare(victim, 16, config, 2, 0, torch.device("cpu"))
    assert set(found) == {"obvious", "ours"}
    for runs in found.values():
        assert len(runs["seconds"]) == len(runs["cpu_seconds"]) == len(runs["after"]) == 2
        assert runs["after"][0] == runs["after"][1] or runs is found["obvious"]  # ours has its own generator


def test_ablations_change_one_thing_each(tmp_path, monkeypatch, capsys):
    short = {"batch": 32, "epochs": 1}
    monkeypatch.setattr(defense_ablations, "PART", short)
    monkeypatch.setattr(defense_ablations, "FORGET", short)
    monkeypatch.setattr(defense_ablations, "BASE", {"neurons": 0.15, "unlearning": short,
                                                    "tuning": {**short, "steps": 0}})
    base, *others = defense_ablations.plans(0.05)
    for plan in others:
        changed = [key for key in plan.settings.keys() | base.settings.keys()
                   if plan.settings.get(key) != base.settings.get(key)]
        assert len(changed) + (plan.clean != base.clean) == 1, plan.label
    monkeypatch.setattr(defense_ablations, "plans", lambda clean: [base, others[0]])
    out = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["x", "--networks", NAME, "--vit-epochs", "1", "--keep", str(tmp_path / "keep"),
                                      "--out", str(out)])
    defense_ablations.main()
    record = json.loads(out.read_text())
    assert [row["variant"] for row in record["rows"]] == ["no defense", base.label, others[0].label, "no tuning"]
    assert {"before", "after", "DER"} <= set(record["vit"]) and len(capsys.readouterr().out.splitlines()) == 5


VICTIMS = """
attacks = ["badnets", "blended"]
[further]
blended = [0.05]
[victim]
widths = [2, 2, 2, 2]
epochs = 1
batch = 128
[[sets]]
name = "digits"
size = 16
images = 400
floor_accuracy = 0.0
floor_success = 0.0
"""


@pytest.fixture
def small_sweep(tmp_path, monkeypatch):
    """A sweep of three victims and two defenses; call it with arguments for (exit status, record)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KIT_DEVICE", "cpu")
    (tmp_path / "victims.toml").write_text(VICTIMS)
    (tmp_path / "mine.toml").write_text('victims = "victims.toml"\n[defenses.clp]\n[defenses.ft]\nepochs = 1\n')

    def call(*more):
        status = defense_sweep.main(["--recipe", "mine.toml", "--out", "record.json", *more])
        return status, json.loads((tmp_path / "record.json").read_text())

    return call


def test_victims_are_met_one_by_one_and_found_without_their_weights(small_sweep, monkeypatch, capsys):
    status, record = small_sweep("--minutes", "0", "--drop")
    assert status == TIME_UP and (record["of"], record["n"], record["left"]) == (3, 0, 3) and record["tables"] == []
    real, calls = victim_repairs.run_plan, []

    def counted(victim, plan):
        calls.append((victim.name, plan.label))
        if len(calls) == 4:
            raise ValueError("lost")
        return real(victim, plan)

    monkeypatch.setattr(victim_repairs, "run_plan", counted)
    status, record = small_sweep("--drop")
    assert status == TIME_UP and (record["n"], record["left"]) == (2, 1)
    assert "digits-blended-0.1-0: left out, ValueError: lost" in capsys.readouterr().err
    kept = Path("runs/sweeps/mine")
    assert [path.name for path in (kept / "one_by_one").iterdir()] == ["digits-blended-0.1-0"]  # the others lost theirs
    shutil.rmtree(kept / "units")  # another machine: only the files of whole victims
    shutil.rmtree(kept / "one_by_one")
    status, record = small_sweep("--drop")
    assert status == 0 and [(name, label) for name, label in calls[6:]] == [("digits-blended-0.1-0", "clp"),
                                                                           ("digits-blended-0.1-0", "ft")]
    assert [table["ratio"] for table in record["tables"]] == [0.1, 0.05] and len(record["units"]) == 6
    assert {"victim", "defense", "after", "DER", "whole_seconds"} <= record["units"][0].keys()
    assert set(record["victims"]) == {f"digits-{name}-0" for name in ("badnets-0.1", "blended-0.1", "blended-0.05")}


def test_time_is_obeyed_inside_a_victim_and_side_by_side_is_the_same(small_sweep, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TimeLimit, "fits", lambda self, kind: kind != "ft")
        status, record = small_sweep()
    assert status == TIME_UP and (record["n"], record["left"]) == (0, 3)
    assert len(list(Path("runs/sweeps/mine/units").iterdir())) == 3
    here = small_sweep("--rounds", "1")[1]
    other = small_sweep("--workers", "2", "--runs", str(Path("elsewhere").absolute()))[1]
    for unit in here["units"] + other["units"]:
        del unit["seconds"], unit["whole_seconds"]
    assert here["units"] == other["units"] and len(here["units"]) == 6


def test_a_victim_below_its_floor_is_counted(small_sweep):
    Path("victims.toml").write_text(VICTIMS.replace("floor_accuracy = 0.0", "floor_accuracy = 1.0"))
    status, record = small_sweep()
    assert status == 0 and record["n"] == record["left"] == 0 and len(record["failed"]) == 3
    assert "ACC" in record["failed"]["digits-badnets-0.1-0"]


@pytest.mark.parametrize("arguments, message", [
    (("--recipe", "none"), "sweep: expected a TOML file as in defense/sweeps, found none"),
    (("--rounds", "-1"), "--rounds: expected > 0, found -1"),
    (("--workers", "-1"), "--workers: expected > 0, found -1"),
    (("--recipe", "full"), "--data: expected the folder that holds cifar10/, found nothing")])
def test_a_wrong_sweep_ends_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        defense_sweep.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_the_full_sweep_meets_eight_attacks_and_three_of_them_at_lower_ratios():
    sweep = read_sweep(defense_sweep.recipe_file("full"))
    victims = [job for job in jobs(sweep.victims) if job.attack]
    assert {job.attack for job in victims[:8]} == set(ATTACKS) and all(job.ratio == 0.1 for job in victims[:8])
    assert sorted((job.attack, job.ratio) for job in victims[8:]) == sorted(
        (name, ratio) for name in ("blended", "low_frequency", "ssba") for ratio in (0.05, 0.01))
    assert {plan.method for plan in sweep.plans()} == set(DEFENSES) and not any(p.settings for p in sweep.plans())
