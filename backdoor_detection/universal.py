"""How far one small change, the same for all images, pushes a network towards each class.

A backdoor is a shortcut to its target class: one change of the picture that works on every clean image. So for
each class one perturbation is optimised, shared by the clean images of all other classes and bounded in L2 norm,
and the class's statistic is the mean margin that it reaches. Source: targeted universal adversarial perturbations
(Moosavi-Dezfooli et al., CVPR 2017, arXiv:1610.08401) in place of the separate points of Mm-Bd (Wang et al., IEEE
S&P 2024, arXiv:2205.06900); all classes climb side by side, and only what is optimised has a gradient.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data.errors import expect

STRIDE = 2.5  # steps add up to this many radii, so that every perturbation can reach its bound and turn


@dataclass(frozen=True)
class UniversalConfig:
    images: int = 24       # clean images that share a perturbation, as many of each class as possible
    radii: tuple[float, ...] = (0.025, 0.05, 0.1)  # bounds one after the other: root mean square of a perturbation,
                                                   # pixel values in [0, 1]
    steps: int = 4         # gradient steps under each bound
    kept: int = 20         # classes that go on after the first step: a fifth the furthest, the rest evenly spread
    block: int = 1 << 22   # pixel values through the network at once; for memory only

    def __post_init__(self) -> None:
        for name in ("images", "steps", "block"):
            expect(getattr(self, name) > 0, f"UniversalConfig.{name}", "> 0", getattr(self, name))
        expect(self.radii and min(self.radii) > 0 and tuple(sorted(self.radii)) == tuple(self.radii),
               "UniversalConfig.radii", "> 0, ascending", self.radii)
        expect(self.kept >= 5, "UniversalConfig.kept", ">= 5 classes", self.kept)

    @property
    def all_steps(self) -> int:
        """Gradient steps under all bounds together."""
        return self.steps * len(self.radii)


@dataclass(frozen=True)
class Reach:
    """stages: (S, K) mean margin of each class at the end of each bound that was done in time; where none was, one
    row of what there is: 0 before the first sweep. A class that was not followed keeps its margin of the first step.

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
        """(K,) the last stage."""
        return self.stages[-1]


class _Climb:
    """The perturbations of all classes, in units of pixels; moves some of them one step at a time."""

    def __init__(self, network: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor, std: Tensor,
                 num_classes: int, config: UniversalConfig) -> None:
        self.network, self.pixels, self.labels, self.config = network, pixels, labels, config
        self.std = std.view(1, 1, -1, 1, 1)
        self.moved = pixels.new_zeros(num_classes, *pixels.shape[1:])   # (K, C, H, W)
        self.side = math.sqrt(pixels[0].numel())  # norm of a perturbation of 1 everywhere
        self.per_block = max(1, config.block // pixels.numel())

    def logits(self, moved: Tensor) -> Tensor:
        """(k, N, K) of all images under each of k perturbations."""
        shifted = self.pixels + moved[:, None] / self.std
        logits = self.network(shifted.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        expect(logits.shape[1] == len(self.moved), "num_classes", f"{logits.shape[1]}, as the model puts out",
               len(self.moved))
        return logits.view(len(moved), len(self.pixels), -1)

    def margins(self, classes: Tensor, moved: Tensor) -> Tensor:
        """(k,) mean over the images of other classes of the class's logit minus the largest other."""
        logits = self.logits(moved)
        at = classes.view(-1, 1, 1).expand(-1, len(self.pixels), 1)
        margins = (logits.gather(2, at) - logits.scatter(2, at, -math.inf).amax(2, keepdim=True))[..., 0]
        others = (self.labels != classes[:, None]).float()
        return (margins * others).sum(1) / others.sum(1)

    def step(self, classes: Tensor, length: float, radius: float) -> tuple[Tensor, Tensor]:
        """Margins of `classes` before a step of `length` bounds, and their next perturbations, within `radius`."""
        bound = radius * self.side
        moved = self.moved[classes].requires_grad_(True)
        margins = self.margins(classes, moved)
        (gradient,) = torch.autograd.grad(margins.sum(), moved)
        moved = moved.detach() + length * bound * gradient / _norm(gradient).clamp(min=1e-20)
        return margins.detach(), moved * (bound / _norm(moved).clamp(min=bound))


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def universal_reach(network: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor, std: Tensor,
                    num_classes: int, config: UniversalConfig, *,
                    late: Callable[[], bool] = lambda: False) -> Reach:
    """Climb for all classes, then for those that stay, until the steps are done or `late()` says so.

    network: (B, C, H, W) normalised images to (B, K) logits, frozen. pixels: (N, C, H, W) normalised. labels:
    (N,), an image of the class itself does not count for it. std: (C,) of the normalisation, which the radius is
    measured under. late: asked between blocks; a sweep it cuts off does not count. Raises InputError where the
    network has not `num_classes` outputs.
    """
    climb = _Climb(network, pixels, labels, std, num_classes, config)
    classes = torch.arange(num_classes, device=pixels.device)
    classes = classes[(labels != classes[:, None]).any(1)]
    null, stages, done = classes, [], 0
    margins = pixels.new_zeros(num_classes)
    for sweep in range(config.all_steps + 1):
        found = _sweep(climb, classes, sweep, config, late)
        if found is None:
            break
        margins[classes], done = found, sweep
        if sweep and sweep % config.steps == 0:
            stages.append(margins.clone())
        if sweep == 1 and len(classes) > config.kept:
            kept, spread = _spread(found, config.kept)
            classes, null = classes[kept], classes[spread]
    return Reach(torch.stack(stages or [margins]).cpu(), tuple(classes.tolist()), tuple(null.tolist()), done,
                 config.all_steps)


def _sweep(climb: _Climb, classes: Tensor, sweep: int, config: UniversalConfig,
           late: Callable[[], bool]) -> Tensor | None:
    """(k,) margins of `classes` after `sweep` steps, and one step more (not after the last); None when late."""
    length = 1.0 if sweep == 0 else STRIDE / config.steps  # the first to the bound: it ranks the classes
    radius = config.radii[min(sweep, config.all_steps - 1) // config.steps]
    margins, moves = [], []
    for part in classes.split(climb.per_block):
        if late():
            return None
        if sweep == config.all_steps:
            with torch.no_grad():
                margins.append(climb.margins(part, climb.moved[part]))
        else:
            before, moved = climb.step(part, length, radius)
            margins.append(before)
            moves.append(moved)
    if moves:
        climb.moved[classes] = torch.cat(moves)
    return torch.cat(margins)


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
