"""The benchmarks of defenses on inputs that take no time: the two ways of TSBD agree, the tables are whole."""
import copy
import json
import sys

import pytest
import torch

from benchmarks import defense_ablations, defense_sweep, tsbd_speed
from data.model_zoo import read_zoo
from data.victims import normalise
from defense.activeness_tuning import TuningConfig
from defense.tsbd import TSBDConfig, defend
from defense.unlearning import UnlearningConfig
from submit.dev_splits import TINY_ZOO
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


def test_only_networks_that_met_every_defense_are_in_the_tables():
    units = [{"victim": name, "defense": label} for name, label in (("a", 1), ("a", 2), ("b", 1))]
    assert defense_sweep.whole_victims(units, 2) == units[:2]
