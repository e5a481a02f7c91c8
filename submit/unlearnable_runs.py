"""Runs of countermeasures to unlearnable examples: each (set, attack, ratio, seed, countermeasure) is one unit.

A unit is a victim trained on what the countermeasure made of the poisoned training set, and its accuracy on clean test
images. Poisoned sets, purified sets that took long, and units are kept in one folder, each named by the hash of the
set, the settings and the code that decide it: found again where none of these changed, made anew where one did.
"""
from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from data import resnet, victims
from data.devices import chosen_device
from data.errors import InputError, expect
from data.files import fingerprint
from data.image_sets import ImageSet
from data.resnet import new_resnet
from data.unlearnable import UNLEARNABLE, unlearnable_config
from data.victims import VictimConfig, clean_accuracy, train_victim
from data.zoo_recipes import SetPlan
from defense.countermeasures import COUNTERMEASURES, countermeasure_config, purify
from defense.purified import Purified
from submit.engines import Engine, each
from submit.kept_units import as_json, code_of_modules, equal_sums, kept_unit
from submit.unlearnable_store import read_purified, read_set, remove_stages, write_purified, write_set
from submit.zoo_commands import SUBSET_SEED
from submit.zoo_commands import read_set as read_image_set

LONG = 10.0  # seconds of purifying from which on its result is kept: reading a large set back takes one or two
KEYS = frozenset({"accuracy", "failed", "seconds"})
NONE = ""    # for no attack and for no countermeasure
PACKAGES = ("data", "defense")
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class SetChoice:
    """An image set and how much of it. images: of the training set in all, per_class: of each class; 0 = all."""

    name: str
    size: int = 0  # pixels a side; 0 = 16 for the built-in digits, else 32
    images: int = 0
    per_class: int = 0
    data: Path | None = None  # folder that holds the set; None = built in

    def __post_init__(self) -> None:
        expect(self.size == 0 or self.size >= 8, "size", "pixels >= 8, or 0 for the usual", self.size)
        expect(min(self.images, self.per_class) >= 0, "images, per_class", "numbers >= 0",
               (self.images, self.per_class))
        expect(not (self.images and self.per_class), "images, per_class", "one of them at most",
               (self.images, self.per_class))


@dataclass(frozen=True)
class Halves:
    """The training and the test set, on the CPU, and a name of all that each holds."""

    train: ImageSet
    test: ImageSet
    train_key: str
    test_key: str


@dataclass(frozen=True)
class Poisoning:
    """An attack as it is run, or none. label: its name in the tables. The attack draws from `seed` itself."""

    label: str
    method: str
    settings: Mapping[str, Any]
    ratio: float
    seed: int

    def key(self, halves: Halves) -> str:
        if self.method == NONE:
            return halves.train_key
        config = unlearnable_config(self.method, self.settings, "attack")
        return fingerprint(halves.train_key, self.method, repr(config), self.ratio, self.seed,
                           _code(UNLEARNABLE[self.method][0]))


@dataclass(frozen=True)
class Trial:
    """A countermeasure, or none, against a poisoning, or none."""

    poisoning: Poisoning
    label: str
    method: str
    settings: Mapping[str, Any]

    @property
    def countermeasure_seed(self) -> int:
        return own_seed(self.poisoning.seed, "countermeasure")

    def purified_key(self, halves: Halves) -> str:
        if self.method == NONE:
            return self.poisoning.key(halves)
        config = countermeasure_config(self.method, self.settings, "countermeasure")
        return fingerprint(self.poisoning.key(halves), self.method, repr(config), self.countermeasure_seed,
                           _code(COUNTERMEASURES[self.method][0]))

    def key(self, halves: Halves, victim: VictimConfig) -> str:
        return fingerprint(self.purified_key(halves), repr(victim), halves.test_key, self.poisoning.seed,
                           _code(victims, resnet), Path(__file__))


@dataclass(frozen=True)
class Ground:
    """What all trials of a run share. out: folder of what is kept."""

    chosen: SetChoice
    victim: VictimConfig
    out: Path

    def halves(self) -> Halves:
        """Read once a process."""
        return _halves(self.chosen)

    def poisoned_file(self, poisoning: Poisoning) -> Path:
        return self.out / "poisoned" / f"{poisoning.key(self.halves())}.safetensors"

    def unit_file(self, trial: Trial) -> Path:
        return self.out / "units" / f"{trial.key(self.halves(), self.victim)}.json"


