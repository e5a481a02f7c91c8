"""`python -m submit defend METHOD --attack NAME`, sweeps of countermeasures to unlearnable examples, and their runs."""
import json
import pickle
import statistics
from functools import partial
from pathlib import Path

import pytest
import torch

import submit.unlearnable_commands as commands_module
import submit.unlearnable_runs as runs_module
from data.image_sets import read_digits
from data.resnet import new_resnet
from data.unlearnable import UNLEARNABLE, make_unlearnable
from data.victims import VictimConfig, normalise, train_victim
from defense import dvae
from defense.countermeasures import COUNTERMEASURES, purify
from defense.purified import Purified
from submit.engines import HERE
from submit.unlearnable_commands import defend_attacked, print_accuracies, print_three
from submit.unlearnable_runs import (
    Ground,
    Poisoning,
    SetChoice,
    Trial,
    own_seed,
    run_trials,
    trial_unit,
    victim_accuracy,
)
from submit.unlearnable_store import read_purified, read_set, write_purified, write_set
from submit.unlearnable_sweeps import read_unlearnable_sweep, share_restored, unlearnable_summaries, victim_of
from tests.test_score_command import run

SWEEP = """
set = "digits"
size = 8
images = 60
clean = true
[victim]
widths = [2, 2, 2, 2]
epochs = 4
batch = 15
rate = 0.05
[attacks.lsp]
norm = 2.0
patch = 4
[defenses.jpeg]
[defenses."jpeg, mild"]
method = "jpeg"
quality = 60
"""
VICTIM = VictimConfig(widths=(2, 2, 2, 2), epochs=4, batch=15, rate=0.05, crop=2, mean=(0.0,) * 3, std=(1.0,) * 3)
GROUND = Ground(SetChoice("digits", 8, 60), VICTIM, Path("nowhere"))
LSP = Poisoning("lsp", "lsp", {"norm": 2.0, "patch": 4}, 1.0, 0)
CLEAN = Poisoning("", "", {}, 0.0, 0)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(SWEEP)
    return path


def sweep(capsys, recipe, *arguments):
    return run(capsys, "defend", "sweep", recipe, "--workers", 1, "--device", "cpu", "--runs", recipe.parent / "runs",
               *arguments)


def units_of(answer):
    return json.loads(answer[1])["units"]


def folder(recipe):
    return recipe.parent / "runs" / "sweeps" / "mine"


def counted(monkeypatch, name, stop=None):
    """Calls of a function of the runs so far; from call `stop` on it is interrupted."""
    real, calls = getattr(runs_module, name), []

    def count(*arguments, **named):
        if stop is not None and len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(arguments)
        return real(*arguments, **named)

    monkeypatch.setattr(runs_module, name, count)
    return calls


@pytest.fixture
def no_victims(monkeypatch):
    """In place of a victim's accuracy a number that every pixel and the seed change, at no cost."""
    def number(found, labels, test, config, *, seed):
        return (found.images.double().flatten() * torch.arange(found.images.numel())).sum().item() % 997 / 997 + seed

    monkeypatch.setattr(runs_module, "victim_accuracy", number)


def by_hand(images, labels, test, seed):
    """Accuracy of the victim of SWEEP."""
    victim = train_victim(images, labels, 10, VICTIM, seed=own_seed(seed, "victim"), network=new_resnet)
    with torch.no_grad():
        found = victim(normalise(test.images, VICTIM)).argmax(1).tolist()
    return sum(a == b for a, b in zip(found, test.labels.tolist(), strict=True)) / len(found)


def test_a_unit_is_what_the_steps_by_hand_give(recipe, capsys):
    status, out, err = sweep(capsys, recipe, "--json")
    units = json.loads(out)["units"]
    train, test = read_digits(size=8)
    train = train.subset(torch.randperm(len(train.images), generator=torch.Generator().manual_seed(0))[:60])
    poisoned = make_unlearnable("lsp", train, {"norm": 2.0, "patch": 4}, ratio=1.0, seed=0).images
    wanted = []
    for images in (train.images, poisoned):
        for settings in (None, {"quality": 10}, {"quality": 60}):
            treated = images if settings is None else \
                purify("jpeg", images, train.labels, settings, generator=torch.Generator()).images
            wanted.append(by_hand(treated, train.labels, test, 0))
    assert status == 0 and [unit["accuracy"] for unit in units] == pytest.approx(wanted)
    assert [(unit["attack"], unit["defense"]) for unit in units] == \
        [(attack, defense) for attack in ("", "lsp") for defense in ("none", "jpeg", "jpeg, mild")]
    assert len(set(wanted)) > 3  # else nothing above could fail
    assert "lsp, ratio 1, seed 0: poisoned in 0 s" in err and "digits, clean, seed 0, jpeg, mild: " in err
    assert len(err.splitlines()) == 1 + 6


