"""`zoo build`, `zoo inspect` and `weights train` from the outside."""
import json
import shutil

import pytest

import retrieval.train_parser
from submit.dev_splits import DIGITS_ZOO
from tests.test_score_command import run


def test_the_built_in_zoo_holds_what_it_promises(capsys):
    status, out, err = run(capsys, "zoo", "inspect", DIGITS_ZOO, "--json")
    models = json.loads(out)["models"]
    assert (status, err) == (0, "") and len(models) >= 8
    assert sum(m["truth"] == "clean" for m in models) == len(models) // 2
    assert {m["attack"] for m in models if m["truth"] == "backdoored"} == {"badnets", "blended"}
    assert min(m["ACC"] for m in models) >= 0.95
    assert min(m["ASR"] for m in models if m["truth"] == "backdoored") >= 0.95
    status, out, _ = run(capsys, "zoo", "inspect", DIGITS_ZOO)
    assert status == 0 and "8-16-32-64" in out


def test_a_model_below_its_floor_is_listed_as_left_out(capsys, tmp_path):
    command = ["zoo", "build", "--out", tmp_path / "zoo", "--models", 2, "--epochs", 1, "--width", 2]
    status, _, err = run(capsys, *command)
    left_out = [line for line in err.splitlines() if line.startswith("left out: ")]
    assert status == 1 and len(left_out) == 2 and "below 0.95" in left_out[0]
    before = (tmp_path / "zoo" / "000" / "model.pt").stat().st_mtime_ns
    run(capsys, *command)  # finished models are kept
    assert (tmp_path / "zoo" / "000" / "model.pt").stat().st_mtime_ns == before
    status, _, err = run(capsys, *command, "--ratio", 0.2)
    assert status == 2 and "expected the configuration it was begun with, found another ratio" in err


def test_a_strange_model_file_is_named_and_the_others_listed(capsys, tmp_path):
    zoo = tmp_path / "zoo"
    shutil.copytree(DIGITS_ZOO, zoo)
    first = sorted(p for p in zoo.iterdir() if p.is_dir())[0]
    (first / "model.pt").write_bytes(b"not a model")
    status, out, err = run(capsys, "zoo", "inspect", zoo, "--json")
    assert status == 1 and f"{first / 'model.pt'}" in err
    assert first.name not in [m["model"] for m in json.loads(out)["models"]]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--set", "mnist"], "--data: expected the folder of the set 'mnist', found nothing"),
    (["--attacks", "badnets,foo"], "expected some of badnets, blended, found foo"),
    (["--ratio", "0"], "Invalid value for '--ratio'"), (["--seed", "9" * 30], "Invalid value for '--seed'"),
    (["--models", "3"], "expected an even number >= 2, found 3"),
    (["--set", "mine", "--data", "nowhere"], "nowhere"),
])
def test_wrong_recipes_end_in_one_line(capsys, tmp_path, arguments, message):
    status, out, err = run(capsys, "zoo", "build", "--out", tmp_path / "zoo", *arguments)
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "zoo").exists()


def test_weights_are_trained_into_a_new_folder(capsys, tmp_path, monkeypatch):
    def train(folder, *, seed, progress):
        progress("step 1")
        folder.mkdir()
        return {"figures": {"exact match": 12.5, "seed": seed}}

    monkeypatch.setattr(retrieval.train_parser, "train", train)
    status, out, err = run(capsys, "weights", "train", "parser", "--out", tmp_path / "new", "--seed", 3)
    assert status == 0 and err == "step 1\n" and '"exact match": 12.5,\n "seed": 3\n' in out
    status, _, err = run(capsys, "weights", "train", "parser", "--out", tmp_path / "new")
    assert status == 2 and "new: expected a folder that does not exist yet, found one that does" in err
