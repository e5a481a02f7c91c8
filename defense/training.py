"""Epochs over a small clean set: batches by index, the last finite state kept, the deadline asked at each step."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.augmentation import shifted
from data.devices import carried
from data.errors import expect
from defense.deadline import Deadline
from defense.given import evaluation

STATISTICS = ("batch", "running")
EVALUATION_BATCH = 512
Augment = Callable[[Tensor, torch.Generator], Tensor]  # (B, C, H, W) to the same


@dataclass(frozen=True)
class Training:
    """What an epoch of any stage needs beside its step. augment: None = images as they are. device: where a batch
    goes before its step; None = the images' own."""

    images: Tensor
    labels: Tensor
    generator: torch.Generator
    augment: Augment | None
    deadline: Deadline
    device: torch.device | None = None


@dataclass(frozen=True)
class Epochs:
    """losses: mean of each epoch. finite: False where one gave NaN or infinity (its steps are undone).

    complete: all epochs were run, or the stage was done before. steps: taken in all.
    """

    losses: tuple[float, ...]
    finite: bool
    complete: bool
    steps: int


def run_epochs(model: nn.Module, given: Training, step: Callable[[Tensor, Tensor], Tensor], *, epochs: int,
               batch: int, done: Callable[[], bool] | None = None) -> Epochs:
    """Call `step(images, labels)`, which changes `model` and returns its loss, on every batch of every epoch.

    done: asked after each epoch; True ends the stage. After a loss, a weight or a statistic that is no number
    the model goes back to the state before that epoch, and the stage ends.
    """
    kept, losses, steps = LastFinite(model), [], 0
    for _ in range(epochs):
        total, taken = torch.zeros((), device=given.device or given.images.device), 0
        batches = epoch_batches(len(given.images), batch, generator=given.generator)
        for index in batches:
            if given.deadline():
                break
            total = total + step(*_batch(given, index))
            taken += 1
        steps += taken
        if taken and not (math.isfinite(total.item()) and kept.keep()):
            kept.restore()
            return Epochs(tuple(losses), False, False, steps)
        losses += [total.item() / taken] if taken else []
        if taken < len(batches):
            return Epochs(tuple(losses), True, False, steps)
        if done and done():
            break
    return Epochs(tuple(losses), True, True, steps)


def epoch_batches(count: int, batch: int, *, generator: torch.Generator) -> list[Tensor]:
    """All positions once, in random order, in `batch_count` parts as equal as can be."""
    return list(torch.randperm(count, generator=generator).tensor_split(batch_count(count, batch)))


def batch_count(count: int, batch: int) -> int:
    """Batches an epoch: of at most `batch` images, and none of a single one, which a batch norm cannot take (three
    images in batches of two are one batch)."""
    return max(1, min(-(-count // batch), count // 2))


def _batch(given: Training, index: Tensor) -> tuple[Tensor, Tensor]:
    index = index.to(given.images.device)
    device = given.device or given.images.device
    images, labels = (carried(part[index], device) for part in (given.images, given.labels))
    return (given.augment(images, given.generator) if given.augment else images), labels


class LastFinite:
    """The last state of a model in which every weight and statistic was a finite number."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = [t.detach() for t in chain(model.parameters(), model.buffers())]
        self.kept = [t.clone() for t in self.tensors]

    def keep(self) -> bool:
        """Keep the present state if it is finite; whether it is."""
        finite = all_finite(self.tensors)
        if finite:
            _copy(self.tensors, self.kept)
        return finite

    def restore(self) -> None:
        """Set the model to the state that was kept."""
        _copy(self.kept, self.tensors)


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether no floating-point number in `tensors` is NaN or infinite."""
    checked = [t.isfinite().all() for t in tensors if t.is_floating_point()]
    return bool(torch.stack(checked).all()) if checked else True


def training_mode(model: nn.Module, statistics: str) -> None:
    """Training mode. Batch norms use, and track, each batch's statistics, or ("running") keep to their own."""
    check_statistics(statistics, "statistics")
    model.train()
    if statistics == "running":
        for norm in _norms(model):
            norm.eval()


def check_statistics(statistics: str, where: str) -> None:
    expect(statistics in STATISTICS, where, f"one of {', '.join(STATISTICS)}", statistics)


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """For a pass at other weights than the model's: batch norms in training mode do not track its statistics."""
    norms = [(norm, norm.track_running_stats) for norm in _norms(model)]
    for norm, _ in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, tracked in norms:
            norm.track_running_stats = tracked


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@torch.no_grad()
def predicted_classes(model: nn.Module, images: Tensor, batch: int = EVALUATION_BATCH) -> Tensor:
    """(N,) int64 classes of (N, C, H, W) images ready for the model, in evaluation mode; modes stay as they were."""
    with evaluation(model):
        return torch.cat([model(part).argmax(1) for part in images.split(batch)])


@dataclass(frozen=True)
class Shift:
    """An augmentation: each image shifted by up to `pixels` each way, its edge repeated, and perhaps mirrored."""

    pixels: int
    mirror: bool = False  # for objects, never for digits and signs

    def __post_init__(self) -> None:
        expect(self.pixels >= 0, "Shift.pixels", ">= 0", self.pixels)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """(B, C, H, W) to the same; drawn on the CPU, so that every device draws the same."""
        return shifted(images, self.pixels, mirror=self.mirror, border="replicate", generator=generator)
