"""`python -m submit zoo observe` from the outside."""
import json
import shutil
from dataclasses import replace

import pytest
import torch

from data.images import read_rgb
from defense.observations import correlation
from submit import observe_commands
from submit.dev_splits import TINY_ZOO
from tests.test_score_command import run

NAME = "digits-badnets-0.1-0"
PLOTS = ["activeness.png", "coverage.png", "trigger_activation_change.png", "weight_change.png"]


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    monkeypatch.setattr(observe_commands, "UNLEARNING", replace(observe_commands.UNLEARNING, epochs=2))


def observe(capsys, *arguments):
    return run(capsys, "zoo", "observe", *arguments, "--device", "cpu")


def test_a_network_is_drawn_and_its_numbers_are_kept(capsys, tmp_path):
    status, out, _ = observe(capsys, TINY_ZOO, "--out", tmp_path / "seen", "--network", NAME)
    assert status == 0 and NAME in out and "488" in out
    folder = tmp_path / "seen" / NAME
    assert sorted(p.name for p in folder.iterdir()) == [*PLOTS[:2], "observations.json", *PLOTS[2:]]
    assert all(read_rgb(folder / name).size[0] > 400 for name in PLOTS)
    record = json.loads((folder / "observations.json").read_text())
    clean, poison = (torch.tensor([value for layer in record["values"][kind].values() for value in layer])
                     for kind in ("NWC, clean", "NWC, poison"))
    assert record["correlation"] == pytest.approx(correlation(clean, poison), abs=1e-5) and len(clean) == 488
    assert record["command"].startswith("python -m submit") and 0 <= record["coverage"]["0.1"] <= 1
    status, _, err = observe(capsys, TINY_ZOO, "--out", tmp_path / "seen", "--network", NAME)
    assert status == 2 and f"{NAME}: expected a path where nothing lies yet, found a folder" in err


def test_what_cannot_be_observed_is_named(capsys, tmp_path):
    status, _, err = observe(capsys, TINY_ZOO, "--out", tmp_path / "seen", "--network", "digits-clean-0")
    assert status == 2 and "--network: expected a backdoored network of" in err and "found digits-clean-0" in err
    shutil.copytree(TINY_ZOO / NAME, tmp_path / "zoo" / NAME)
    status, _, err = observe(capsys, tmp_path / "zoo", "--out", tmp_path / "seen")
    assert status == 1 and err.count("left out: ") == 1 and not (tmp_path / "seen" / NAME).exists()
