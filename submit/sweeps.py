"""Sweeps: victims x defenses x shares of clean images x seeds from a TOML recipe, and the tables of their units.

A recipe names the recipe of its victims (sets x attacks x ratios x repeats, `data/zoo_recipes.py`) and a table a
defense; its key is the row's name, `method` the defense where that is another, the rest settings.
"""
from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from data.errors import InputError, expect
from data.model_zoo import ZooModel
from data.toml_files import read_toml
from data.zoo_building import build_zoo
from data.zoo_recipes import BUILT_IN, Recipe, jobs, read_recipe
from defense.defenses import defense_config
from submit.defense_runs import Plan
from submit.engines import Engine, each
from submit.zoo_commands import RecipeSets
from submit.zoo_victims import backdoored_samples

METRICS = ("ACC", "ASR", "RA", "DER")
ONE_OF = {"defenses": "a defense", "attacks": "an attack"}
NONE = "no defense"


@dataclass(frozen=True)
class Sweep:
    """victims: the recipe of the networks. defenses: by label, each a table of settings and perhaps its `method`."""

    victims: Recipe
    defenses: Mapping[str, Mapping[str, Any]]
    clean: tuple[float, ...] = (0.05,)  # shares of the training images
    seeds: tuple[int, ...] = (0,)       # of the clean images drawn and of the defense, each on every victim

    def __post_init__(self) -> None:
        check_methods("defenses", self.defenses, defense_config)
        expect(self.clean, "clean", "at least one share", "none")
        for share in self.clean:
            check_share("clean", share)
        check_seeds(self.seeds)

    def plans(self) -> list[Plan]:
        """Every defense, share and seed, as they are run on each victim."""
        return [Plan(label, *method_of(label, table), share, seed)
                for seed in self.seeds for share in self.clean for label, table in self.defenses.items()]


def check_methods(kind: str, tables: Mapping[str, Any], config: Callable[[str, Mapping[str, Any], str], Any]) -> None:
    """InputError unless there is a table at least, and `config` takes the method and the settings of each."""
    expect(tables, kind, f"at least one [{kind}.NAME]", "none")
    for label, table in tables.items():
        where = f"{kind} {label}"
        expect(isinstance(table, Mapping), where, "a table", table)
        method, settings = method_of(label, table)
        expect(isinstance(method, str), f"{where} method", f"the name of {ONE_OF[kind]}", method)
        config(method, settings, where)


def check_share(where: str, share: Any) -> None:
    number = isinstance(share, (int, float)) and not isinstance(share, bool)
    expect(number and 0 < share <= 1, where, "shares in (0, 1]", share)


def check_seeds(seeds: Sequence[Any]) -> None:
    whole = all(type(seed) is int and seed >= 0 for seed in seeds)
    expect(seeds and whole, "seeds", "whole numbers >= 0", list(seeds))


