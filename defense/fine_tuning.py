"""FT: plain fine-tuning on the clean images, which weak backdoors do not outlive.

Defaults as in BackdoorBench (arXiv:2206.12654): SGD, its rate falling along a cosine by epochs.
Departs from it: batches as equal as can be, where it ends each epoch with a smaller one.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data.errors import expect
from defense.baseline import Repaired, after_tuning, run_baseline
from defense.deadline import Deadline
from defense.given import Given
from defense.results import DefenseResult
from defense.training import Augment, Epochs, Training, check_statistics, run_epochs, training_mode

Loss = Callable[[Tensor, Tensor], Tensor]  # of (B, C, H, W) images and their (B,) labels


@dataclass(frozen=True)
class FineTuningConfig:
    rate: float = 0.01          # SGD, in the first epoch
    momentum: float = 0.9
    decay: float = 5e-4         # of the weights
    batch: int = 256            # images at most
    epochs: int = 100
    horizon: float | None = None  # epochs after which the rate would be zero; None = `epochs`, inf = never
    statistics: str = "batch"   # of batch norms: "batch" as published, "running" = as they are

    def __post_init__(self) -> None:
        expect(self.rate > 0 and 0 <= self.momentum < 1 and self.decay >= 0, "FineTuningConfig rate, momentum, decay",
               "> 0, in [0, 1), >= 0", (self.rate, self.momentum, self.decay))
        expect(self.batch > 1 and self.epochs > 0, "FineTuningConfig batch, epochs", "> 1, > 0",
               (self.batch, self.epochs))
        expect(self.horizon is None or self.horizon >= self.epochs, "FineTuningConfig.horizon",
               f"None or >= {self.epochs} epochs", self.horizon)
        check_statistics(self.statistics, "FineTuningConfig.statistics")


def defend(model: nn.Module, images: Tensor, labels: Tensor, config: FineTuningConfig, *, generator: torch.Generator,
           augment: Augment | None = None, deadline: Deadline | None = None) -> DefenseResult:
    """Tune a copy of `model` on the clean images: see `run_baseline`."""
    def repair(given: Given, training: Training) -> Repaired:
        return after_tuning(given.model, fine_tuning(given.model, training, config))

    return run_baseline("ft", repair, model, images, labels, generator=generator, augment=augment,
                        deadline=deadline)


def fine_tuning(model: nn.Module, given: Training, config: FineTuningConfig, *, loss: Loss | None = None,
                after: Callable[[], None] | None = None) -> Epochs:
    """Tune all parameters of `model` in place; it ends in its last finite state, in training mode.

    loss: what is minimised on a batch; None = the cross-entropy of the model. after: called after each step.
    """
    loss = loss or (lambda images, labels: cross_entropy(model(images), labels))
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], config.rate, config.momentum,
                                weight_decay=config.decay)
    ended = 0

    def descend(images: Tensor, labels: Tensor) -> Tensor:
        value = loss(images, labels)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        if after:
            after()
        return value.detach()

    def annealed() -> bool:
        nonlocal ended
        ended += 1
        set_rate(optimiser, cosine_rate(config.rate, ended, config.horizon or config.epochs))
        return False

    training_mode(model, config.statistics)
    return run_epochs(model, given, descend, epochs=config.epochs, batch=config.batch, done=annealed)


def cosine_rate(rate: float, past: int, horizon: float) -> float:
    """The rate after `past` of the `horizon` units in which it falls to zero along half a cosine; then it rises."""
    return rate * (1 + math.cos(math.pi * past / horizon)) / 2


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """From its next step on the optimiser uses `rate`."""
    for group in optimiser.param_groups:
        group["lr"] = rate
