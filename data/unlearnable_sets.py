"""What the unlearnable-example attacks share: which images they alter, and how a perturbation is added.

A perturbation is float, in grey levels (0 to 255), of one image's shape. Adding rounds to the nearest grey level:
released codes of some attacks cut instead, which darkens every altered pixel by half a level.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from data.errors import expect
from data.image_sets import ImageSet
from data.poisoned_sets import PoisonedSet, poisoned_count

BLOCK = 2048  # images that are perturbed at once: bounds the memory of their floats


def check_radius(config: object) -> None:
    """What a config owes that bounds the change of a pixel."""
    expect(1 <= config.radius <= 255, f"{type(config).__name__}.radius", "in [1, 255] grey levels", config.radius)


def check_widths(config: object) -> None:
    """What a config owes that has a surrogate network."""
    expect(len(config.widths) == 4 and min(config.widths) > 0, f"{type(config).__name__}.widths",
           "four positive numbers", config.widths)


def level_type(radius: float) -> torch.dtype:
    """Holds whole grey levels within the radius: one byte, two beyond a radius of 127."""
    return torch.int8 if radius <= 127 else torch.int16


def drawn_positions(clean: ImageSet, ratio: float, *, seed: int) -> Tensor:
    """(P,) ascending: round(ratio * N) of all positions, drawn without replacement; ratio in (0, 1]."""
    order = torch.randperm(len(clean.images), generator=torch.Generator().manual_seed(seed))
    return order[:poisoned_count(clean, ratio)].sort().values.to(clean.images.device)


def added(images: Tensor, perturbation: Tensor) -> Tensor:
    """(B, C, H, W) uint8 images plus a perturbation that broadcasts to them, rounded, in [0, 255]: uint8."""
    return (images.float() + perturbation).round().clamp(0, 255).to(torch.uint8)


def perturbed_set(clean: ImageSet, positions: Tensor, perturb: Callable[[Tensor, Tensor], Tensor], attack: str,
                  parameters: dict[str, Any], *, seed: int) -> PoisonedSet:
    """`clean` with `perturb(images, positions)`, (B, C, H, W) uint8 and (B,) to the altered uint8 images, at
    `positions`, block by block."""
    images = clean.images.clone()
    for index in positions.split(BLOCK):
        images[index] = perturb(images[index], index)
    return PoisonedSet(images, clean.labels.clone(), positions, clean.num_classes, attack, parameters, seed)
