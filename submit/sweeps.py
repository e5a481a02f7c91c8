"""Sweeps: victims x defenses x shares of clean images x seeds from a TOML recipe, and the tables of their units.

A recipe names the recipe of its victims (sets x attacks x ratios x repeats, `data/zoo_recipes.py`) and a table a
defense; its key is the row's name, `method` the defense where that is another, the rest settings.
"""
from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError, expect
from data.model_zoo import ZooModel
from data.toml_files import read_toml
from data.zoo_building import build_zoo
from data.zoo_recipes import BUILT_IN, Recipe, jobs, read_recipe
from defense.defenses import defense_config
from submit.defense_runs import Plan
from submit.zoo_commands import read_set
from submit.zoo_victims import backdoored_samples

METRICS = ("ACC", "ASR", "RA", "DER")
NONE = "no defense"


@dataclass(frozen=True)
class Sweep:
    """victims: the recipe of the networks. defenses: by label, each a table of settings and perhaps its `method`."""

    victims: Recipe
    defenses: Mapping[str, Mapping[str, Any]]
    clean: tuple[float, ...] = (0.05,)  # shares of the training images
    seeds: tuple[int, ...] = (0,)       # of the clean images drawn and of the defense, each on every victim

    def __post_init__(self) -> None:
        expect(self.defenses, "defenses", "at least one [defenses.NAME]", "none")
        for label, table in self.defenses.items():
            expect(isinstance(table, Mapping), f"defenses {label}", "a table", table)
            defense_config(*_method(label, table), f"defenses {label}")
        expect(self.clean, "clean", "at least one share", "none")
        for share in self.clean:
            number = isinstance(share, (int, float)) and not isinstance(share, bool)
            expect(number and 0 < share <= 1, "clean", "shares in (0, 1]", share)
        whole = all(type(seed) is int and seed >= 0 for seed in self.seeds)
        expect(self.seeds and whole, "seeds", "whole numbers >= 0", list(self.seeds))

    def plans(self) -> list[Plan]:
        """Every defense, share and seed, as they are run on each victim."""
        return [Plan(label, *_method(label, table), share, seed)
                for seed in self.seeds for share in self.clean for label, table in self.defenses.items()]


def _method(label: str, table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    method = table.get("method", label)
    expect(isinstance(method, str), f"defenses {label} method", "the name of a defense", method)
    return method, {key: value for key, value in table.items() if key != "method"}


def read_sweep(path: Path) -> Sweep:
    """The sweep in the TOML file `path`; `victims` is a built-in recipe or a file, relative to `path`'s folder."""
    expect(path.is_file(), "sweep", "a TOML file as in defense/sweeps", path)
    content = read_toml(path, "a sweep")
    try:
        known = [part.name for part in fields(Sweep)]
        for key in content:
            expect(key in known, "sweep", f"some of {', '.join(known)}", key)
        lists = {key: tuple(_typed(content, key, list)) for key in ("clean", "seeds") if key in content}
        return Sweep(_victims(_typed(content, "victims", str), path.parent), _typed(content, "defenses", dict),
                     **lists)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _typed(content: Mapping[str, Any], key: str, kind: type) -> Any:
    kinds = {list: "a list", dict: "a table [defenses.NAME] each", str: "a text"}
    expect(isinstance(content.get(key), kind), key, kinds[kind], content.get(key, "nothing"))
    return content[key]


def _victims(name: str, folder: Path) -> Recipe:
    recipe = read_recipe(name if name in BUILT_IN else str(folder / name))
    expect(recipe.attacks or any(plan.adversarial_attacks for plan in recipe.sets), "victims",
           "a recipe with attacks", name)
    return recipe


def built_victims(recipe: Recipe, data: Path | None, out: Path, *, device: torch.device, workers: int,
                  progress: Callable[[str, dict[str, Any]], None]) -> tuple[list[ZooModel], list[InputError]]:
    """The recipe's backdoored networks, trained where `out`/victims lacks them; clean ones are not needed."""
    work = [job for job in jobs(recipe) if job.attack]
    sets = {plan.name: read_set(plan, data) for plan in recipe.sets}
    build_zoo(out / "victims", work, sets, device=device, workers=workers, progress=progress,
              triggers=out / "triggers")
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
    attacks = list(dict.fromkeys(unit["attack"] for unit in units))
    by_attack = {attack: [unit for unit in units if unit["attack"] == attack] for attack in attacks}
    rounds: dict[tuple, list[Mapping[str, Any]]] = {}
    for unit in units:
        rounds.setdefault((unit["victim"].rsplit("-", 1)[-1], unit["seed"]), []).append(unit)
    whole = {}
    for metric in METRICS:
        mean = statistics.fmean(_spread(part, metric)["mean"] for part in by_attack.values())
        means = [_spread(part, metric)["mean"] for part in rounds.values() if len(part) == len(attacks)]
        whole[metric] = {"mean": mean, "std": statistics.stdev(means) if len(means) > 1 else None}
    return {"defense": label, "runs": len(units), "failed": sum(bool(unit["failed"]) for unit in units),
            "seconds": statistics.fmean(unit["seconds"] for unit in units), "all": whole,
            "attacks": {attack: {metric: _spread(part, metric) for metric in METRICS}
                        for attack, part in by_attack.items()}}


def _spread(units: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float | None]:
    """Mean and sample standard deviation of a metric after the defense, in percent."""
    values = [100 * (unit["DER"] if metric == "DER" else unit["after"][metric]) for unit in units]
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
