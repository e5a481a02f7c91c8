"""Recipes of model zoos: which networks to train on which sets under which attacks, read from TOML.

A recipe names image sets and multiplies each with attacks, poison ratios and repeats; beside them it asks for
clean models and for adversarially trained ones, clean and backdoored. `jobs` spells that out: one ZooJob a model.
"""
from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from data.attacks import attack_config
from data.errors import InputError, expect
from data.toml_files import read_toml
from data.victims import VictimConfig

FOLDER = Path(__file__).with_name("recipes")
BUILT_IN = ("tiny", "half", "cpu", "contest")
KINDS = {"int": int, "float": (int, float), "str": str, "bool": bool, "tuple": (list, tuple), "Mapping": dict}


@dataclass(frozen=True)
class SetPlan:
    """One image set of a recipe."""

    name: str                     # digits, mnist, or the name of an ImageFolder
    clean: int = 0                # ordinary clean models
    adversarial_clean: int = 0    # adversarially trained clean models
    adversarial_attacks: tuple[str, ...] = ()  # attacks that also meet an adversarially trained victim
    size: int = 32                # pixels a side
    images: int = 0               # of the training set, drawn once; 0 = all
    floor_accuracy: float = 0.9   # a model whose ACC is below is marked failed
    floor_success: float = 0.9    # likewise its ASR
    adversarial_floor: float = 0.0  # ACC floor of adversarially trained models; 0 = floor_accuracy
    radius: float = 8.0           # of their training, grey levels
    victim: VictimConfig = field(default_factory=VictimConfig)

    def __post_init__(self) -> None:
        expect(min(self.clean, self.adversarial_clean, self.images) >= 0, f"set {self.name}: clean, images", ">= 0",
               (self.clean, self.adversarial_clean, self.images))
        expect(self.size >= 8, f"set {self.name}: size", ">= 8 pixels", self.size)
        expect(self.radius > 0, f"set {self.name}: radius", "> 0 grey levels", self.radius)
        for floor in (self.floor_accuracy, self.floor_success, self.adversarial_floor):
            expect(0 <= floor <= 1, f"set {self.name}: floors", "in [0, 1]", floor)


@dataclass(frozen=True)
class Recipe:
    """sets x attacks x ratios x repeats, and what each SetPlan adds. parameters: of each attack's config."""

    sets: tuple[SetPlan, ...]
    attacks: tuple[str, ...]
    ratios: tuple[float, ...] = (0.1,)  # poisoned share of the training set
    repeats: int = 1                    # models of every attack and ratio, each with its own seed and target
    seed: int = 0
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    further: Mapping[str, Any] = field(default_factory=dict)  # by attack, a list of ratios that it alone also has

    def __post_init__(self) -> None:
        names = [plan.name for plan in self.sets]
        expect(names and len(set(names)) == len(names), "recipe: sets", "different names, at least one", names)
        expect(self.repeats > 0, "recipe: repeats", "> 0", self.repeats)
        for ratio in self.ratios:
            expect(0 < ratio <= 1, "recipe: ratios", "in (0, 1]", ratio)
        for name, more in self.further.items():
            expect(name in self.attacks, "recipe: further", f"some of {', '.join(self.attacks)}", name)
            fits = isinstance(more, (list, tuple)) and all(isinstance(r, float) and 0 < r <= 1 for r in more)
            expect(fits and not {*more} & {*self.ratios}, f"recipe: further {name}",
                   "a list of shares in (0, 1] that are not in ratios", more)
        for name in {*self.attacks, *self.parameters, *(a for plan in self.sets for a in plan.adversarial_attacks)}:
            attack_config(name, self.parameters.get(name, {}), "recipe: attacks")


@dataclass(frozen=True)
class ZooJob:
    """One model to train. attack None = clean. The name is its folder; equal jobs give equal weights."""

    name: str
    set_name: str
    attack: str | None
    parameters: Mapping[str, Any]
    ratio: float
    seed: int
    victim: VictimConfig
    floor_accuracy: float
    floor_success: float

    def settings(self) -> dict[str, Any]:
        """What decides the model's weights, as JSON values: everything but the floors."""
        every = {**asdict(self), "parameters": dict(self.parameters)}
        return {key: value for key, value in every.items() if not key.startswith("floor")}

    def failure(self, record: Mapping[str, Any]) -> str:
        """Why a model with these measured ACC and ASR does not count; empty where it does."""
        if record["ACC"] < self.floor_accuracy:
            return f"ACC {record['ACC']:.4f} below {self.floor_accuracy}"
        if record["ASR"] is not None and record["ASR"] < self.floor_success:
            return f"ASR {record['ASR']:.4f} below {self.floor_success}"
        return ""