@lru_cache
def _code(*modules: ModuleType) -> str:
    return code_of_modules(*modules, packages=PACKAGES)


@lru_cache(maxsize=1)
def _halves(chosen: SetChoice) -> Halves:
    size = chosen.size or (16 if chosen.name == "digits" else 32)
    train, test = read_image_set(SetPlan(chosen.name, size=size, images=chosen.images), chosen.data)
    if chosen.per_class:
        train = _few_of_each(train, chosen.per_class)
    return Halves(train, test, _digest(train), _digest(test))


def _few_of_each(train: ImageSet, count: int) -> ImageSet:
    """`count` images of every class, drawn once and for all."""
    smallest = int(torch.bincount(train.labels, minlength=train.num_classes).min())
    expect(count <= smallest, "per_class", f"at most {smallest}, as many as the smallest class of {train.name} has",
           count)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(SUBSET_SEED))
    drawn = [order[train.labels[order] == k][:count] for k in range(train.num_classes)]
    return train.subset(torch.cat(drawn).sort().values)


def _digest(part: ImageSet) -> str:
    content = (hashlib.sha256(tensor.contiguous().numpy()).hexdigest() for tensor in (part.images, part.labels))
    return fingerprint(tuple(part.images.shape), part.num_classes, *content)


def run_trials(trials: Sequence[Trial], ground: Ground, *, engine: Engine, report: Report,
               poisoned: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every trial's unit, in their order; `report` gets each as it is done. First the poisoned sets that they lack are
    made, all of them; `poisoned` gets a line on each.

    On the device that KIT_DEVICE says. engine: where it is done, a poisoned set and then a trial a worker.
    """
    refused = _keep_all_poisoned(trials, ground, engine, poisoned)
    units = {i: _no_unit(trial, ground, refused[ground.poisoned_file(trial.poisoning)])
             for i, trial in enumerate(trials) if ground.poisoned_file(trial.poisoning) in refused}
    for unit in units.values():
        report(unit)
    able = [i for i in range(len(trials)) if i not in units]
    for position, unit in each(partial(trial_unit, ground=ground), [trials[i] for i in able], engine):
        units[able[position]] = unit
        report(unit)
    return [units[i] for i in range(len(trials))]


def _keep_all_poisoned(trials: Sequence[Trial], ground: Ground, engine: Engine, poisoned: Callable[[str], None]
                       ) -> dict[Path, str]:
    """Write the poisoned sets that unfinished trials lack; of those that cannot be made, file and reason."""
    wanted = {ground.poisoned_file(trial.poisoning): trial.poisoning for trial in trials
              if trial.poisoning.method and not ground.unit_file(trial).exists()}
    lacking, refused = [(path, poisoning) for path, poisoning in wanted.items() if not path.exists()], {}
    work = [poisoning for _, poisoning in lacking]
    for i, (seconds, problem) in each(partial(keep_poisoned, ground=ground), work, engine):
        if problem:
            refused[lacking[i][0]] = problem
        poisoned(f"{_named(work[i])}: {f'refused: {problem}' if problem else f'poisoned in {seconds:.0f} s'}")
    return refused


def _named(poisoning: Poisoning) -> str:
    return f"{poisoning.label}, ratio {poisoning.ratio:g}, seed {poisoning.seed}"


def keep_poisoned(poisoning: Poisoning, *, ground: Ground) -> tuple[float, str]:
    """Make and write the poisoned set, unless it is there: (seconds, why there is none)."""
    start, train, path = time.perf_counter(), ground.halves().train, ground.poisoned_file(poisoning)
    if read_set(path, train.images.shape) is None:
        config = unlearnable_config(poisoning.method, poisoning.settings, "attack")
        device = chosen_device()
        try:
            with equal_sums(device):
                found = UNLEARNABLE[poisoning.method][0].poison(train.to(device), config, ratio=poisoning.ratio,
                                                                seed=poisoning.seed)
        except InputError as refusal:
            return time.perf_counter() - start, str(refusal)
        write_set(path, found.images, {"seconds": time.perf_counter() - start})
    return time.perf_counter() - start, ""


def trial_unit(trial: Trial, *, ground: Ground) -> dict[str, Any]:
    """The trial's unit, found or measured. One that could not be measured is not kept; `failed` says why."""
    try:
        found = kept_unit(ground.unit_file(trial), KEYS, lambda: _measured(trial, ground))
    except InputError as problem:
        return _no_unit(trial, ground, str(problem))
    return {**found, **_labels(trial)}  # one method may stand under several names


def _labels(trial: Trial) -> dict[str, Any]:
    return {"attack": trial.poisoning.label, "defense": trial.label}


def _asked(trial: Trial, ground: Ground) -> dict[str, Any]:
    poisoning = trial.poisoning
    return {"set": ground.chosen.name, "images": len(ground.halves().train.images), **_labels(trial),
            "attack_method": poisoning.method, "attack_settings": dict(poisoning.settings), "ratio": poisoning.ratio,
            "seed": poisoning.seed, "method": trial.method, "settings": dict(trial.settings)}


def _no_unit(trial: Trial, ground: Ground, why: str) -> dict[str, Any]:
    return {**_asked(trial, ground), "accuracy": None, "failed": why, "complete": False, "seconds": 0.0}


def _measured(trial: Trial, ground: Ground) -> dict[str, Any]:
    """Purify, train, test. Where the countermeasure failed, the victim sees the images as they were."""
    halves, device = ground.halves(), chosen_device()
    with equal_sums(device):
        labels = halves.train.labels.to(device)
        found = _purified(trial, ground, _poisoned_images(trial.poisoning, ground).to(device), labels)
        start = time.perf_counter()
        accuracy = victim_accuracy(found, labels, halves.test.to(device), ground.victim,
                                   seed=own_seed(trial.poisoning.seed, "victim"))
    training = time.perf_counter() - start
    return {**_asked(trial, ground), "accuracy": accuracy, "failed": found.failed, "complete": found.complete,
            "seconds": round(found.seconds + training, 3), "purifying_seconds": round(found.seconds, 3),
            "device": device.type, "losses": as_json(found.losses), "details": as_json(found.details)}


def _poisoned_images(poisoning: Poisoning, ground: Ground) -> Tensor:
    train = ground.halves().train
    if poisoning.method == NONE:
        return train.images
    path = ground.poisoned_file(poisoning)
    found = read_set(path, train.images.shape)
    if found is None:  # spoiled since it was written
        _, problem = keep_poisoned(poisoning, ground=ground)
        found = read_set(path, train.images.shape)
        expect(found, _named(poisoning), "a poisoned set", problem or f"none in {path}")
    return found[0]


def _purified(trial: Trial, ground: Ground, images: Tensor, labels: Tensor) -> Purified:
    """What the countermeasure makes of the images, found where it took long before. Stages of one that was stopped lie
    beside the sets until this one is there."""
    if trial.method == NONE:
        return Purified(NONE, images)
    path = ground.out / "purified" / f"{trial.purified_key(ground.halves())}.safetensors"
    found, stages = read_purified(path, images), path.with_suffix(".stages")
    if found is None:
        generator = torch.Generator().manual_seed(trial.countermeasure_seed)
        try:
            found = purify(trial.method, images, labels, trial.settings, generator=generator, kept=stages)
        except InputError as refusal:
            return Purified(trial.method, images, complete=False, failed=str(refusal))
        if found.seconds >= LONG and found.harden is None:
            write_purified(path, found)
    remove_stages(stages)
    return found


def victim_accuracy(found: Purified, labels: Tensor, test: ImageSet, config: VictimConfig, *, seed: int) -> float:
    """Share in [0, 1] of the clean test images that a ResNet18 trained on what was purified gets right, after its last
    epoch. labels: (N,), on the device of the images, as `test` is."""
    model = train_victim(found.images, labels, test.num_classes, config, seed=seed, network=new_resnet,
                         harden=found.harden)
    return clean_accuracy(model, test, config)


def own_seed(seed: int, purpose: str) -> int:
    """A seed for this purpose alone: a defender's draws have nothing of the attacker's."""
    return zlib.crc32(f"{seed} {purpose}".encode())
