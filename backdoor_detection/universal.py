"""How far one simple change, the same for all images, pushes a network towards each class.

A backdoor is a shortcut to its target class: one change of the picture that works on every clean image. So for
each class one change is optimised, shared by the clean images of all other classes and bounded in L2 norm. It is
looked for several times, at every pixel and as coarse pictures that are enlarged: in a clean network the class that
gets furthest is another one each time, a backdoor's target leads again and again. A class's statistic is the mean
over these changes of the median margin over the images.

Source: targeted universal adversarial perturbations (Moosavi-Dezfooli et al., CVPR 2017, arXiv:1610.08401) in place
of the separate points of Mm-Bd (Wang et al., IEEE S&P 2024, arXiv:2205.06900); coarse pictures after the smooth
triggers of Zeng et al., ICCV 2021 (arXiv:2104.03413). All classes climb side by side, and only what is optimised has
a gradient.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from backdoor_detection.changed_images import ChangedImages, direction, norm
from data.errors import expect

STRIDE = 2.5   # steps add up to this many radii, so that every change can reach its bound and turn
SCREENING = 3  # one in so many images, of six or more, tells which of many classes are followed
FURTHEST = 3   # one in so many of these are the furthest, the others evenly spread


@dataclass(frozen=True)
class Change:
    """A picture of rows x columns points (0: as many as the image has pixels), enlarged to the image and added to it.

    One row is a pattern of columns, one column a pattern of rows. radius: root mean square of its points, pixel values
    in [0, 1].
    """

    rows: int
    columns: int
    radius: float

    def __post_init__(self) -> None:
        expect(min(self.rows, self.columns) >= 0, "Change rows, columns", ">= 0 points", (self.rows, self.columns))
        expect(self.radius > 0, "Change.radius", "> 0", self.radius)

    def points(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of points on an image of that size; never more than pixels."""
        return min(self.rows or height, height), min(self.columns or width, width)


@dataclass(frozen=True)
class UniversalConfig:
    images: int = 24       # clean images that share a change, as many of each class as possible
    changes: tuple[Change, ...] = (Change(0, 0, 0.1), Change(0, 0, 0.05), Change(8, 8, 0.1), Change(4, 4, 0.1),
                                   Change(1, 0, 0.1))
    steps: int = 3         # gradient steps of each change
    kept: int = 20         # classes that are followed; of more all are tried first, under the first change
    block: int = 1 << 22   # pixel values through the network at once; for memory only

    def __post_init__(self) -> None:
        for name in ("images", "steps", "block"):
            expect(getattr(self, name) > 0, f"UniversalConfig.{name}", "> 0", getattr(self, name))
        expect(len(self.changes) > 0, "UniversalConfig.changes", "at least one", self.changes)
        expect(self.kept >= 5, "UniversalConfig.kept", ">= 5 classes", self.kept)

    @property
    def all_steps(self) -> int:
        """Gradient steps of all changes together."""
        return self.steps * len(self.changes)


@dataclass(frozen=True)
class Reach:
    """stages: (S, K) median margin of each class under each change that was done in time; where none was, one row of
    what there is: 0 before the first sweep. A class that was not followed has its margin of the screening.

    kept: classes that were followed, ascending; never one that all images belong to, which keeps its 0. null: those of
    them that stand for all classes, an even spread over the ranks of the screening; the others are there because they
    were furthest. steps: of `steps_asked`, that all kept classes did. On the CPU.
    """

    stages: Tensor
    kept: tuple[int, ...]
    null: tuple[int, ...]
    steps: int
    steps_asked: int

    @property
    def margins(self) -> Tensor:
        """(K,) mean over the changes."""
        return self.stages.mean(0)