def test_only_what_changed_is_done_again(recipe, capsys, monkeypatch, no_victims):
    first = units_of(sweep(capsys, recipe, "--json"))
    attacks, treated, victims = (counted(monkeypatch, name) for name in ("keep_poisoned", "purify", "victim_accuracy"))
    assert units_of(sweep(capsys, recipe, "--json")) == first and not attacks + treated + victims
    recipe.write_text(SWEEP.replace("60\n", "61\n"))  # images and a quality
    sweep(capsys, recipe)
    assert (len(attacks), len(treated), len(victims)) == (1, 4, 6)
    recipe.write_text(SWEEP.replace("quality = 60", "quality = 5"))
    assert units_of(sweep(capsys, recipe, "--json"))[:2] == first[:2]
    assert (len(attacks), len(treated), len(victims)) == (1, 6, 8)
    recipe.write_text(SWEEP.replace("norm = 2.0", "norm = 3.0"))
    sweep(capsys, recipe)
    assert (len(attacks), len(treated), len(victims)) == (2, 8, 11)
    recipe.write_text(SWEEP.replace("batch = 15", "batch = 20"))
    sweep(capsys, recipe)
    assert (len(attacks), len(victims)) == (2, 17)  # the poisoned set is the one of before
    recipe.write_text(SWEEP.replace('"jpeg, mild"', '"jpeg, milder"'))
    assert [unit["defense"] for unit in units_of(sweep(capsys, recipe, "--json"))][2] == "jpeg, milder"
    assert len(victims) == 17  # another name is no other work


@pytest.mark.parametrize(("module", "changed"), [
    (UNLEARNABLE["lsp"][0], [False, True, False, True]), (COUNTERMEASURES["jpeg"][0], [False, False, True, True]),
    (runs_module.victims, [True] * 4)])
def test_a_unit_changes_with_the_code_that_decides_it_and_no_other(monkeypatch, module, changed):
    trials = [Trial(poisoning, method or "none", method, {}) for method in ("", "jpeg") for poisoning in (CLEAN, LSP)]

    def keys():
        return [trial.key(GROUND.halves(), VICTIM) for trial in trials]

    before, real = keys(), runs_module._code
    monkeypatch.setattr(runs_module, "_code", lambda *given: "other" if module in given else real(*given))
    after = keys()
    assert [a != b for a, b in zip(before, after, strict=True)] == changed
    assert len(set(before)) == 4 and runs_module._code.__name__ == "<lambda>"


def test_a_seed_a_ratio_and_a_victim_are_parts_of_a_units_name():
    halves = GROUND.halves()
    keys = {Trial(Poisoning("lsp", "lsp", {}, ratio, seed), "jpeg", "jpeg", {}).key(halves, victim)
            for ratio in (0.5, 1.0) for seed in (0, 1) for victim in (VICTIM, VictimConfig())}
    assert len(keys) == 8


def test_the_seed_that_a_countermeasure_draws_from_is_a_part_of_its_sets_name(monkeypatch):
    trial, seeds = Trial(LSP, "jpeg", "jpeg", {}), []
    before = trial.purified_key(GROUND.halves()), LSP.key(GROUND.halves())
    monkeypatch.setattr(runs_module, "own_seed", lambda seed, purpose: len(purpose) + seed)
    monkeypatch.setattr(runs_module, "purify", lambda name, images, *_, generator, kept:
                        seeds.append(generator.initial_seed()) or Purified(name, images))
    after = trial.purified_key(GROUND.halves()), LSP.key(GROUND.halves())
    assert before[0] != after[0] and before[1] == after[1]  # the attack draws from the seed itself
    images = GROUND.halves().train.images
    runs_module._purified(trial, GROUND, images, GROUND.halves().train.labels)
    assert seeds == [trial.countermeasure_seed] == [len("countermeasure")]


