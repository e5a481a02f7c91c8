"""Recipes: what they spell out, and what they refuse."""
from collections import Counter

import pytest

from data.victims import VictimConfig
from data.zoo_recipes import BUILT_IN, Recipe, SetPlan, jobs, read_recipe

TEXT = """
attacks = ["badnets", "blended"]
ratios = [0.1, 0.05]
repeats = 2
[victim]
widths = [2, 4, 4, 8]
rate = 0.1
[parameters.badnets]
size = 2
[[sets]]
name = "digits"
clean = 3
adversarial_clean = 1
adversarial_attacks = ["blended"]
radius = 4.0
adversarial_floor = 0.5
[[sets]]
name = "signs"
victim = { epochs = 7 }
"""


@pytest.fixture
def write(tmp_path):
    def to_file(text):
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        return str(path)
    return to_file


def test_a_recipe_multiplies_sets_attacks_ratios_and_repeats(write):
    made = jobs(read_recipe(write(TEXT)))
    counts = Counter((job.set_name, job.attack, job.ratio, job.victim.radius) for job in made)
    ordinary = {(name, attack, ratio, 0.0): 2 for name in ("digits", "signs") for attack in ("badnets", "blended")
                for ratio in (0.1, 0.05)}
    assert counts == Counter({**ordinary, ("digits", None, 0.0, 0.0): 3, ("digits", None, 0.0, 4.0): 1,
                              ("digits", "blended", 0.1, 4.0): 1})
    assert len({job.name for job in made}) == len({job.seed for job in made}) == len(made)
    assert {job.name for job in made if job.victim.radius} == {"digits-adversarial-clean-0",
                                                              "digits-adversarial-blended-0.1-0"}


def test_settings_reach_their_jobs(write):
    made = {job.name: job for job in jobs(read_recipe(write(TEXT)))}
    assert made["digits-badnets-0.05-1"].parameters == {"size": 2} and made["digits-clean-0"].parameters == {}
    assert made["signs-badnets-0.1-0"].victim == VictimConfig(widths=(2, 4, 4, 8), rate=0.1, epochs=7)
    assert made["digits-adversarial-clean-0"].floor_accuracy == 0.5 and made["digits-clean-0"].floor_accuracy == 0.9


def test_the_sets_take_turns_and_clean_alternates_with_attacked(write):
    made = jobs(read_recipe(write(TEXT)))
    assert [job.set_name for job in made[:4]] == ["digits", "signs", "digits", "signs"]
    digits = [job.attack is None for job in made if job.set_name == "digits"]
    assert digits[:6] == [True, False] * 3


def test_a_job_keeps_its_seed_when_the_recipe_grows():
    plan = SetPlan("digits", clean=2)
    small, large = (jobs(Recipe((plan,), attacks)) for attacks in (("badnets",), ("blended", "badnets")))
    assert {job.name: job.seed for job in small}.items() <= {job.name: job.seed for job in large}.items()
    assert {job.seed for job in small}.isdisjoint(job.seed for job in jobs(Recipe((plan,), ("badnets",), seed=1)))


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_recipes_are_read(name):
    made = jobs(read_recipe(name))
    assert len(made) >= {"tiny": 16, "half": 50, "cpu": 40, "contest": 60}[name]
    assert len({job.attack for job in made if job.attack}) >= {"tiny": 5, "half": 8, "cpu": 8, "contest": 8}[name]
    assert {job.attack is None for job in made if job.victim.radius} == {True, False}
    if name != "tiny":
        assert {job.set_name for job in made} == {"cifar10", "mnist", "gtsrb32"}
    if name == "contest":
        assert {job.ratio for job in made if job.attack} == {0.1, 0.05, 0.01}
        assert {job.victim.widths for job in made} == {(64, 128, 256, 512)}


