"""FT-SAM: fine-tuning by the gradient a large step uphill, which moves the large weights of backdoor neurons.

Paper: Zhu et al., Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization, ICCV 2023,
arXiv:2304.11823. Settings as in BackdoorBench (arXiv:2206.12654): the adaptive step, which goes as far as weights
are large, and smoothed labels. The rate goes along a cosine by steps, down and up again, as the released schedule is
moved at each step and not each epoch.
Departs from it: the clean images are those given, where BackdoorBench draws equally many of each class; batches as
equal as can be; losses are cross-entropies, there without the entropy of the smoothed labels, a constant.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data.errors import expect
from defense.baseline import Repaired, after_tuning, run_baseline
from defense.deadline import Deadline
from defense.fine_tuning import cosine_rate, set_rate
from defense.given import Given
from defense.results import DefenseResult
from defense.training import Augment, Epochs, Training, check_statistics, run_epochs, statistics_kept, training_mode

TINY = 1e-12  # beside the norm of the gradient, as published


@dataclass(frozen=True)
class SharpnessTuningConfig:
    rate: float = 0.01         # SGD, at the first step
    momentum: float = 0.9
    decay: float = 5e-4        # of the weights
    batch: int = 256           # images at most
    epochs: int = 100
    horizon: float = 100       # steps in which the rate falls to zero; in as many it rises again; inf = constant
    radius: float = 2.0        # rho: length of the step uphill
    adaptive: bool = True      # that length measured relative to each weight's size
    smoothing: float = 0.1     # of the labels: shared by the other classes
    statistics: str = "batch"  # of batch norms: "batch" as published, "running" = as they are

    def __post_init__(self) -> None:
        where = "SharpnessTuningConfig"
        expect(self.rate > 0 and 0 <= self.momentum < 1 and self.decay >= 0, f"{where} rate, momentum, decay",
               "> 0, in [0, 1), >= 0", (self.rate, self.momentum, self.decay))
        expect(self.batch > 1 and self.epochs > 0 and self.horizon > 0, f"{where} batch, epochs, horizon",
               "> 1, > 0, > 0", (self.batch, self.epochs, self.horizon))
        expect(self.radius > 0 and 0 <= self.smoothing <= 0.5, f"{where} radius, smoothing", "> 0, in [0, 0.5]",
               (self.radius, self.smoothing))
        check_statistics(self.statistics, f"{where}.statistics")


def defend(model: nn.Module, images: Tensor, labels: Tensor, config: SharpnessTuningConfig, *,
           generator: torch.Generator, augment: Augment | None = None,
           deadline: Deadline | None = None) -> DefenseResult:
    """Tune a copy of `model` by sharpness-aware steps: see `run_baseline`."""
    def repair(given: Given, training: Training) -> Repaired:
        return after_tuning(given.model, sharpness_tuning(given.model, training, config))

    return run_baseline("ft-sam", repair, model, images, labels, generator=generator, augment=augment,
                        deadline=deadline)


def sharpness_tuning(model: nn.Module, given: Training, config: SharpnessTuningConfig) -> Epochs:
    """Tune all parameters of `model` in place; it ends in its last finite state, in training mode."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, config.rate, config.momentum, weight_decay=config.decay)
    taken = 0

    def descend(images: Tensor, labels: Tensor) -> Tensor:
        nonlocal taken
        loss, here = _gradients(model, parameters, images, labels, config.smoothing)
        with torch.no_grad():
            weights = [p.clone() for p in parameters]
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, here, strict=True)]
            torch._foreach_add_(parameters, steepest(parameters, filled, config))
        with statistics_kept(model):
            _, there = _gradients(model, parameters, images, labels, config.smoothing)
        with torch.no_grad():
            torch._foreach_copy_(parameters, weights)  # exact, which subtracting the move is not
        for parameter, gradient in zip(parameters, there, strict=True):
            parameter.grad = gradient  # None where it is not used: it then does not decay either
        set_rate(optimiser, cosine_rate(config.rate, taken, config.horizon))
        optimiser.step()
        taken += 1
        return loss

    training_mode(model, config.statistics)
    return run_epochs(model, given, descend, epochs=config.epochs, batch=config.batch)


@torch.no_grad()
def steepest(weights: Sequence[Tensor], gradients: Sequence[Tensor], config: SharpnessTuningConfig) -> list[Tensor]:
    """The step uphill of each tensor: radius * g / |g|, or, adaptive, radius * w^2 * g / |w * g|, norms over all."""
    scaled = [weight.abs() * g for weight, g in zip(weights, gradients, strict=True)] if config.adaptive else gradients
    norm = torch.stack([part.norm() for part in scaled]).norm() + TINY
    if config.adaptive:
        scaled = [weight.abs() * part for weight, part in zip(weights, scaled, strict=True)]
    return [config.radius / norm * part for part in scaled]


def _gradients(model: nn.Module, parameters: Sequence[Tensor], images: Tensor, labels: Tensor,
               smoothing: float) -> tuple[Tensor, list[Tensor | None]]:
    """(loss, gradients, None of what is not used)."""
    logits = model(images)
    classes = logits.shape[1]
    share = smoothing * classes / (classes - 1)  # torch shares it among all classes, the label's too
    loss = cross_entropy(logits, labels, label_smoothing=share)
    return loss.detach(), list(torch.autograd.grad(loss, parameters, allow_unused=True))