def test_an_interrupted_sweep_goes_on(recipe, capsys, monkeypatch, no_victims):
    whole = units_of(sweep(capsys, recipe, "--json"))
    with monkeypatch.context() as patch:
        patch.setattr(runs_module, "LONG", 0.0)  # every purified set counts as one that took long
        counted(patch, "victim_accuracy", stop=5)
        assert sweep(capsys, recipe, "--out", recipe.parent / "other")[0] == 130
    other = recipe.parent / "other"
    assert {path.name: len(list(path.iterdir())) for path in other.iterdir()} == \
        {"poisoned": 1, "purified": 4, "units": 5}
    calls = [counted(monkeypatch, name) for name in ("keep_poisoned", "purify", "victim_accuracy")]
    again = units_of(sweep(capsys, recipe, "--json", "--out", other))
    assert [len(part) for part in calls] == [0, 0, 1]  # the purified set of the lost victim was kept
    slim = [[{key: value for key, value in unit.items() if "seconds" not in key} for unit in part]
            for part in (whole, again)]
    assert slim[0] == slim[1]


def test_a_stage_of_dvae_outlives_an_interruption_and_not_the_finished_set(tmp_path, monkeypatch, no_victims):
    quick = {"epochs": 1, "batch": 30, "network": {"width": 4, "latent": 6}}
    trial = Trial(LSP, "dvae", "dvae", {"first": quick, "second": quick})
    ground, other = (Ground(GROUND.chosen, VICTIM, tmp_path / name) for name in ("a", "b"))
    monkeypatch.setattr(runs_module, "LONG", 0.0)
    whole, trained, stop = trial_unit(trial, ground=other), [], 2
    real = dvae.run_stage

    def counting(number, *rest, **more):
        if number == stop:
            raise KeyboardInterrupt
        trained.append(number)
        return real(number, *rest, **more)

    monkeypatch.setattr(dvae, "run_stage", counting)
    with pytest.raises(KeyboardInterrupt):
        trial_unit(trial, ground=ground)
    assert len(list((tmp_path / "a" / "purified").glob("*.stages/stage1-*"))) == 1
    stop = 0
    again = trial_unit(trial, ground=ground)
    assert trained == [1, 2] and again["accuracy"] == whole["accuracy"]
    assert [[path.suffix for path in (tmp_path / name / "purified").iterdir()] for name in "ab"] == \
        [[".safetensors"]] * 2


def test_spoiled_files_are_made_again(recipe, capsys, monkeypatch, no_victims):
    monkeypatch.setattr(runs_module, "LONG", 0.0)
    first = units_of(sweep(capsys, recipe, "--json"))
    for path in folder(recipe).rglob("*.*"):
        path.write_bytes(path.read_bytes()[:40])
    again = units_of(sweep(capsys, recipe, "--json"))
    assert [unit["accuracy"] for unit in again] == [unit["accuracy"] for unit in first]
    assert all(json.loads(path.read_text()) for path in (folder(recipe) / "units").iterdir())


def test_work_can_be_sent_to_other_processes(tmp_path):
    ground = Ground(GROUND.chosen, VICTIM, tmp_path)
    trial = Trial(LSP, "gray", "gray", {})
    work = pickle.loads(pickle.dumps(partial(trial_unit, ground=ground)))
    sent = work(pickle.loads(pickle.dumps(trial)))
    assert sent == trial_unit(trial, ground=ground) and sent["accuracy"] is not None
    assert [path.name for path in (tmp_path / "units").iterdir()] == [ground.unit_file(trial).name]


def test_a_countermeasure_that_fails_gives_the_images_as_they_were(recipe, capsys, monkeypatch, no_victims):
    def refuse(method, images, labels, settings, *, generator, kept):
        runs_module.expect("quality" in settings, "images", "larger ones", "small ones")
        return Purified(method, images, complete=False, failed="no time for an epoch")

    monkeypatch.setattr(runs_module, "purify", refuse)
    status, out, err = sweep(capsys, recipe, "--json")
    record = json.loads(out)
    plain, jpeg, mild = record["units"][3:]
    assert status == 0 and not record["problems"] and plain["accuracy"] == jpeg["accuracy"] == mild["accuracy"]
    assert jpeg["failed"] == "images: expected larger ones, found small ones"
    assert mild["failed"] == "no time for an epoch" and not plain["failed"]
    assert [row["failed"] for row in record["accuracies"][0]["rows"]] == [0, 2, 2]
    assert err.count("failed: no time for an epoch") == 2


