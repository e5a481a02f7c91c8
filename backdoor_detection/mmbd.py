"""Mm-Bd in its original form: the largest margin each class can reach from random pixels.

Paper: Wang et al., MM-BD, IEEE S&P 2024 (arXiv:2205.06900). No clean image is needed. The published code builds
its optimiser anew at every step, so the momentum it names never acts: plain gradient descent, as here.
Departs from it: images have the given network's normalisation after [0, 1]; many classes share a forward pass;
the relative stop multiplies instead of dividing by a loss that may be 0.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from backdoor_detection.margins import climb, side_by_side
from backdoor_detection.outlier import gamma_p_value
from backdoor_detection.split_model import frozen_copy, stem_width
from data.errors import expect


@dataclass(frozen=True)
class MmBdConfig:
    """The published numbers."""

    images: int = 30         # random images for each class
    steps: int = 300         # at most
    rate: float = 0.01       # of gradient descent on pixels in [0, 1]
    tolerance: float = 1e-5  # stop at a smaller relative change of a class's loss
    alarm: float = 0.05      # backdoored up to this p
    block: int = 1 << 26     # stem features side by side at most (256 MB each copy); for memory only

    def __post_init__(self) -> None:
        for name in ("images", "steps", "rate", "block"):
            expect(getattr(self, name) > 0, f"MmBdConfig.{name}", "> 0", getattr(self, name))
        expect(0 < self.alarm < 1, "MmBdConfig.alarm", "in (0, 1)", self.alarm)


def p_value(model: nn.Module, num_classes: int, shape: tuple[int, int, int], mean: Tensor, std: Tensor,
            config: MmBdConfig, *, generator: torch.Generator) -> float:
    """p of the class that stands out most, in [0, 1]; smaller = more suspicious, at most `config.alarm` an alarm."""
    return gamma_p_value(largest_margins(model, num_classes, shape, mean, std, config, generator=generator))


def largest_margins(model: nn.Module, num_classes: int, shape: tuple[int, int, int], mean: Tensor, std: Tensor,
                    config: MmBdConfig, *, generator: torch.Generator) -> Tensor:
    """(K,) on the CPU: for each class the largest margin over its images; larger = more suspicious.

    model: normalised images to (B, K) logits; works on a copy, on the model's device. shape: (C, H, W) of an
    image. mean, std: (C,) of the normalisation, as `clean_images.pixel_scale` gives. generator: on the CPU.
    """
    expect(num_classes >= 2, "num_classes", ">= 2", num_classes)
    expect(len(mean) == len(std) == shape[0], "mean, std", f"{shape[0]} channels", f"{len(mean)}, {len(std)}")
    net = frozen_copy(model)
    device = next(net.parameters()).device
    forward = partial(_logits, net, mean.to(device)[:, None, None], std.to(device)[:, None, None])
    moves = [partial(descend, rate=config.rate)] * config.steps
    per_class = config.images * stem_width(net, shape[0]) * shape[1] * shape[2]
    random_images = _random_images((config.images, *shape), generator)
    found = []
    for classes in side_by_side(num_classes, per_class, config.block):
        start = torch.cat([next(random_images) for _ in classes]).to(device)
        found.append(climb(forward, start, classes, num_classes, moves, config.tolerance))
    return torch.cat(found).cpu()


def descend(points: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """One step of plain gradient descent; the points may leave [0, 1], the images they stand for do not."""
    return points.sub(gradient, alpha=rate)


def _logits(net: nn.Module, mean: Tensor, std: Tensor, points: Tensor) -> Tensor:
    """Points are clamped to [0, 1] inside the pass: outside, their gradient is 0."""
    return net((points.clamp(0, 1) - mean) / std)


def _random_images(shape: tuple[int, ...], generator: torch.Generator) -> Iterator[Tensor]:
    """Uniform in [0, 1), one class after the other, so that the blocks do not change them."""
    while True:
        yield torch.rand(shape, generator=generator)
