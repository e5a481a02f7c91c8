"""`python -m submit defend sweep` and what it is made of: recipes, plans, tables of means and deviations."""
import json
import shutil
import statistics
from pathlib import Path

import pytest

import submit.defense_runs as runs_module
from defense.defenses import DEFENSES
from defense.results import DefenseResult
from submit.defend_commands import print_summaries
from submit.sweeps import read_sweep, summaries
from submit.unlearnable_commands import of_unlearnable
from tests.test_score_command import run

VICTIMS = """
attacks = ["badnets", "blended"]
repeats = 2
[victim]
widths = [2, 2, 2, 2]
epochs = 1
batch = 128
[[sets]]
name = "digits"
size = 16
images = 400
clean = 1
floor_accuracy = 0.0
floor_success = 0.0
"""
SWEEP = """
victims = "victims.toml"
seeds = [0, 1]
[defenses.clp]
[defenses."clp, bold"]
method = "clp"
deviations = 1.0
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "victims.toml").write_text(VICTIMS)
    path = tmp_path / "mine.toml"
    path.write_text(SWEEP)
    return path


def sweep(capsys, recipe, *arguments):
    return run(capsys, "defend", "sweep", recipe, "--workers", 1, "--device", "cpu", "--runs", recipe.parent / "runs",
               *arguments)


def test_a_sweep_trains_its_victims_once_and_measures_every_unit(recipe, capsys, monkeypatch):
    status, out, err = sweep(capsys, recipe, "--json")
    record = json.loads(out)
    units = record["units"]
    assert status == 0 and len(units) == 4 * 2 * 2  # victims, defenses, seeds
    assert len({(u["victim"], u["defense"], u["seed"]) for u in units}) == 16
    folder = recipe.parent / "runs" / "sweeps" / "mine"
    assert len(list((folder / "units").iterdir())) == 16 and len(list((folder / "triggers").iterdir())) == 4
    assert not (folder / "victims" / "digits-clean-0").exists()  # clean networks need no repair
    assert err.count("ASR") == 4 + 16  # a line for each victim, and for each unit
    rows = record["tables"][0]["rows"]
    assert [(row["defense"], row["runs"]) for row in rows] == [("no defense", 8), ("clp", 8), ("clp, bold", 8)]
    monkeypatch.setattr(runs_module, "run_plan", None)  # nothing is measured again
    again = sweep(capsys, recipe, "--json")
    assert again[0] == 0 and json.loads(again[1])["units"] == units
    monkeypatch.undo()
    recipe.write_text(SWEEP.replace("1.0", "2.0"))
    calls = []
    real = runs_module.run_plan
    monkeypatch.setattr(runs_module, "run_plan", lambda victim, plan: calls.append(plan.label) or real(victim, plan))
    sweep(capsys, recipe)
    assert calls == ["clp, bold"] * 8  # only what has other settings


def test_an_interrupted_sweep_goes_on_and_side_by_side_gives_the_same(recipe, capsys, monkeypatch):
    recipe.write_text(SWEEP.replace("seeds = [0, 1]", ""))
    real, calls = runs_module.run_plan, []

    def stopped(victim, plan):
        calls.append(victim.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(victim, plan)

    monkeypatch.setattr(runs_module, "run_plan", stopped)
    assert sweep(capsys, recipe)[0] == 130
    monkeypatch.undo()
    first = json.loads(sweep(capsys, recipe, "--json")[1])
    kept = recipe.parent / "runs" / "sweeps" / "mine"
    assert len(first["units"]) == len(list((kept / "units").iterdir())) == 8
    out = recipe.parent / "elsewhere"
    shutil.copytree(kept / "victims", out / "victims")
    other = json.loads(sweep(capsys, recipe, "--json", "--out", out, "--workers", 2)[1])
    for unit in first["units"] + other["units"]:
        unit.pop("seconds")
    assert first["units"] == other["units"]


def test_an_oracle_gets_the_test_images_and_the_others_do_not(recipe, capsys, monkeypatch):
    recipe.write_text('victims = "victims.toml"\n[defenses.anp-oracle]\n[defenses.ft]\nepochs = 1\n')
    seen = {}

    def spy(method, model, images, labels, settings, **rest):
        seen[method] = settings
        return DefenseResult(method, model)

    monkeypatch.setattr(runs_module, "defend", spy)
    status, out, _ = sweep(capsys, recipe)
    assert status == 0 and "anp-oracle: chooses on triggered test images, which no defender has" in out
    assert set(seen["anp-oracle"]) == {"test"} and seen["ft"] == {"epochs": 1}
    found = seen["anp-oracle"]["test"]
    assert found.images.shape == found.triggered.shape == (359, 3, 16, 16) and not found.images.equal(found.triggered)


def unit(defense, attack, repeat, acc, asr, rating, failed="", seed=0, clean=0.05):
    return {"set": "digits", "ratio": 0.1, "clean": clean, "victim": f"digits-{attack}-0.1-{repeat}", "attack": attack,
            "seed": seed, "defense": defense, "before": {"ACC": 0.9, "ASR": 1.0, "RA": 0.0},
            "after": {"ACC": acc, "ASR": asr, "RA": 0.5}, "DER": rating, "failed": failed, "seconds": 2.0}


def test_means_and_deviations_of_a_small_table_by_hand():
    units = [unit("ft", "badnets", 0, 0.8, 0.1, 0.90), unit("ft", "blended", 0, 0.6, 0.5, 0.60),
             unit("ft", "badnets", 1, 0.9, 0.3, 0.85), unit("ft", "blended", 1, 0.9, 1.0, 0.5, failed="lost")]
    (table,) = summaries(units)
    none, row = table["rows"]
    assert (table["set"], table["ratio"], table["clean"]) == ("digits", 0.1, 0.05)
    assert (none["defense"], none["runs"], none["failed"]) == ("no defense", 4, 0)
    assert none["all"]["ACC"] == pytest.approx({"mean": 90.0, "std": 0.0})
    assert none["all"]["DER"]["mean"] == 50.0
    assert (row["runs"], row["failed"], row["seconds"]) == (4, 1, 2.0)
    assert row["attacks"]["badnets"]["ASR"] == pytest.approx({"mean": 20.0, "std": statistics.stdev([10, 30])})
    assert row["all"]["ACC"]["mean"] == pytest.approx((85 + 75) / 2)
    assert row["all"]["ACC"]["std"] == pytest.approx(statistics.stdev([70, 90]))  # of the rounds' means
    assert row["all"]["DER"]["mean"] == pytest.approx((87.5 + 55) / 2)


def test_each_attack_counts_alike_and_one_round_has_no_deviation():
    units = [unit("ft", "badnets", 0, 0.9, 0.0, 1.0), unit("ft", "badnets", 1, 0.7, 0.0, 1.0),
             unit("ft", "blended", 0, 0.4, 0.0, 1.0)]
    row = summaries(units)[0]["rows"][1]
    assert row["all"]["ACC"]["mean"] == pytest.approx((80 + 40) / 2) and row["all"]["ACC"]["std"] is None
    assert row["attacks"]["blended"]["ACC"]["std"] is None


def test_shares_of_clean_images_are_tables_of_their_own(capsys):
    units = [unit("ft", "badnets", 0, 0.9, 0.0, 0.95, clean=share) for share in (0.01, 0.05)]
    assert [table["clean"] for table in summaries(units)] == [0.01, 0.05]
    print_summaries(summaries([*units, unit("clp", "blended", 0, 0.9, 1.0, 0.5)]))
    out = capsys.readouterr().out
    assert "digits, 10 % poisoned, 1 % clean" in out and "90.0  0.0  95.0" in out and "-" in out


@pytest.mark.parametrize(("content", "message"), [
    ("victims = 3", "mine.toml: victims: expected a text, found 3"),
    ('victims = "victims.toml"', "mine.toml: defenses: expected a table [defenses.NAME] each, found nothing"),
    ('victims = "victims.toml"\n[defenses]', "mine.toml: defenses: expected at least one [defenses.NAME], found none"),
    ("colour = 1", "mine.toml: sweep: expected some of victims, defenses, clean, seeds, found colour"),
    ("victims = ", "mine.toml: expected a sweep, found "),
    (SWEEP.replace("victims.toml", "gone.toml"), "recipe: expected a TOML file or one of tiny, half, cpu, contest"),
    (SWEEP.replace("deviations", "height"), "clp: expected some of deviations, found height"),
    (SWEEP.replace("deviations = 1.0", 'deviations = "x"'), "clp"),
    (SWEEP.replace('"clp"\n', '"nix"\n'), "defenses clp, bold: expected one of tsbd"),
    (SWEEP.replace('"clp"\n', "3\n"), "defenses clp, bold method: expected the name of a defense, found 3"),
    (SWEEP.replace("[0, 1]", "[-1]"), "seeds: expected whole numbers >= 0, found [-1]"),
    (SWEEP.replace("[0, 1]", "[]"), "seeds: expected whole numbers >= 0, found []"),
    ("clean = [0]\n" + SWEEP, "clean: expected shares in (0, 1], found 0"),
    ("clean = []\n" + SWEEP, "clean: expected at least one share, found none"),
    ("clean = 0.1\n" + SWEEP, "clean: expected a list, found 0.1"),
])
def test_wrong_recipes_end_in_one_line(recipe, capsys, content, message):
    recipe.write_text(content)
    status, out, err = sweep(capsys, recipe)
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1
    assert not (recipe.parent / "runs" / "sweeps").exists()


def test_victims_without_an_attack_are_refused(recipe, capsys):
    (recipe.parent / "victims.toml").write_text(VICTIMS.replace('["badnets", "blended"]', "[]"))
    status, _, err = sweep(capsys, recipe)
    assert status == 2 and "victims: expected a recipe with attacks, found victims.toml" in err


@pytest.mark.parametrize("name", sorted(path.name for path in Path("defense/sweeps").glob("*.toml")
                                        if not of_unlearnable(path)))
def test_the_sweeps_in_the_repository_can_be_read(name):
    plans = read_sweep(Path("defense/sweeps") / name).plans()
    assert plans and {plan.method for plan in plans} <= set(DEFENSES)
    if name in ("cpu.toml", "half.toml"):
        assert {plan.method for plan in plans} == set(DEFENSES)
