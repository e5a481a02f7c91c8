"""The frame of every baseline: check what is given, copy, repair, judge on the clean images, give back."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from defense.deadline import Deadline
from defense.given import Given, give_back, own_randomness, take, working_copy
from defense.results import DefenseResult
from defense.training import Augment, Epochs, Training, all_finite, predicted_classes


@dataclass(frozen=True)
class Repaired:
    """What a method makes of the copy it is given: the fields of `DefenseResult`, before judging.

    failed: why `model` is not repaired; the given model is then returned as it was.
    """

    model: nn.Module
    finite: bool = True
    complete: bool = True
    failed: str = ""
    losses: tuple[float, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


Repair = Callable[[Given, Training], Repaired]


def run_baseline(method: str, repair: Repair, model: nn.Module, images: Tensor, labels: Tensor, *,
                 generator: torch.Generator, augment: Augment | None, deadline: Deadline | None) -> DefenseResult:
    """Let `repair` change a copy of `model`; model, tensors and torch's global generators stay as they are.

    images: (N, C, H, W) float as the model takes them. labels: (N,) integers, their classes. generator: on the CPU.
    augment: of every training batch. A repair that failed, that ends at chance or that the model's own dtype cannot
    hold is not given back: the model then is the given one's copy, and `failed` says why.
    """
    deadline = deadline or Deadline()
    with own_randomness(next(model.parameters(), torch.empty(0)).device, generator=generator):
        given = take(model, images, labels)
        begun = deadline.elapsed()
        before = clean_accuracy(given.model, given.images, given.labels)
        judging = deadline.elapsed() - begun  # seconds that judging the repaired model will take too
        found = repair(given, Training(given.images, given.labels, generator, augment, deadline.part(1.0)))
        judged = not found.failed and deadline.elapsed() + judging <= deadline.end - deadline.start
        after = clean_accuracy(found.model, given.images, given.labels) if judged else None
    failed = found.failed
    if after is not None and after <= 1 / given.num_classes < before:
        failed = f"the repaired model is lost: accuracy {after:.3f} on the clean images"
    repaired, failed = returned(found.model, model, failed)
    details = {"clean_accuracy": before, "clean_accuracy_repaired": after, "missing_classes": list(given.missing)}
    return DefenseResult(method, repaired, found.finite, found.complete, failed, found.losses, deadline.elapsed(),
                         details | dict(found.details))


def returned(ours: nn.Module, model: nn.Module, failed: str) -> tuple[nn.Module, str]:
    """(the repaired copy `ours` as `give_back` makes it, why it failed); where it failed, also because the dtype of
    the given `model` cannot hold it, a copy of that one."""
    repaired = give_back(ours, model)
    if not all_finite(list(chain(repaired.parameters(), repaired.buffers()))):
        failed = failed or "the repaired model is too large for its dtype"
    return (give_back(working_copy(model), model) if failed else repaired), failed


def after_tuning(model: nn.Module, epochs: Epochs, details: Mapping[str, Any] | None = None) -> Repaired:
    """A model whose last stage were these epochs of training; without a finite one it counts as failed."""
    failed = "no time to tune" if epochs.finite else "no finite epoch of tuning"
    return Repaired(model, epochs.finite, epochs.complete, "" if epochs.losses else failed, epochs.losses,
                    details or {})


def clean_accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of (N, C, H, W) images whose (N,) class the model finds, in evaluation mode."""
    return (predicted_classes(model, images) == labels).double().mean().item()
