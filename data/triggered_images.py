"""A set's test images under a victim's trigger, kept in a file: some triggers take minutes of training to make again.

The trigger is remade by the code that poisoned the training set, from what the victim's record says; equal set,
attack and seed give equal images on one machine.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.attacks import attack_config, poison
from data.errors import InputError, expect
from data.files import fingerprint, npy_bytes, write_atomic
from data.image_sets import ImageSet


@dataclass(frozen=True)
class TriggerPlan:
    """What made a victim's trigger. parameters: of the attack's config; those not named have its defaults."""

    attack: str
    parameters: Mapping[str, Any]
    ratio: float
    target: int
    seed: int

    def key(self, train: ImageSet, test: ImageSet) -> str:
        """Name of the triggered test images: equal plan and sets, equal name."""
        config = attack_config(self.attack, self.parameters, "attack")
        return fingerprint(self.attack, asdict(config), self.ratio, self.target, self.seed,
                           *(_digest(part) for half in (train, test) for part in (half.images, half.labels)))


def _digest(part: Tensor) -> str:
    return hashlib.sha256(repr(tuple(part.shape)).encode() + part.cpu().contiguous().numpy().tobytes()).hexdigest()


def keep_triggered(folder: Path, plan: TriggerPlan, train: ImageSet, test: ImageSet,
                   trigger: Callable[[Tensor], Tensor]) -> Tensor:
    """(N, C, H, W) uint8: all test images triggered, the target's own class included; written to `folder`."""
    triggered = trigger(test.images)
    write_atomic(folder / f"{plan.key(train, test)}.npy", npy_bytes(triggered.cpu().numpy()))
    return triggered


def triggered_images(folder: Path, plan: TriggerPlan, train: ImageSet, test: ImageSet) -> Tensor:
    """The kept images of this plan and these sets, on the set's device; remade and kept where there are none."""
    path = folder / f"{plan.key(train, test)}.npy"
    if path.exists():
        return _read(path, test).to(test.images.device)
    bad = poison(plan.attack, train, plan.parameters, ratio=plan.ratio, target=plan.target, seed=plan.seed)
    return keep_triggered(folder, plan, train, test, bad.trigger)


def _read(path: Path, test: ImageSet) -> Tensor:
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: expected an array of triggered images (delete the file), found {error}") from None
    shape = tuple(test.images.shape)
    expect(found.dtype == np.uint8 and found.shape == shape, path, f"{shape} uint8 (delete the file)",
           f"{found.shape} {found.dtype}")
    return torch.from_numpy(found)
