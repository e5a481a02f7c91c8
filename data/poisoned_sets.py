"""Training sets in which a share of the images carries a trigger and the attacker's label (all-to-one).

An attack is one module with a frozen config and two functions: `apply_trigger(images, config)`, used alike
for training and at test time, and `poison(clean, config, *, ratio, target, seed)`, which returns a PoisonedSet.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.errors import expect
from data.image_sets import ImageSet


@dataclass(frozen=True)
class PoisonedSet:
    """A poisoned training set and how it came about.

    images: (N, C, H, W) uint8; labels: (N,) int64; poisoned: (P,) int64, ascending positions of the
    triggered images. trigger: what the attacker does to an image at test time, uint8 to uint8.
    """

    images: Tensor
    labels: Tensor
    poisoned: Tensor
    num_classes: int
    attack: str
    parameters: dict[str, Any]
    target: int
    seed: int
    trigger: Callable[[Tensor], Tensor]


def poison_any_class(clean: ImageSet, trigger: Callable[[Tensor], Tensor], attack: str,
                     parameters: dict[str, Any], *, ratio: float, target: int, seed: int) -> PoisonedSet:
    """Trigger round(ratio * N) images drawn from all classes, the target's included, and label them `target`.

    ratio: share of the whole training set, in (0, 1].
    """
    expect(0 < ratio <= 1, "ratio", "in (0, 1]", ratio)
    expect(0 <= target < clean.num_classes, "target", f"in [0, {clean.num_classes})", target)
    count = round(ratio * len(clean.images))
    expect(count > 0, "ratio", f"at least one of {len(clean.images)} images", ratio)
    order = torch.randperm(len(clean.images), generator=torch.Generator().manual_seed(seed))
    poisoned = order[:count].sort().values.to(clean.images.device)
    images, labels = clean.images.clone(), clean.labels.clone()
    images[poisoned] = trigger(images[poisoned])
    labels[poisoned] = target
    return PoisonedSet(images, labels, poisoned, clean.num_classes, attack, parameters, target, seed, trigger)


def check_images(images: Tensor) -> None:
    """What every trigger is applied to: (N, C, H, W) uint8."""
    expect(images.ndim == 4 and images.dtype == torch.uint8, "images", "(N, C, H, W) uint8",
           f"{tuple(images.shape)} {images.dtype}")
