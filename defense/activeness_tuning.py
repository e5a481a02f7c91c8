"""Activeness-aware fine-tuning: cross-entropy plus the norm of its gradient, which a backdoor makes large.

Paper: Lin et al., NeurIPS 2024, arXiv:2405.20291, third stage. Descends along (1 - mix) * g(w) + mix * g(w + radius *
g / |g|), g the gradient on the batch: the first-order form of loss + mix * radius * |g|.
The paper divides by the norm of the whole gradient, the released code by that of each parameter tensor, which moves
the weights sqrt(tensors) times as far; `norm` says which. Batch norms track the pass at the model's own weights only;
the released code tracks an extra pass after each step, the same statistics one step later.
Departs from the released code: a gradient of zero moves nothing (there NaN); small sets get as many steps as large.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data.errors import expect
from defense.training import Epochs, Training, batch_count, check_statistics, run_epochs, statistics_kept, training_mode

NORMS = ("per_tensor", "global")


@dataclass(frozen=True)
class TuningConfig:
    rate: float = 0.01          # SGD (released code)
    momentum: float = 0.9
    batch: int = 256            # images at most
    epochs: int = 20            # at least
    steps: int = 200            # at least: 20 epochs of 2,500 images, the published setting
    radius: float = 0.05        # r of the published step
    mix: float = 0.7            # alpha in [0, 1]; 0 = ordinary fine-tuning
    norm: str = "per_tensor"    # as released; "global" as in the paper
    statistics: str = "batch"   # of batch norms: "batch" as released, "running" = as they are

    def __post_init__(self) -> None:
        expect(self.rate > 0 and 0 <= self.momentum < 1, "TuningConfig rate, momentum", "> 0, in [0, 1)",
               (self.rate, self.momentum))
        expect(self.batch > 1, "TuningConfig.batch", "> 1", self.batch)
        expect(self.epochs > 0 and self.steps >= 0, "TuningConfig epochs, steps", "> 0, >= 0",
               (self.epochs, self.steps))
        expect(self.radius > 0 and 0 <= self.mix <= 1, "TuningConfig radius, mix", "> 0, in [0, 1]",
               (self.radius, self.mix))
        expect(self.norm in NORMS, "TuningConfig.norm", f"one of {', '.join(NORMS)}", self.norm)
        check_statistics(self.statistics, "TuningConfig.statistics")

    def epochs_of(self, count: int) -> int:
        """Epochs over `count` images: enough for `steps`."""
        return max(self.epochs, -(-self.steps // batch_count(count, self.batch)))

    def steps_of(self, count: int) -> int:
        """Steps of all epochs over `count` images."""
        return self.epochs_of(count) * batch_count(count, self.batch)


def activeness_aware_finetuning(model: nn.Module, given: Training, config: TuningConfig) -> Epochs:
    """Tune all parameters of `model` in place; it ends in its last finite state, in training mode."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, config.rate, config.momentum)

    def descend(images: Tensor, labels: Tensor) -> Tensor:
        loss, gradients = mixed_gradients(model, parameters, images, labels, config)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        return loss

    training_mode(model, config.statistics)
    return run_epochs(model, given, descend, epochs=config.epochs_of(len(given.images)), batch=config.batch)


def mixed_gradients(model: nn.Module, parameters: Sequence[Tensor], images: Tensor, labels: Tensor,
                    config: TuningConfig) -> tuple[Tensor, list[Tensor]]:
    """(loss at the model's weights, (1 - mix) * gradient there + mix * gradient a radius uphill); weights stay."""
    loss, here = _gradients(model, parameters, images, labels)
    if config.mix == 0:
        return loss, here
    with torch.no_grad():
        weights = [p.clone() for p in parameters]
        torch._foreach_add_(list(parameters), uphill(here, config))
    with statistics_kept(model):
        _, there = _gradients(model, parameters, images, labels)
    with torch.no_grad():
        torch._foreach_copy_(list(parameters), weights)  # exact, which subtracting the move is not
    return loss, torch._foreach_lerp(here, there, config.mix)


def uphill(gradients: Sequence[Tensor], config: TuningConfig) -> list[Tensor]:
    """The move of length `radius` along the gradient: of each tensor, or of all together; 0 for a zero gradient."""
    norms = torch.stack(torch._foreach_norm(list(gradients)))  # (tensors,)
    if config.norm == "global":
        norms = norms.norm().expand_as(norms)
    factors = torch.where(norms > 0, config.radius / norms, torch.zeros_like(norms))
    return torch._foreach_mul(list(gradients), list(factors.unbind()))


def _gradients(model: nn.Module, parameters: Sequence[Tensor], images: Tensor,
               labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    loss = cross_entropy(model(images), labels)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