def test_an_attack_that_refuses_the_set_is_left_out(recipe, capsys, no_victims):
    recipe.write_text(SWEEP.replace("patch = 4", "patch = 8"))  # one patch: ten classes have no corner each
    status, out, err = sweep(capsys, recipe, "--json")
    record = json.loads(out)
    assert status == 1 and [unit["accuracy"] is None for unit in record["units"]] == [False] * 3 + [True] * 3
    where = "digits, lsp, ratio 1, seed 0, jpeg: LinearSeparableConfig.patch: expected small enough for 10 classes"
    assert record["problems"][1].startswith(where) and f"left out: {where}" in err
    assert "lsp, ratio 1, seed 0: refused: LinearSeparableConfig.patch" in err
    row = record["accuracies"][0]["rows"][1]
    assert (row["attacks"]["lsp"], row["mean"], row["restored"]) == (None, None, None) and row["clean"]["mean"] > 0
    assert row["failed"] == 1
    assert len(list((folder(recipe) / "units").iterdir())) == 3  # it is tried again next time


def test_a_victim_that_cannot_be_trained_ends_in_one_line(recipe, capsys):
    recipe.write_text(SWEEP.replace("[2, 2, 2, 2]", "[2, 2]"))
    status, out, err = sweep(capsys, recipe)
    assert (status, out) == (2, "") and "widths: expected four positive numbers, found (2, 2)" in err.splitlines()[-1]


def test_three_victims_and_what_is_restored(tmp_path, capsys, monkeypatch):
    accuracies = iter([0.9, 0.3, 0.75])
    monkeypatch.setattr(runs_module, "victim_accuracy", lambda *_, **__: next(accuracies))
    arguments = ("defend", "jpeg", "--attack", "lsp", "--ratio", 0.5, "--seed", 3, "--workers", 1, "--device", "cpu",
                 "--runs", tmp_path)
    status, out, err = run(capsys, *arguments)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert status == 0 and "digits, 1438 images, 50 % of them poisoned" in " ".join(out.split())
    assert [line[:3] for line in lines] == [["clean set", "90.0", ""], ["poisoned: lsp", "30.0", ""],
                                            ["defended: jpeg", "75.0", "75.0"]]
    assert "lsp, ratio 0.5, seed 3: poisoned" in err
    path = Path(out.rsplit("record: ", 1)[1].replace("\n", ""))
    record = json.loads(path.read_text())
    assert record["seed"] == 3 and {"command", "environment", "accuracies", "units", "problems"} <= set(record)
    assert [unit["ratio"] for unit in record["units"]] == [0.0, 0.5, 0.5]
    assert run(capsys, *arguments)[1].count("75.0") == 2  # found again: the double has nothing left to give


@pytest.mark.parametrize(("set_name", "narrow"), [("digits", True), ("cifar10", False)])
def test_the_built_in_digits_have_settings_for_narrow_networks(tmp_path, monkeypatch, set_name, narrow):
    seen = []

    def no_runs(trials, ground, **_):
        seen.extend(trials)
        return [unit("", "none", 0, 0.9), unit("em", "none", 0, 0.1), unit("em", "dvae", 0, 0.8)]

    monkeypatch.setattr(commands_module, "run_trials", no_runs)
    defend_attacked("dvae", "em", None, set_name=set_name, ratio=1.0, seed=0, engine=HERE, runs=tmp_path)
    clean, poisoned, defended = seen
    assert (clean.method, clean.poisoning.method, poisoned.method, defended.method) == ("", "", "", "dvae")
    assert poisoned.poisoning == defended.poisoning and poisoned.poisoning.method == "em"
    assert poisoned.poisoning.settings.get("widths") == ([8, 16, 32, 64] if narrow else None)
    assert defended.settings.get("first", {}).get("network") == ({"width": 16, "latent": 64} if narrow else None)


@pytest.mark.parametrize(("values", "share"), [
    ((0.9, 0.3, 0.75), 0.75), ((0.9, 0.3, 0.3), 0.0), ((0.9, 0.3, 0.2), -1 / 6), ((0.9, 0.3, 0.95), 65 / 60),
    ((0.9, 0.9, 0.8), None), ((0.9, 0.95, 0.9), None), ((None, 0.3, 0.9), None), ((0.9, 0.3, None), None)])
def test_share_of_the_loss_that_is_restored(values, share):
    assert share_restored(*values) == (share if share is None else pytest.approx(share))


