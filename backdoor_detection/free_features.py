"""How far features can be pushed towards each class, without any bound, at two depths of a network.

The contest report's way (`margins.py`) in brief: the same images for each class in place of thirty drawn for each,
eight steps of twelve times the rate in place of a hundred. After the first block, as in the report, the image that
gets furthest tells most; behind the third layer, where a backdoor is a direction of its own, the median of many images
does. They err on other networks than changes of the picture do.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from backdoor_detection.margins import Move, ReportConfig, climb, largest, side_by_side, sign_steps
from backdoor_detection.outlier import deleted_residual_p_value, outlier_p_value
from backdoor_detection.split_model import SplitModel

STEPS = 8
CONFIG = replace(ReportConfig(), steps=STEPS, warm_up=1, peak=1.2)


def median(margins: Tensor) -> Tensor:
    """(k,) of (k, n) margins."""
    return margins.quantile(0.5, dim=1)


@dataclass(frozen=True)
class Cut:
    """Where features are pushed, and how that is judged.

    layers: before it, as of `SplitModel`. share: one image in so many is pushed, all where these are fewer. over: the
    images' margins to a class's. p_value: of the furthest of some margins among so many classes.
    """

    layers: int
    share: int
    over: Callable[[Tensor], Tensor]
    p_value: Callable[[Tensor, int], float]

    def images(self, count: int) -> int:
        """How many of `count` are pushed."""
        return count // self.share or count

    def passes(self, count: int) -> float:
        """Of `count` images, in passes of one through the whole network and back; every layer costs about as much."""
        return STEPS * self.images(count) * (4 - self.layers) / 4


CUTS = (Cut(0, 3, largest, outlier_p_value), Cut(3, 1, median, deleted_residual_p_value))


def free_margins(model: nn.Module, cut: Cut, pixels: Tensor, classes: Sequence[int], num_classes: int, *, block: int,
                 late: Callable[[], bool] = lambda: False) -> Tensor | None:
    """(len(classes),) how far the features behind the cut get towards each of `classes`; None when late.

    model: a PreActResNet18. pixels: (N, C, H, W) normalised. block: feature values through the network at once. late:
    asked between steps.
    """
    split = SplitModel(model, cut.layers)
    with torch.no_grad():
        features = split.stem(pixels[::cut.share if len(pixels) >= cut.share else 1][:cut.images(len(pixels))])
    found = []
    for group in side_by_side(len(classes), features.numel(), block):
        steps = _InTime(sign_steps(CONFIG), late)
        found.append(climb(split.trunk, features.repeat(len(group), 1, 1, 1), [classes[i] for i in group],
                           num_classes, steps, 0.0, cut.over))
        if steps.stopped:
            return None
    return torch.cat(found)


class _InTime:
    """The moves, until it is late."""

    def __init__(self, moves: Sequence[Move], late: Callable[[], bool]) -> None:
        self.moves, self.late, self.stopped = moves, late, False

    def __iter__(self) -> Iterator[Move]:
        for move in self.moves:
            if self.late():
                self.stopped = True
                return
            yield move
