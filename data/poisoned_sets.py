"""Training sets that an attacker altered: the common form of backdoors and of unlearnable examples.

An attack is one module with a frozen config and a function `poison`. A backdoor attack, `poison(clean, config, *,
ratio, target, seed)`, gives a BackdooredSet (all-to-one); its trigger at test time is the code that made the set and
maps every image by itself, so it does not matter which others are in the batch. An unlearnable-example attack,
`poison(clean, config, *, ratio, seed)`, gives a PoisonedSet: its labels are the true ones.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.errors import expect
from data.image_sets import ImageSet


@dataclass(frozen=True)
class PoisonedSet:
    """A poisoned training set and how it came about.

    images: (N, C, H, W) uint8; labels: (N,) int64; poisoned: (P,) int64, ascending positions of the images that the
    attack was to alter. parameters: of the attack, as in its config.
    """

    images: Tensor
    labels: Tensor
    poisoned: Tensor
    num_classes: int
    attack: str
    parameters: dict[str, Any]
    seed: int


@dataclass(frozen=True)
class BackdooredSet(PoisonedSet):
    """poisoned: positions of the triggered images that have the attacker's label `target`. decoys: (D,) int64,
    ascending, none of them poisoned: images that an attack altered without changing the label, so that only its
    exact trigger works. trigger: what the attacker does to an image at test time, (N, C, H, W) uint8 to the same.
    """

    target: int
    trigger: Callable[[Tensor], Tensor]
    decoys: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def poisoned_count(clean: ImageSet, ratio: float) -> int:
    """round(ratio * N) of the training set's N images, at least one; ratio in (0, 1]."""
    expect(0 < ratio <= 1, "ratio", "in (0, 1]", ratio)
    count = round(ratio * len(clean.images))
    expect(count > 0, "ratio", f"at least one of {len(clean.images)} images", ratio)
    return count


def draw_positions(clean: ImageSet, among: Tensor, ratio: float, target: int, *, seed: int) -> Tensor:
    """round(ratio * N) of the (M,) positions `among`, drawn without replacement, in random order.

    ratio: share of the whole training set of N images, in (0, 1]; more than `among` has is refused.
    """
    count = poisoned_count(clean, ratio)
    expect(0 <= target < clean.num_classes, "target", f"in [0, {clean.num_classes})", target)
    expect(count <= len(among), "ratio", f"at most the {len(among)} images that the attack may alter", count)
    order = torch.randperm(len(among), generator=torch.Generator().manual_seed(seed))
    return among[order[:count].to(among.device)]


def poison_target_class(clean: ImageSet, trigger: Callable[[Tensor], Tensor], attack: str,
                        parameters: dict[str, Any], *, ratio: float, target: int, seed: int) -> BackdooredSet:
    """Label-consistent: trigger images of the class `target` only; no label changes.

    ratio: share of the whole training set; where the class is smaller than that, all of it is triggered.
    """
    own = (clean.labels == target).nonzero()[:, 0]
    expect(len(own) > 0, "target", "a class with images", target)
    expect(0 < ratio <= 1, "ratio", "in (0, 1]", ratio)
    share = min(ratio, len(own) / len(clean.images))
    poisoned = draw_positions(clean, own, share, target, seed=seed).sort().values
    images = clean.images.clone()
    images[poisoned] = trigger(images[poisoned])
    return BackdooredSet(images, clean.labels.clone(), poisoned, clean.num_classes, attack, parameters, seed, target,
                         trigger)


def poison_any_class(clean: ImageSet, trigger: Callable[[Tensor], Tensor], attack: str,
                     parameters: dict[str, Any], *, ratio: float, target: int, seed: int) -> BackdooredSet:
    """Trigger round(ratio * N) images drawn from all classes, the target's included, and label them `target`.

    ratio: share of the whole training set, in (0, 1].
    """
    everywhere = torch.arange(len(clean.images), device=clean.images.device)
    poisoned = draw_positions(clean, everywhere, ratio, target, seed=seed).sort().values
    images, labels = clean.images.clone(), clean.labels.clone()
    images[poisoned] = trigger(images[poisoned])
    labels[poisoned] = target
    return BackdooredSet(images, labels, poisoned, clean.num_classes, attack, parameters, seed, target, trigger)


def draw_decoys(found: BackdooredSet, share: float, *, generator: torch.Generator) -> Tensor:
    """(D,) ascending: round(share * poisoned) of the images that are not poisoned, or all where they are fewer."""
    free = torch.ones(len(found.images), dtype=torch.bool, device=found.images.device)
    free[found.poisoned] = False
    others = free.nonzero()[:, 0]
    order = torch.randperm(len(others), generator=generator)[:round(share * len(found.poisoned))]
    return others[order.to(others.device)].sort().values


def check_images(images: Tensor) -> None:
    """What every trigger is applied to: (N, C, H, W) uint8."""
    expect(images.ndim == 4 and images.dtype == torch.uint8, "images", "(N, C, H, W) uint8",
           f"{tuple(images.shape)} {images.dtype}")