def test_nothing_is_shown_where_the_attack_took_nothing(capsys):
    one = {"set": "digits", "images": 9, "ratio": 1.0, "attack": "lsp", "defense": "jpeg", "seconds": 1.0}
    print_three([{**one, "accuracy": value} for value in (0.5, 0.5, 0.4)])
    assert "│ defended: jpeg │        40.0 │             │" in capsys.readouterr().out


def unit(attack, defense, seed, accuracy, failed="", ratio=1.0):
    return {"set": "digits", "images": 60, "attack": attack, "attack_method": attack, "ratio": ratio if attack else 0.0,
            "seed": seed, "defense": defense, "accuracy": accuracy, "failed": failed, "seconds": 2.0}


def test_means_and_deviations_of_a_small_table_by_hand(capsys):
    units = [unit("", "none", 0, 0.90), unit("", "none", 1, 0.94), unit("lsp", "none", 0, 0.10),
             unit("lsp", "none", 1, 0.20), unit("em", "none", 0, 0.30), unit("em", "none", 1, 0.40),
             unit("lsp", "jpeg", 0, 0.80), unit("lsp", "jpeg", 1, 0.90), unit("em", "jpeg", 0, 0.50, failed="lost"),
             unit("em", "jpeg", 1, None, failed="gone"), unit("lsp", "gray", 0, None, failed="gone"),
             unit("em", "gray", 0, 0.7), unit("lsp", "none", 0, 0.6, ratio=0.5)]
    full, half = unlearnable_summaries(units)
    none, jpeg, gray = full["rows"]
    assert (full["set"], full["images"], full["ratio"], half["ratio"]) == ("digits", 60, 1.0, 0.5)
    assert none["clean"] == pytest.approx({"mean": 92.0, "std": statistics.stdev([90, 94])})
    assert none["attacks"]["lsp"] == pytest.approx({"mean": 15.0, "std": statistics.stdev([10, 20])})
    assert none["mean"] == pytest.approx({"mean": 25.0, "std": statistics.stdev([20, 30])}) and none["restored"] is None
    assert jpeg["mean"]["mean"] == pytest.approx((85 + 50) / 2) and jpeg["mean"]["std"] is None  # one whole round
    assert jpeg["restored"] == pytest.approx((67.5 - 25) / (92 - 25))
    assert (jpeg["clean"], jpeg["runs"], jpeg["failed"], jpeg["seconds"]) == (None, 4, 2, 2.0)
    assert gray["attacks"]["lsp"] is None and gray["mean"] is None and gray["attacks"]["em"]["std"] is None
    assert [row["defense"] for row in half["rows"]] == ["none"] and half["rows"][0]["mean"]["mean"] == 60.0
    print_accuracies([full, half])
    out = capsys.readouterr().out
    assert "no countermeasure" in out and "15.0 ± 7.1" in out and "2/4" in out and "50 % of them poisoned" in out


def test_sets_are_kept_whole_and_others_are_not_taken(tmp_path):
    images = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8)
    write_set(tmp_path / "a", images, {"seconds": 1.5, "odd": float("nan")})
    found, record = read_set(tmp_path / "a", images.shape)
    assert torch.equal(found, images) and record == {"seconds": 1.5, "odd": None}
    assert read_set(tmp_path / "a", torch.Size((2, 3, 4, 4))) is None and read_set(tmp_path / "b", images.shape) is None
    (tmp_path / "c").write_bytes(b"\0" * 80)
    assert read_set(tmp_path / "c", images.shape) is None
    given = Purified("bdr", images.float() / 3, complete=False, failed="why", losses={"a": (1.0,)}, seconds=2.0,
                     details={"b": 1})
    write_purified(tmp_path / "d", given)
    back = read_purified(tmp_path / "d", images)
    assert torch.equal(back.images, given.images) and back.images.dtype == torch.float32
    assert (back.method, back.complete, back.failed, back.seconds, back.details) == ("bdr", False, "why", 2.0, {"b": 1})
    assert back.losses == {"a": [1.0]} and read_purified(tmp_path / "a", images) is None  # a poisoned set, no purified


def test_training_that_is_changed_by_the_countermeasure_is_not_kept(tmp_path, monkeypatch):
    calls = []

    def harden(model, images, labels, config, *, generator):
        calls.append(len(images))
        return images.float()

    monkeypatch.setattr(runs_module, "purify",
                        lambda name, images, *_, **__: Purified(name, images, harden=harden, seconds=99.0))
    found = trial_unit(Trial(CLEAN, "at", "jpeg", {}), ground=Ground(GROUND.chosen, VICTIM, tmp_path))
    assert calls == [15] * 16 and found["purifying_seconds"] == 99.0 and not (tmp_path / "purified").exists()


