"""`zoo build`, `zoo inspect` and `weights train` from the outside."""
import json
import shutil

import pytest

import retrieval.train_parser
from retrieval.train_parser import ParserTrainingConfig
from submit import weight_commands
from submit.dev_splits import TINY_ZOO
from tests.test_score_command import run

RECIPE = """
attacks = ["badnets"]
[victim]
widths = [2, 2, 2, 2]
epochs = 1
[[sets]]
name = "digits"
size = 16
clean = 1
floor_accuracy = 0.95
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE)
    return path


def test_the_built_in_zoo_holds_what_it_promises(capsys):
    status, out, err = run(capsys, "zoo", "inspect", TINY_ZOO, "--json")
    models = json.loads(out)["models"]
    backdoored = [m for m in models if m["truth"] == "backdoored"]
    assert (status, err) == (0, "") and len(models) >= 16 and abs(2 * len(backdoored) - len(models)) <= 2
    assert len({m["attack"] for m in backdoored}) >= 5
    assert {m["truth"] for m in models if m["radius"]} == {"clean", "backdoored"}  # adversarially trained
    assert min(m["ACC"] for m in models) >= 0.85 and min(m["ASR"] for m in backdoored) >= 0.8
    status, out, _ = run(capsys, "zoo", "inspect", TINY_ZOO)
    assert status == 0 and "8-16-32-64" in out and all(m["model"] in out for m in models)


def test_a_model_below_its_floor_is_listed_as_left_out(capsys, tmp_path, recipe):
    command = ["zoo", "build", "--out", tmp_path / "zoo", "--recipe", recipe, "--workers", 1]
    status, _, err = run(capsys, *command)
    left_out = [line for line in err.splitlines() if line.startswith("left out: ")]
    assert status == 1 and len(left_out) == 2 and "below 0.95" in left_out[0]
    assert "digits-clean-0: ACC" in err and "failed: ACC" in err
    weights = tmp_path / "zoo" / "digits-clean-0" / "model.pt"
    before = weights.stat().st_mtime_ns
    run(capsys, *command)  # finished models are kept
    assert weights.stat().st_mtime_ns == before
    status, _, err = run(capsys, *command, "--seed", 7)
    assert status == 2 and "expected a model of these settings and images, or nothing, found one of others" in err


def test_a_lower_floor_takes_the_same_weights_in(capsys, tmp_path, recipe):
    command = ["zoo", "build", "--out", tmp_path / "zoo", "--recipe", recipe, "--workers", 1, "--json"]
    run(capsys, *command)
    weights = tmp_path / "zoo" / "digits-clean-0" / "model.pt"
    before = weights.stat().st_mtime_ns
    recipe.write_text(RECIPE.replace("0.95", "0.0") + "floor_success = 0.0\n")
    status, out, err = run(capsys, *command)
    assert (status, err) == (0, "") and len(json.loads(out)["models"]) == 2 and weights.stat().st_mtime_ns == before


def test_a_strange_model_file_is_named_and_the_others_listed(capsys, tmp_path):
    zoo = tmp_path / "zoo"
    shutil.copytree(TINY_ZOO, zoo)
    first = sorted(p for p in zoo.iterdir() if p.is_dir())[0]
    (first / "model.pt").write_bytes(b"not a model")
    status, out, err = run(capsys, "zoo", "inspect", zoo, "--json")
    assert status == 1 and f"{first / 'model.pt'}" in err
    assert first.name not in [m["model"] for m in json.loads(out)["models"]]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--recipe", "cpu"], "--data: expected the folder that holds cifar10/, found nothing"),
    (["--recipe", "cpu", "--data", "nowhere"], "nowhere"),
    (["--recipe", "huge"], "recipe: expected a TOML file or one of tiny, half, cpu, contest, found huge"),
    (["--workers", "-1"], "Invalid value for '--workers'"), (["--seed", "9" * 30], "Invalid value for '--seed'"),
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


@pytest.mark.parametrize("name, key, steps", [("encoder", "cfg", {"steps": 5}), ("backbone", "config", {"steps": 5}),
                                              ("parser", "config", {"steps": 900})])
def test_weights_are_trained_longer_where_asked(capsys, tmp_path, monkeypatch, name, key, steps):
    seen = {}

    def train(folder, *, seed, progress, **more):
        seen.update(more)
        folder.mkdir()
        return {"command": "train", "figures": {}}

    monkeypatch.setattr(f"{weight_commands.TRAINERS[name]}.train", train)
    asked = ("--out", tmp_path / "new", "--device", "cpu", "--steps", steps["steps"])
    assert run(capsys, "weights", "train", name, *asked)[0] == 0
    assert {part: getattr(seen[key], part) for part in steps} == steps and set(seen) == {key}
    assert json.loads((tmp_path / "new" / "card.json").read_text())["command"] == f"train --steps {steps['steps']}"
    if name == "parser":  # two stages
        shutil.rmtree(tmp_path / "new")
        plain = ParserTrainingConfig()
        run(capsys, "weights", "train", name, *asked[:-1], 2 * (plain.steps + plain.steps_narrow), "--start", tmp_path)
        assert (seen[key].steps, seen[key].steps_narrow) == (2 * plain.steps, 2 * plain.steps_narrow)
    status, _, err = run(capsys, "weights", "train", name, "--out", tmp_path / "other", "--steps", 0)
    assert status == 2 and "--steps: expected >= 1, found 0" in err