class _Climb:
    """One change, looked for in `steps` steps."""

    def __init__(self, images: ChangedImages, change: Change, steps: int) -> None:
        self.images, self.steps = images, steps
        channels, *self.size = images.pixels.shape[1:]
        self.shape = channels, *change.points(*self.size)
        self.bound = change.radius * math.sqrt(math.prod(self.shape))  # of a picture's norm

    def enlarged(self, pictures: Tensor) -> Tensor:
        return interpolate(pictures, self.size, mode="bicubic", align_corners=False)

    def first(self, slopes: Tensor) -> Tensor:
        """(k, C, h, w) pictures after a step from nothing to the bound: the slope at the points follows from that at
        the pixels, as enlarging is linear."""
        nothing = slopes.new_zeros(len(slopes), *self.shape).requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.enlarged(nothing), nothing, slopes)
        return self.bound * direction(gradient)

    def step(self, classes: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(k,) medians before a step along the mean's gradient, and the pictures after it, within the bound."""
        pictures = pictures.requires_grad_(True)
        medians, gradient = self.images.slopes(classes, pictures, self.enlarged(pictures))
        moved = pictures.detach() + STRIDE / self.steps * self.bound * direction(gradient)
        return medians, moved * (self.bound / norm(moved).clamp(min=self.bound))

    def last(self, classes: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(k,) medians under the pictures as they are."""
        with torch.no_grad():
            return self.images.medians(classes, self.images.margins(classes, self.enlarged(pictures))), pictures

    def follow(self, classes: Tensor, slopes: Tensor, margins: Tensor, late: Callable[[], bool]) -> int:
        """Write the medians of `classes` after each step into (K,) `margins`; the number of steps done in time."""
        pictures = self.first(slopes)
        for number in range(1, self.steps + 1):
            look, found = self.last if number == self.steps else self.step, []
            for part, moved in zip(classes.split(self.images.per_block), pictures.split(self.images.per_block),
                                   strict=True):
                if late():
                    return number - 1
                found.append(look(part, moved))
            medians, pictures = (torch.cat(one) for one in zip(*found, strict=True))
            margins[classes] = medians
        return self.steps


def screening_step(images: int) -> int:
    """One in so many of the images is screened with: all, where a part would be one or none."""
    return SCREENING if images >= 2 * SCREENING else 1


def universal_reach(images: ChangedImages, config: UniversalConfig, *,
                    late: Callable[[], bool] = lambda: False) -> Reach:
    """Climb change by change until all are done or `late()` says so; of many classes, for those that a screening keeps.

    images: of a frozen network; one of the class itself does not count for it. late: asked between blocks; a sweep it
    cuts off does not count. Raises InputError where the network has not as many outputs as classes.
    """
    classes = torch.arange(images.num_classes, device=images.labels.device)
    classes = null = classes[(images.labels != classes[:, None]).any(1)]
    margins = images.pixels.new_zeros(images.num_classes)
    if len(classes) > config.kept and _followed(_thinned(images), classes, config.changes[:1], config.steps, margins,
                                                late)[0]:
        kept, spread = _spread(margins[classes], config.kept)
        classes, null = classes[kept], classes[spread]
    stages, done = _followed(images, classes, config.changes, config.steps, margins, late)
    return Reach(torch.stack(stages or [margins]).cpu(), tuple(classes.tolist()), tuple(null.tolist()), done,
                 config.all_steps)


def _thinned(images: ChangedImages) -> ChangedImages:
    """One image in some, for a screening; all where those would be of one label."""
    step = screening_step(len(images.labels)) if len(images.labels[::SCREENING].unique()) > 1 else 1
    return images.some(slice(None, None, step))


def _followed(images: ChangedImages, classes: Tensor, changes: tuple[Change, ...], steps: int, margins: Tensor,
              late: Callable[[], bool]) -> tuple[list[Tensor], int]:
    """(K,) `margins` as they were after each change that was done in time, and steps in all. What is known of
    `classes` is written into `margins` as it comes. All changes begin at nothing: its slopes are found once."""
    unchanged = images.unchanged(classes, late)
    if unchanged is None:
        return [], 0
    margins[classes], slopes = unchanged
    stages: list[Tensor] = []
    for change in changes:
        done = _Climb(images, change, steps).follow(classes, slopes, margins, late)
        if done < steps:
            return stages, len(stages) * steps + done
        stages.append(margins.clone())
    return stages, len(stages) * steps


def _spread(margins: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Positions to keep, and those of them that are an even spread over all ranks; both ascending.

    A spread over all ranks has mean and standard deviation of the whole; the furthest alone would hide each other.
    """
    order = margins.argsort(descending=True)
    furthest = order[:kept // FURTHEST]
    ranks = torch.linspace(0, len(order) - 1, kept - len(furthest) + 2, device=order.device)[1:-1]
    spread = order[ranks.round().long()]
    left = order[~torch.isin(order, torch.cat([furthest, spread]))]  # where the spread met the furthest
    both = torch.cat([furthest, spread]).unique()
    return torch.cat([both, left[:kept - len(both)]]).sort().values, spread.sort().values