def test_float_images_make_victims_and_global_draws_stay():
    train, test = GROUND.halves().train, GROUND.halves().test
    state, kept = torch.get_rng_state(), train.images.clone()
    one, other = (victim_accuracy(Purified("bdr", images), train.labels, test, VICTIM, seed=0)
                  for images in (train.images, train.images.float()))
    assert one == other and torch.equal(torch.get_rng_state(), state) and torch.equal(train.images, kept)


def test_some_of_each_class(refuses):
    train = SetChoice("digits", 8, per_class=5)
    halves = Ground(train, VICTIM, Path()).halves()
    assert torch.bincount(halves.train.labels).tolist() == [5] * 10 and halves.train.images.shape[2:] == (8, 8)
    whole = {image.numpy().tobytes() for image in read_digits(size=8)[0].images}
    assert all(image.numpy().tobytes() in whole for image in halves.train.images)
    with refuses("per_class: expected at most 1[0-9][0-9], as many as the smallest class of digits has, found 500"):
        Ground(SetChoice("digits", 8, per_class=500), VICTIM, Path()).halves()


def test_victims_of_signs_and_digits_are_not_mirrored_and_settings_count():
    assert [victim_of(name, {}).flip for name in ("cifar10", "mnist", "digits", "gtsrb32")] == [True] + 3 * [False]
    full = victim_of("cifar10", {"epochs": 3, "flip": False, "rate": 1, "widths": [1, 2, 3, 4]})
    assert (full.epochs, full.flip, full.rate, full.widths, full.mean) == (3, False, 1, (1, 2, 3, 4), (0.0, 0.0, 0.0))
    assert victim_of("cifar10", {}).widths == (64, 128, 256, 512) and victim_of("digits", {}).widths == (8, 16, 32, 64)


def test_no_trials_are_no_units(tmp_path):
    assert run_trials([], Ground(GROUND.chosen, VICTIM, tmp_path), engine=HERE, report=print, poisoned=print) == []