@pytest.mark.parametrize("text, message", [
    ("attacks = [", "recipe.toml: expected a recipe, found"),
    ("attacks = []", r"recipe.toml: sets: expected at least one \[\[sets\]\], found \[\]"),
    ("[[sets]]\nsize = 8", "recipe.toml: expected a recipe, found .*name"),
    ("[[sets]]\nname = 'a'\ncolour = 1", "recipe.toml: sets: expected some of name, .*, found colour"),
    ("[[sets]]\nname = 'a'\nclean = '3'", "recipe.toml: sets clean: expected int, found 3"),
    ("[[sets]]\nname = 'a'\nclean = true", "recipe.toml: sets clean: expected int, found True"),
    ("[[sets]]\nname = 'a'\nvictim = { epoch = 3 }", "recipe.toml: victim: expected some of .*epochs.*, found epoch"),
    ("attacks = ['foo']\n[[sets]]\nname = 'a'", "recipe.toml: recipe: attacks: expected one of badnets, .*found foo"),
    ("[parameters.badnets]\nsides = 3\n[[sets]]\nname = 'a'",
     "recipe.toml: recipe: attacks badnets: expected some of size, value, found sides"),
    ("[parameters.badnets]\nsize = '3'\n[[sets]]\nname = 'a'",
     "recipe.toml: recipe: attacks badnets: expected settings of the right types, found size = '3', 'str' instead of"),
    ("attacks = ['ssba']\n[parameters.ssba]\nbits = 1.5\n[[sets]]\nname = 'a'",
     "recipe.toml: recipe: attacks ssba: expected settings of the right types, found bits = 1.5, 'float' instead of"),
    ("ratios = 0.1\n[[sets]]\nname = 'a'", r"recipe.toml: recipe ratios: expected list\[float, ...\], found 0.1"),
    ("parameters = 3\n[[sets]]\nname = 'a'", "recipe.toml: recipe parameters: expected Mapping.*, found 3"),
    ("[[sets]]\nname = 'a'\nvictim = 3", "recipe.toml: sets victim: expected a table, found 3"),
    ("victim = 3\n[[sets]]\nname = 'a'", "recipe.toml: victim: expected a table, found 3"),
    ("sets = [3]", "recipe.toml: sets: expected a table, found 3"),
    ("[[sets]]\nname = 'a'", "recipe.toml: recipe: expected at least one model, found neither clean models nor"),
    ("ratios = [0.0]\n[[sets]]\nname = 'a'", r"recipe.toml: recipe: ratios: expected in \(0, 1\], found 0.0"),
    ("repeats = 0\n[[sets]]\nname = 'a'", "recipe.toml: recipe: repeats: expected > 0, found 0"),
    ("[[sets]]\nname = 'a'\n[[sets]]\nname = 'a'", "recipe.toml: recipe: sets: expected different names, at least one"),
    ("[[sets]]\nname = 'a'\nfloor_success = 90.0", r"recipe.toml: set a: floors: expected in \[0, 1\], found 90.0"),
    ("[[sets]]\nname = 'a'\nclean = -1", r"recipe.toml: set a: clean, images: expected >= 0, found \(-1, 0, 0\)"),
    ("[[sets]]\nname = 'a'\nsize = 4", "recipe.toml: set a: size: expected >= 8 pixels, found 4"),
    ("[[sets]]\nname = 'a'\nradius = 0.0", "recipe.toml: set a: radius: expected > 0 grey levels, found 0.0"),
])
def test_what_is_wrong_with_a_recipe_is_named(write, refuses, text, message):
    with refuses(message):
        read_recipe(write(text))


def test_a_recipe_that_does_not_exist_is_named(refuses):
    with refuses("recipe: expected a TOML file or one of tiny, half, cpu, contest, found nope"):
        read_recipe("nope")


def test_some_attacks_have_further_ratios(tmp_path, refuses):
    path = tmp_path / "few.toml"
    text = 'attacks = ["sig", "badnets"]\nratios = [0.1]\nrepeats = 2\n[further]\nsig = [0.05, 0.01]\n' \
           '[[sets]]\nname = "digits"\nsize = 16\n'
    path.write_text(text)
    names = [job.name for job in jobs(read_recipe(str(path)))]
    kinds = ("sig-0.1", "badnets-0.1", "sig-0.05", "sig-0.01")
    assert names == [f"digits-{kind}-{i}" for i in (0, 1) for kind in kinds]
    for wrong, found in (("blended = [0.05]", "further: expected some of sig, badnets, found blended"),
                         ("sig = [0.1]", r"further sig: expected a list of shares .* not in ratios, found \[0.1\]"),
                         ("sig = 0.05", "further sig: expected a list of shares .*, found 0.05")):
        path.write_text(text.replace("sig = [0.05, 0.01]", wrong))
        with refuses(found):
            read_recipe(str(path))
