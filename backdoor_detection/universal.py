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
    steps: int = 10        # gradient steps of the classes that stay
    radius: float = 0.1    # root mean square of a perturbation, pixel values in [0, 1]
    kept: int = 16         # classes that go on after the first step; half of them the furthest, half spread evenly
    block: int = 1 << 22   # pixel values through the network at once; for memory only

    def __post_init__(self) -> None:
        for name in ("images", "steps", "radius", "block"):
            expect(getattr(self, name) > 0, f"UniversalConfig.{name}", "> 0", getattr(self, name))
        expect(self.kept >= 4, "UniversalConfig.kept", ">= 4 classes", self.kept)


@dataclass(frozen=True)
class Reach:
    """margins: (K,) mean margin of each class after its last step; 0 where not one sweep was done in time.

    kept: classes that went on to the end, ascending; never one that all images belong to, which keeps its 0.
    steps: of `steps_asked`, that all kept classes did before the time was up. On the CPU.
    """

    margins: Tensor
    kept: tuple[int, ...]
    steps: int
    steps_asked: int


class _Climb:
    """The perturbations of all classes, in units of pixels; moves some of them one step at a time."""

    def __init__(self, network: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor, std: Tensor,
                 num_classes: int, config: UniversalConfig) -> None:
        self.network, self.pixels, self.labels, self.config = network, pixels, labels, config
        self.std = std.view(1, 1, -1, 1, 1)
        self.moved = pixels.new_zeros(num_classes, *pixels.shape[1:])   # (K, C, H, W)
        self.bound = config.radius * math.sqrt(pixels[0].numel())
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

    def step(self, classes: Tensor, length: float) -> tuple[Tensor, Tensor]:
        """Margins of `classes` before a step of `length` bounds, and their next perturbations."""
        moved = self.moved[classes].requires_grad_(True)
        margins = self.margins(classes, moved)
        (gradient,) = torch.autograd.grad(margins.sum(), moved)
        moved = moved.detach() + length * self.bound * gradient / _norm(gradient).clamp(min=1e-20)
        return margins.detach(), moved * (self.bound / _norm(moved).clamp(min=self.bound))


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
    best = pixels.new_zeros(num_classes)
    done = 0
    for sweep in range(config.steps + 1):
        found = _sweep(climb, classes, sweep, config, late)
        if found is None:
            break
        best[classes], done = found, sweep
        if sweep == 1 and len(classes) > config.kept:
            classes = classes[_spread(found, config.kept)]
    return Reach(best.cpu(), tuple(classes.tolist()), done, config.steps)


def _sweep(climb: _Climb, classes: Tensor, sweep: int, config: UniversalConfig,
           late: Callable[[], bool]) -> Tensor | None:
    """(k,) margins of `classes` after `sweep` steps, and one step more (not after the last); None when late."""
    length = 1.0 if sweep == 0 else STRIDE / config.steps  # the first to the bound: it ranks the classes
    margins, moves = [], []
    for part in classes.split(climb.per_block):
        if late():
            return None
        if sweep == config.steps:
            with torch.no_grad():
                margins.append(climb.margins(part, climb.moved[part]))
        else:
            before, moved = climb.step(part, length)
            margins.append(before)
            moves.append(moved)
    if moves:
        climb.moved[classes] = torch.cat(moves)
    return torch.cat(margins)


def _spread(margins: Tensor, kept: int) -> Tensor:
    """Positions, ascending: the larger half of `kept` by margin, and as many evenly spread over the rest."""
    order = margins.argsort(descending=True)
    first = kept // 2
    rest = torch.linspace(first, len(order) - 1, kept - first, device=order.device).round().long()
    return order[torch.cat([torch.arange(first, device=order.device), rest])].sort().values
