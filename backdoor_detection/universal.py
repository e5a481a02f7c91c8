"""How far one small change, the same for all images, pushes a network towards each class.

A backdoor is a shortcut to its target class: one change of the picture that works on every clean image. So for
each class one perturbation is optimised under each of a few bounds of its L2 norm, shared by the clean images of
all other classes, and the class's statistics are the mean margins that they reach. Source: targeted universal
adversarial perturbations (Moosavi-Dezfooli et al., CVPR 2017, arXiv:1610.08401) in place of the separate points of
Mm-Bd (Wang et al., IEEE S&P 2024, arXiv:2205.06900); all classes and bounds climb side by side, each from zero, and
only what is optimised has a gradient.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from data.errors import expect

STRIDE = 2.5  # the steps after the first add up to about this many radii, so that a perturbation can turn


@dataclass(frozen=True)
class UniversalConfig:
    images: int = 24       # clean images that share a perturbation, as many of each class as possible
    radii: tuple[float, ...] = (0.025, 0.05, 0.1)  # bounds, each with a climb of its own: root mean square of a
                                                   # perturbation, pixel values in [0, 1]
    steps: int = 6         # gradient steps of each climb
    kept: int = 20         # classes that go on after the first step: a fifth the furthest, the rest evenly spread
    block: int = 1 << 22   # pixel values through the network at once; for memory only

    def __post_init__(self) -> None:
        for name in ("images", "steps", "block"):
            expect(getattr(self, name) > 0, f"UniversalConfig.{name}", "> 0", getattr(self, name))
        expect(self.radii and min(self.radii) > 0 and tuple(sorted(self.radii)) == tuple(self.radii),
               "UniversalConfig.radii", "> 0, ascending", self.radii)
        expect(self.kept >= 5, "UniversalConfig.kept", ">= 5 classes", self.kept)


@dataclass(frozen=True)
class Reach:
    """stages: (S, K) mean margin of each class under each bound after `steps` steps; without any the same in all
    rows, 0 where not even the unmoved images were seen in time. A class that was not followed keeps its margin
    after one step under the first bound.

    kept: classes that went on to the end, ascending; never one that all images belong to, which keeps its 0.
    null: those of them that stand for all classes, an even spread over the ranks of the first step; the others are
    there because they were furthest. steps: of `steps_asked`, that all kept classes did. On the CPU.
    """

    stages: Tensor
    kept: tuple[int, ...]
    null: tuple[int, ...]
    steps: int
    steps_asked: int

    @property
    def margins(self) -> Tensor:
        """(K,) under the widest bound."""
        return self.stages[-1]


class _Late(Exception):
    """The time is over: what is under way does not count."""


class _Climb:
    """Runs images under perturbations, which are in units of pixels, through the network, some at a time."""

    def __init__(self, network: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor, std: Tensor,
                 num_classes: int, config: UniversalConfig, late: Callable[[], bool]) -> None:
        self.network, self.pixels, self.labels, self.late = network, pixels, labels, late
        self.num_classes, self.steps = num_classes, config.steps
        self.std = std.view(1, 1, -1, 1, 1)
        norms = pixels.new_tensor(config.radii) * math.sqrt(pixels[0].numel())
        self.bounds = norms.view(-1, 1, 1, 1, 1)  # L2 norms that the radii stand for
        self.per_block = max(1, config.block // pixels.numel())

    def margins(self, classes: Tensor, moved: Tensor) -> Tensor:
        """(k,) mean over the images of other classes of the class's logit minus the largest other."""
        shifted = self.pixels + moved[:, None] / self.std
        logits = self.network(shifted.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        expect(logits.shape[1] == self.num_classes, "num_classes", f"{logits.shape[1]}, as the model puts out",
               self.num_classes)
        logits = logits.view(len(moved), len(self.pixels), -1)
        at = classes.view(-1, 1, 1).expand(-1, len(self.pixels), 1)
        margins = (logits.gather(2, at) - logits.scatter(2, at, -math.inf).amax(2, keepdim=True))[..., 0]
        others = (self.labels != classes[:, None]).float()
        return (margins * others).sum(1) / others.sum(1)

    def reached(self, classes: Tensor, moved: Tensor) -> Tensor:
        """(k,) margins of `classes`, each under its perturbation. Raises _Late."""
        with torch.no_grad():
            return torch.cat([self.margins(*part) for part in self._blocks(classes, moved)])

    def slopes(self, classes: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """(k,) margins and (k, C, H, W) their gradients, of norm 1 or 0. Raises _Late."""
        found = []
        for part, start in self._blocks(classes, moved):
            start = start.detach().requires_grad_(True)
            margins = self.margins(part, start)
            (gradient,) = torch.autograd.grad(margins.sum(), start)
            found.append((margins.detach(), gradient / _norm(gradient).clamp(min=1e-20)))
        margins, gradients = zip(*found, strict=True)
        return torch.cat(margins), torch.cat(gradients)

    def step(self, classes: Tensor, moved: Tensor, *, last: bool) -> tuple[Tensor, Tensor]:
        """(S, k) margins under each bound, and (S, k, C, H, W) `moved` one step on unless `last`. Raises _Late."""
        several = classes.repeat(len(moved)), moved.flatten(0, 1)
        if last:
            return self.reached(*several).view(len(moved), -1), moved
        margins, gradients = self.slopes(*several)
        moved = moved + STRIDE / self.steps * self.bounds * gradients.view_as(moved)
        return margins.view(len(moved), -1), moved * (self.bounds / _norm(moved).maximum(self.bounds))

    def _blocks(self, classes: Tensor, moved: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for part in zip(classes.split(self.per_block), moved.split(self.per_block), strict=True):
            if self.late():
                raise _Late
            yield part


def _norm(x: Tensor) -> Tensor:
    return x.flatten(-3).norm(dim=-1)[..., None, None, None]


def universal_reach(network: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor, std: Tensor,
                    num_classes: int, config: UniversalConfig, *,
                    late: Callable[[], bool] = lambda: False) -> Reach:
    """Climb for all classes, then for those that stay, until the steps are done or `late()` says so.

    network: (B, C, H, W) normalised images to (B, K) logits, frozen. pixels: (N, C, H, W) normalised. labels:
    (N,), an image of the class itself does not count for it. std: (C,) of the normalisation, which the radii are
    measured under. late: asked between blocks; a sweep it cuts off does not count. Raises InputError where the
    network has not `num_classes` outputs.
    """
    climb = _Climb(network, pixels, labels, std, num_classes, config, late)
    classes = torch.arange(num_classes, device=pixels.device)
    classes = null = classes[(labels != classes[:, None]).any(1)]
    stages, done = pixels.new_zeros(len(config.radii), num_classes), 0
    with suppress(_Late):
        stages[:, classes], slopes = climb.slopes(classes, pixels.new_zeros(len(classes), *pixels.shape[1:]))
        if len(classes) > config.kept:
            stages[:, classes] = first = climb.reached(classes, climb.bounds[0] * slopes)
            kept, spread = _spread(first, config.kept)
            classes, null, slopes = classes[kept], classes[spread], slopes[kept]
        moved = climb.bounds * slopes  # (S, k, C, H, W): the first step, shared, goes as far as each bound
        for step in range(1, config.steps + 1):
            stages[:, classes], moved = climb.step(classes, moved, last=step == config.steps)
            done = step
    return Reach(stages.cpu(), tuple(classes.tolist()), tuple(null.tolist()), done, config.steps)


def _spread(margins: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Positions to keep, and those of them that are an even spread over all ranks; both ascending.

    A spread over all ranks has mean and standard deviation of the whole; the furthest alone would hide each other.
    """
    order = margins.argsort(descending=True)
    furthest = order[:kept // 5]
    ranks = torch.linspace(0, len(order) - 1, kept - len(furthest) + 2, device=order.device)[1:-1]
    spread = order[ranks.round().long()]
    left = order[~torch.isin(order, torch.cat([furthest, spread]))]  # where the spread met the furthest
    both = torch.cat([furthest, spread]).unique()
    return torch.cat([both, left[:kept - len(both)]]).sort().values, spread.sort().values