@pytest.mark.parametrize(("old", "new", "message"), [
    ('set = "digits"', "set = 3", "mine.toml: set: expected a text, found 3"),
    ('set = "digits"', "", "mine.toml: set: expected a text, found nothing"),
    ('set = "digits"', "colour = 1", "sweep: expected some of set, attacks, defenses, size, images, per_class"),
    ("images = 60", 'images = "x"', "images: expected a whole number, found x"),
    ("images = 60", "images = -1", "images, per_class: expected numbers >= 0, found (-1, 0)"),
    ("images = 60", "images = 60\nper_class = 5", "images, per_class: expected one of them at most, found (60, 5)"),
    ("size = 8", "size = 4", "size: expected pixels >= 8, or 0 for the usual, found 4"),
    ("clean = true", "clean = [0.05]", "clean: expected true or false, found [0.05]"),
    ("clean = true", "ratios = [0]", "ratios: expected shares in (0, 1], found 0"),
    ("clean = true", "ratios = []", "ratios: expected at least one share, found none"),
    ("clean = true", "ratios = 0.5", "ratios: expected a list, found 0.5"),
    ("clean = true", "seeds = [-1]", "seeds: expected whole numbers >= 0, found [-1]"),
    ("clean = true", "seeds = [1, 1]", "seeds: expected each value once: equal runs are no spread, found [1, 1]"),
    ("clean = true", "ratios = [0.5, 0.5]", "ratios: expected each value once"),
    ("epochs = 4", "height = 2", "victim: expected some of widths, epochs"),
    ("epochs = 4", "epochs = 2.5", "victim epochs: expected a value like 10, found 2.5"),
    ("epochs = 4", "epochs = 0", "VictimConfig epochs, batch: expected > 0, > 1, found (0, 15)"),
    ("widths = [2, 2, 2, 2]", "widths = 2", "victim widths: expected a list, found 2"),
    ("[victim]", "[[victim]]", "mine.toml: victim: expected a table, found [{"),
    ("[attacks.lsp]\nnorm = 2.0\npatch = 4", "[attacks]", "attacks: expected at least one [attacks.NAME], found none"),
    ("[attacks.lsp]", "[attacks.nix]", "attacks nix: expected one of lsp, ops, ar"),
    ("[attacks.lsp]", '[attacks.""]\nmethod = "lsp"', "attacks: expected names that are not empty, found an empty one"),
    ("[attacks.lsp]", "[attacks.lsp]\nmethod = 3", "attacks lsp method: expected the name of an attack, found 3"),
    ("norm = 2.0", "height = 2.0", "attacks lsp lsp: expected some of norm, patch, separation, found height"),
    ("norm = 2.0", 'norm = "x"', "attacks lsp lsp: expected settings of the right types"),
    ("[defenses.jpeg]", "[defenses.nix]", "defenses nix: expected one of dvae, jpeg, gray"),
    ("[defenses.jpeg]", '[defenses.none]\nmethod = "jpeg"', "defenses: expected other names than none"),
    ("quality = 60", "quality = 0", "JpegConfig.quality: expected in [1, 100], found 0"),
    ("quality = 60", "height = 60", "defenses jpeg, mild jpeg: expected some of quality, found height"),
    ('[defenses.jpeg]\n[defenses."jpeg, mild"]\nmethod = "jpeg"\nquality = 60', "",
     "defenses: expected a table [defenses.NAME] each, found nothing"),
    ('set = "digits"', 'set = "cifar10"', "--data: expected the folder that holds cifar10/, found nothing"),
    ("size = 8\nimages = 60", "per_class = 500", "per_class: expected at most 1"),
])
def test_wrong_recipes_end_in_one_line(recipe, capsys, old, new, message):
    assert SWEEP.count(old) == 1
    recipe.write_text(SWEEP.replace(old, new))
    status, out, err = sweep(capsys, recipe)
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1
    assert not folder(recipe).exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["nix"], "METHOD: expected sweep or one of tsbd, ft, fp"),
    (["nix", "--attack", "lsp"], "or of dvae, jpeg, gray"),
    (["jpeg"], "defend jpeg: expected --attack, one of lsp, ops, ar"),
    (["jpeg", "--zoo", "zoo"], "and no --zoo, found --zoo zoo"),
    (["jpeg", "--attack", "lsp", "--zoo", "zoo"], "and no --zoo, found --zoo zoo"),
    (["jpeg", "--attack", "lsp", "--clean", "0.1"], "and no --clean, found --clean 0.1"),
    (["jpeg", "x.toml", "--attack", "lsp"], "and no RECIPE, found RECIPE x.toml"),
    (["jpeg", "--attack", "lsp", "--out", "x"], "and no --out, found --out x"),
    (["jpeg", "--attack", "badnets"], "--attack: expected one of lsp, ops, ar"),
    (["jpeg", "--attack", "lsp", "--ratio", "0"], "--ratio: expected a share in (0, 1], found 0.0"),
    (["jpeg", "--attack", "lsp", "--set", "cifar10"], "--data: expected the folder that holds cifar10/, found nothing"),
    (["fp", "--attack", "lsp"], "defend fp: expected --zoo DIR and no --attack, found --attack lsp"),
    (["fp", "--zoo", "zoo", "--set", "mnist"], "defend fp: expected --zoo DIR and no --set, found --set mnist"),
    (["sweep", "x.toml", "--attack", "lsp"], "defend sweep: expected a RECIPE and no --attack, found --attack lsp"),
    (["sweep", "x.toml", "--ratio", "0.5"], "defend sweep: expected a RECIPE and no --ratio, found --ratio 0.5"),
    (["sweep", "x.toml", "--clean", "0.5"], "defend sweep: expected a RECIPE and no --clean, found --clean 0.5"),
])
def test_methods_and_options_that_do_not_fit_end_in_one_line(capsys, tmp_path, arguments, message):
    status, out, err = run(capsys, "defend", *arguments, "--runs", tmp_path / "runs", "--workers", 1, "--device", "cpu")
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("name", sorted(path.name for path in Path("defense/sweeps").glob("unlearnable_*.toml")))
def test_the_sweeps_in_the_repository_can_be_read(name):
    found = read_unlearnable_sweep(Path("defense/sweeps") / name)
    trials = found.trials()
    assert {trial.method for trial in trials} - {""} <= set(COUNTERMEASURES)
    assert {trial.poisoning.method for trial in trials} - {""} <= set(UNLEARNABLE)
    assert sum(not trial.method for trial in trials) == len(found.seeds) * (1 + len(found.ratios) * len(found.attacks))