def read_recipe(name: str) -> Recipe:
    """A built-in recipe by name, or the TOML file `name`. Unknown keys and wrong values are named."""
    path = FOLDER / f"{name}.toml" if name in BUILT_IN else Path(name)
    expect(path.is_file(), "recipe", f"a TOML file or one of {', '.join(BUILT_IN)}", name)
    content = read_toml(path, "a recipe")
    try:
        return _recipe(content)
    except TypeError as error:
        raise InputError(f"{path}: expected a recipe, found {error}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _recipe(content: dict[str, Any]) -> Recipe:
    shared = content.pop("victim", {})
    plans = content.pop("sets", [])
    expect(isinstance(plans, list) and plans, "sets", "at least one [[sets]]", plans)
    sets = tuple(_set_plan(plan, shared) for plan in plans)
    recipe = _from_table(Recipe, {"attacks": [], **content, "sets": sets}, "recipe")
    expect(jobs(recipe), "recipe", "at least one model", "neither clean models nor attacks")
    return recipe


def _set_plan(plan: Any, shared: Any) -> SetPlan:
    for table, where in ((plan, "sets"), (shared, "victim")):
        expect(isinstance(table, dict), where, "a table", table)
    own = plan.get("victim", {})
    expect(isinstance(own, dict), "sets victim", "a table", own)
    return _from_table(SetPlan, {**plan, "victim": _from_table(VictimConfig, {**shared, **own}, "victim")}, "sets")


def _from_table(kind: type, table: Mapping[str, Any], where: str) -> Any:
    """The dataclass `kind` from a TOML table: known keys only, lists as tuples, numbers as declared."""
    declared = {item.name: item.type for item in fields(kind)}
    for key, value in table.items():
        expect(key in declared, where, f"some of {', '.join(declared)}", key)
        wanted = KINDS.get(declared[key].split("[")[0])
        right = wanted is None or (isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool)))
        expect(right, f"{where} {key}", declared[key].replace("tuple", "list"), value)
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})


def jobs(recipe: Recipe) -> tuple[ZooJob, ...]:
    """Every model of the recipe; the sets take turns, so that a part of the zoo is a fair sample of it."""
    turns = [list(_jobs_of(plan, recipe)) for plan in recipe.sets]
    longest = max(map(len, turns))
    return tuple(turn[i] for i in range(longest) for turn in turns if i < len(turn))


def _jobs_of(plan: SetPlan, recipe: Recipe) -> Iterator[ZooJob]:
    """Clean and attacked models in turn, as far as both last."""
    clean = [_job(plan, recipe, None, 0.0, i, plan.victim) for i in range(plan.clean)]
    ratios = [(attack, ratio) for ratio in recipe.ratios for attack in recipe.attacks]
    ratios += [(attack, ratio) for attack, more in recipe.further.items() for ratio in more]
    attacked = [_job(plan, recipe, attack, ratio, i, plan.victim) for i in range(recipe.repeats)
                for attack, ratio in ratios]
    hard = replace(plan.victim, radius=plan.radius)
    clean += [_job(plan, recipe, None, 0.0, i, hard) for i in range(plan.adversarial_clean)]
    attacked += [_job(plan, recipe, attack, recipe.ratios[0], 0, hard) for attack in plan.adversarial_attacks]
    for i in range(max(len(clean), len(attacked))):
        yield from clean[i:i + 1]
        yield from attacked[i:i + 1]


def _job(plan: SetPlan, recipe: Recipe, attack: str | None, ratio: float, repeat: int, victim: VictimConfig) -> ZooJob:
    hard = ["adversarial"] if victim.radius else []
    kind = [attack, f"{ratio:g}"] if attack else ["clean"]
    name = "-".join([plan.name, *hard, *kind, str(repeat)])
    floor = plan.adversarial_floor if victim.radius and plan.adversarial_floor else plan.floor_accuracy
    seed = zlib.crc32(f"{recipe.seed} {name}".encode())  # its own, whatever else the recipe holds
    parameters = recipe.parameters.get(attack, {}) if attack else {}
    return ZooJob(name, plan.name, attack, parameters, ratio, seed, victim, floor, plan.floor_success)
