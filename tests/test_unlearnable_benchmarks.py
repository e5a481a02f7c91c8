"""The benchmarks of unlearnable examples on inputs that take no time."""
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import dvae_speed, poison_uses, unlearnable_attacks, unlearnable_sweep
from benchmarks.options import TIME_UP
from benchmarks.time_limit import TimeLimit
from data.autoregressive import fields
from data.image_sets import ImageSet
from defense.dvae_network import NetworkConfig, new_dvae
from submit.unlearnable_sweeps import read_unlearnable_sweep

QUICK = """
set = "digits"
size = 8
per_class = 4

[victim]
widths = [4, 4, 4, 4]
epochs = 1

[attacks.lsp]
patch = 4

[defenses.jpeg]

[defenses.dvae]
first = { epochs = 1, network = { width = 4, latent = 4 } }
second = { epochs = 1, network = { width = 4, latent = 4 } }
"""


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """The recipe above in place of those of the benchmarks; records and kept work in a folder of their own."""
    (tmp_path / "quick.toml").write_text(QUICK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KIT_DEVICE", "cpu")
    for module, name, value in ((unlearnable_sweep, "SWEEPS", tmp_path), (poison_uses, "ROOT", tmp_path),
                                (poison_uses, "SWEEP", tmp_path / "quick.toml")):
        monkeypatch.setattr(module, name, value)
    return tmp_path


def test_the_released_layers_are_those_of_the_network_in_other_words():
    model = new_dvae(2, (3, 8, 8), NetworkConfig(width=4, latent=4), seed=0).eval()
    x, y = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    ours = model(x, y, None)
    theirs = dvae_speed.released_layers(model)(x, y, None)
    assert any(isinstance(layer, torch.nn.ConvTranspose2d) and layer.stride == (1, 1) for layer in model.perturbation)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_both_ways_of_a_stage_are_timed_and_give_images_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KIT_DEVICE", "cpu")
    dvae_speed.main(["--images", "128", "--epochs", "1", "--width", "4", "--latent", "4", "--rounds", "1", "--loaders",
                     "1", "--out", str(tmp_path / "record.json")])
    record = json.loads((tmp_path / "record.json").read_text())
    assert set(record["median"]) == {"plain", "ours, float32", "ours, bfloat16"}
    assert all(5 < value[0] < 60 for value in record["psnr_db"].values())
    assert record["times faster than plain"]["plain"] == 1


def test_attacks_are_timed(tmp_path, monkeypatch, capsys):
    clean = ImageSet(torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8), torch.arange(40) % 10, 10, "random")
    monkeypatch.setattr(unlearnable_attacks, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(unlearnable_attacks, "random_set", lambda: clean)
    monkeypatch.setattr(unlearnable_attacks, "ROUNDS", 1)
    monkeypatch.setattr(unlearnable_attacks, "fields", lambda rule, count, *rest, **more: fields(rule, 2, *rest,
                                                                                                 **more))
    monkeypatch.setattr(sys, "argv", ["unlearnable_attacks", "--plain", "1"])
    unlearnable_attacks.main()
    record = json.loads((tmp_path / "record.json").read_text())
    assert set(record["seconds"]) == {"lsp", "ops", "ar"} and record["images"] == 40


def sweep(*more):
    """(exit status, record) of a call on the recipe above."""
    status = unlearnable_sweep.main(["--recipe", "quick", "--out", "record.json", *more])
    return status, json.loads(Path("record.json").read_text())


def test_a_sweep_writes_its_record_from_what_there_is_and_goes_on(quick, monkeypatch, capsys):
    status, record = sweep("--minutes", "0")
    assert status == TIME_UP and (record["of"], record["n"], record["left"]) == (4, 0, 4) and record["tables"] == []
    with monkeypatch.context() as patch:
        patch.setattr(TimeLimit, "fits", lambda self, kind: "jpeg" not in kind)
        status, record = sweep()
    assert status == TIME_UP and (record["n"], record["left"]) == (3, 1)
    assert [row["defense"] for row in record["tables"][0]["rows"]] == ["none", "dvae"]
    status, record = sweep()
    assert status == 0 and record["left"] == 0
    assert [row["defense"] for row in record["tables"][0]["rows"]] == ["none", "jpeg", "dvae"]
    assert len(record["units"]) == 4 and record["defenses"]["jpeg"] == {}
    assert "4 of 4 runs, 0 left" in capsys.readouterr().out
    monkeypatch.setattr(unlearnable_sweep, "measured", None)  # nothing is measured again
    assert sweep()[1]["units"] == record["units"]


def test_what_cannot_be_poisoned_is_left_out(quick, capsys):
    (quick / "quick.toml").write_text(QUICK.replace("patch = 4", "patch = 64"))
    status, record = sweep()
    assert status == TIME_UP and (record["n"], record["left"]) == (1, 3)
    assert "lsp, none: left out, InputError" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [(("--recipe", "missing"), "found missing"),
                                                (("--workers", "0"), "--workers: expected > 0, found 0"),
                                                (("--recipe", "unlearnable_cpu"), "--data: expected the folder")])
def test_a_wrong_sweep_ends_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        unlearnable_sweep.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_of_the_full_sweep_comes_first_what_makes_a_table():
    tasks = [unlearnable_sweep.Task(trial, None)
             for trial in read_unlearnable_sweep(unlearnable_sweep.SWEEPS / "unlearnable_full.toml").trials()]
    order = [task.trial for task in unlearnable_sweep.in_order(tasks)]
    attacks = ("", "lsp", "ops", "ar", "em", "tap")
    assert [(t.label, t.poisoning.label) for t in order[:7]] == [*(("none", name) for name in attacks), ("dvae", "")]
    assert [t.label for t in order[:24:6]] == list(unlearnable_sweep.FIRST)
    assert {t.poisoning.seed for t in order[:36]} == {0} and len(order) == len(tasks)


def test_uses_are_measured_once(quick, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["uses", "--data", "none", "--attacks", "lsp", "--ratios", "0.5", "--shares",
                                      "0.5", "--victims"])
    poison_uses.main()
    first = json.loads((quick / "records" / "poison_uses.json").read_text())["results"]["lsp"]
    assert set(first) == {"alone", "detection", "growing"} and first["growing"][0]["images"] == 20
    assert set(first["detection"][0]) == {"ratio", "accuracy", "precision", "recall", "f1", "accuracy of a victim"}
    monkeypatch.setattr(poison_uses.Uses, "trained", None)  # nothing is trained again
    poison_uses.main()
    assert json.loads((quick / "records" / "poison_uses.json").read_text())["results"]["lsp"] == first
    monkeypatch.setattr(poison_uses, "CODE", "changed")
    with pytest.raises(TypeError):  # other code, other results: trained anew
        poison_uses.main()


def test_the_committed_recipes_can_be_read():
    for name, trials in (("unlearnable_cpu", 40), ("dvae_ablations", 7), ("unlearnable_full", 108), ("poison_uses", 5)):
        assert len(read_unlearnable_sweep(unlearnable_sweep.SWEEPS / f"{name}.toml").trials()) == trials
