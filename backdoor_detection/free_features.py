"""How far the features after the first block can be pushed towards each class, without any bound.

The contest report's way (`margins.py`) in brief: the same eight images for each class in place of thirty, eight steps
of twelve times the rate in place of a hundred. By itself it tells about as much as the whole, and it errs on other
networks than changes of the picture do.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from backdoor_detection.margins import Move, ReportConfig, climb, side_by_side, sign_steps
from backdoor_detection.split_model import SplitModel

SHARE = 3  # one image in so many is pushed
STEPS = 8
CONFIG = replace(ReportConfig(), steps=STEPS, warm_up=1, peak=1.2)


def pushed_images(count: int) -> int:
    """How many of `count` images are pushed: one in three, all where these are fewer."""
    return count // SHARE or count


def free_margins(split: SplitModel, pixels: Tensor, classes: Sequence[int], num_classes: int, *, block: int,
                 late: Callable[[], bool] = lambda: False) -> Tensor | None:
    """(len(classes),) the largest margin that each of `classes` reaches over the images; None when late.

    pixels: (N, C, H, W) normalised. block: feature values through the network at once. late: asked between steps.
    """
    with torch.no_grad():
        features = split.stem(pixels[::SHARE if len(pixels) >= SHARE else 1][:pushed_images(len(pixels))])
    found = []
    for group in side_by_side(len(classes), features.numel(), block):
        steps = _InTime(sign_steps(CONFIG), late)
        found.append(climb(split.trunk, features.repeat(len(group), 1, 1, 1), [classes[i] for i in group],
                           num_classes, steps, 0.0))
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