def method_of(label: str, table: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The method of a row's table, its own name where it names none, and the settings."""
    return table.get("method", label), {key: value for key, value in table.items() if key != "method"}


def read_sweep(path: Path) -> Sweep:
    """The sweep in the TOML file `path`; `victims` is a built-in recipe or a file, relative to `path`'s folder."""
    content = read_content(path)
    with named(path):
        check_keys(content, Sweep)
        lists = {key: tuple(typed(content, key, list)) for key in ("clean", "seeds") if key in content}
        return Sweep(_victims(typed(content, "victims", str), path.parent), typed(content, "defenses", dict), **lists)


def read_content(path: Path) -> dict[str, Any]:
    """The tables of a sweep's file."""
    expect(path.is_file(), "sweep", "a TOML file as in defense/sweeps", path)
    return read_toml(path, "a sweep")


@contextmanager
def named(path: Path) -> Iterator[None]:
    """What is wrong in here is wrong in the file `path`, and said so."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def check_keys(content: Mapping[str, Any], kind: type) -> None:
    """InputError where a key is no field of the dataclass `kind`."""
    known = [part.name for part in fields(kind)]
    for key in content:
        expect(key in known, "sweep", f"some of {', '.join(known)}", key)


def typed(content: Mapping[str, Any], key: str, kind: type) -> Any:
    """The value of `key`, which has to be of this kind."""
    kinds = {list: "a list", dict: f"a table [{key}.NAME] each", str: "a text", int: "a whole number",
             bool: "true or false"}
    value = content.get(key, "nothing")
    expect(key in content and type(value) is kind, key, kinds[kind], value)
    return value


def _victims(name: str, folder: Path) -> Recipe:
    recipe = read_recipe(name if name in BUILT_IN else str(folder / name))
    expect(recipe.attacks or any(plan.adversarial_attacks for plan in recipe.sets), "victims",
           "a recipe with attacks", name)
    return recipe


def built_victims(recipe: Recipe, data: Path | None, out: Path, *, engine: Engine,
                  progress: Callable[[str, dict[str, Any]], None]) -> tuple[list[ZooModel], list[InputError]]:
    """The recipe's backdoored networks, trained where `out`/victims lacks them; clean ones are not needed."""
    work = [job for job in jobs(recipe) if job.attack]
    build_zoo(out / "victims", work, RecipeSets(recipe.sets, data), in_turn=partial(each, engine=engine),
              progress=progress, triggers=out / "triggers")
    return backdoored_samples(out / "victims")


def summaries(units: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A table for each (set, poison ratio, share of clean images): rows of mean and standard deviation, in percent.

    A row's `all` averages over attacks first, so that each attack counts alike, and its deviation is that between
    rounds (repeat of the victim and seed of the defense); under `attacks` that between the runs of one attack.
    Failed runs count as what they give back: the network unrepaired.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for unit in units:
        groups.setdefault((unit["set"], unit["ratio"], unit["clean"]), []).append(unit)
    return [{"set": key[0], "ratio": key[1], "clean": key[2], "rows": _rows(members)}
            for key, members in groups.items()]


def _rows(units: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    before = {(unit["victim"], unit["seed"]): {**unit, "defense": NONE, "after": unit["before"], "DER": 0.5,
                                               "failed": "", "seconds": 0.0} for unit in units}
    labels = list(dict.fromkeys(unit["defense"] for unit in units))
    return [_row(label, [unit for unit in (*before.values(), *units) if unit["defense"] == label])
            for label in (NONE, *labels)]


def _row(label: str, units: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by_attack: dict[str, list[Mapping[str, Any]]] = {}
    for unit in units:
        by_attack.setdefault(unit["attack"], []).append(unit)
    whole = {metric: over_attacks({attack: [(_round(unit), _percent(unit, metric)) for unit in part]
                                   for attack, part in by_attack.items()}) for metric in METRICS}
    return {"defense": label, "runs": len(units), "failed": sum(bool(unit["failed"]) for unit in units),
            "seconds": statistics.fmean(unit["seconds"] for unit in units), "all": whole,
            "attacks": {attack: {metric: spread([_percent(unit, metric) for unit in part]) for metric in METRICS}
                        for attack, part in by_attack.items()}}


def _round(unit: Mapping[str, Any]) -> tuple[str, int]:
    """Repeat of the victim and seed of the defense."""
    return unit["victim"].rsplit("-", 1)[-1], unit["seed"]


def _percent(unit: Mapping[str, Any], metric: str) -> float:
    """A metric after the defense."""
    return 100 * (unit["DER"] if metric == "DER" else unit["after"][metric])


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; of a single value the latter is None."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def over_attacks(values: Mapping[str, Sequence[tuple[Hashable, float]]]) -> dict[str, float | None]:
    """The mean over attacks of (round, value) pairs, each attack counting alike, and the standard deviation between
    the means of the rounds that have a value of every attack."""
    rounds: dict[Hashable, list[float]] = {}
    for which, value in (pair for part in values.values() for pair in part):
        rounds.setdefault(which, []).append(value)
    mean = statistics.fmean(statistics.fmean(value for _, value in part) for part in values.values())
    means = [statistics.fmean(part) for part in rounds.values() if len(part) == len(values)]
    return {"mean": mean, "std": spread(means)["std"] if means else None}
