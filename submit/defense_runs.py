"""Runs of defenses over victims: each (victim, defense, share of clean images, seed) is one unit, written whole.

A unit's name is the hash of network, sets, trigger, settings and the code of its method, so it is found again where
none of these changed, and measured anew where one did.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from data.devices import chosen_device
from data.errors import InputError
from data.files import fingerprint
from data.model_zoo import ZooModel
from data.victims import normalise
from defense.defenses import DEFENSES, ORACLES, defend, defense_config
from defense.metrics import defense_effectiveness
from defense.oracle_pruning import OracleTest
from defense.training import Shift
from submit.dev_splits import ROOT
from submit.engines import Engine, each
from submit.kept_units import as_json, code_of_modules, equal_sums, kept_unit
from submit.zoo_victims import Victim, clean_part, measured, own_seed, read_victim

SHIFT = 1 / 16  # of the side, each way: augmentation that keeps the class of objects, digits and signs
ORACLE_IMAGES = 500  # test images that an oracle looks at: their ASR is within some two points of all
KEYS = frozenset({"victim", "before", "after", "DER", "failed"})
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """One defense as it is run. label: its name in the tables; clean: share of the training images it gets."""

    label: str
    method: str
    settings: Mapping[str, Any]
    clean: float
    seed: int

    def key(self, victim: Victim) -> str:
        config = defense_config(self.method, self.settings, "defense")
        return fingerprint(victim.name, victim.key, self.method, repr(config), self.clean, self.seed,
                           code_of(self.method))


@lru_cache
def code_of(method: str) -> str:
    """Names the code that decides what a unit is: the method's module, all of `defense/` that it imports, and the
    measuring itself. Read once a process: what runs is what was there at its start."""
    return fingerprint(code_of_modules(DEFENSES[method][0], packages=("defense",)), Path(__file__),
                       ROOT / "submit" / "zoo_victims.py")


def run_plans(samples: Sequence[ZooModel], plans: Sequence[Plan], data: Path | None, out: Path, *,
              engine: Engine, report: Report) -> Iterator[tuple[list[dict], InputError | None]]:
    """The units of one victim after the other, or why it has none; `report` gets every unit as it is done.

    Kept in `out`/units and `out`/triggers. engine: where it is done, a victim a worker, on the device that KIT_DEVICE
    says there.
    """
    work = partial(victim_units, plans=plans, data=data, out=out)
    if engine.name == "local" and min(engine.workers, len(samples)) < 2:
        for sample in samples:
            yield work(sample, report=report)
        return
    for _, (units, problem) in each(work, samples, engine):
        for unit in units:
            report(unit)
        yield units, problem


def victim_units(sample: ZooModel, *, plans: Sequence[Plan], data: Path | None, out: Path,
                 report: Report | None = None) -> tuple[list[dict], InputError | None]:
    """Every plan's unit of one network, found or measured; with one thread on a CPU, where sums must not depend on
    the machine."""
    device = chosen_device()
    try:
        with equal_sums(device):
            victim = read_victim(sample, data, out / "triggers", device=device)
            return [_unit(victim, plan, out / "units", report) for plan in plans], None
    except InputError as problem:
        return [], problem


def _unit(victim: Victim, plan: Plan, folder: Path, report: Report | None) -> dict[str, Any]:
    found = kept_unit(folder / f"{plan.key(victim)}.json", KEYS, lambda: run_plan(victim, plan))
    unit = {**found, "defense": plan.label}  # one method may stand under several names
    if report:
        report(unit)
    return unit


def run_plan(victim: Victim, plan: Plan) -> dict[str, Any]:
    """Repair a copy of the victim and measure what comes back. Where the repair failed, that is the network
    unrepaired, and `failed` says why; a network that the method refuses counts as failed too."""
    images, labels = clean_part(victim, plan.clean, plan.seed)
    generator = torch.Generator().manual_seed(own_seed(victim, plan.seed))
    shift = Shift(round(SHIFT * min(images.shape[-2:])))
    unit = {"victim": victim.name, **{key: victim.record[key] for key in ("set", "attack", "ratio", "target")},
            "defense": plan.label, "method": plan.method, "settings": dict(plan.settings), "clean": plan.clean,
            "clean_images": len(images), "seed": plan.seed, "before": dict(victim.before)}
    settings = dict(plan.settings) | ({"test": _oracle_test(victim)} if plan.method in ORACLES else {})
    try:
        found = defend(plan.method, victim.model.to(images.device), images, labels, settings,
                       generator=generator, augment=shift)
    except InputError as refusal:
        return {**unit, "after": dict(victim.before), "DER": 0.5, "failed": str(refusal), "finite": True,
                "complete": False, "seconds": 0.0}
    after = measured(found.model, victim.test, victim.triggered, victim.record["target"], victim.scale)
    rating = defense_effectiveness((victim.before["ACC"], victim.before["ASR"]), (after["ACC"], after["ASR"]))
    return {**unit, "after": after, "DER": rating, "failed": found.failed, "finite": found.finite,
            "complete": found.complete, "seconds": round(found.seconds, 3), "details": as_json(found.details)}


def _oracle_test(victim: Victim) -> OracleTest:
    """The first test images, clean and triggered: what only an oracle sees."""
    seen = slice(ORACLE_IMAGES)
    clean, triggered = (normalise(part[seen], victim.scale) for part in (victim.test.images, victim.triggered))
    return OracleTest(clean, victim.test.labels[seen], triggered, victim.record["target"])
