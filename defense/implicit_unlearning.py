"""i-BAU: the network unlearns the one perturbation that misleads it most, and how that perturbation would follow it.

Paper: Zeng et al., Adversarial Unlearning of Backdoors via Implicit Hypergradient, ICLR 2022, arXiv:2110.03735. Each
round finds a perturbation of all images that changes their classes, then lowers the loss of the images when some of
them carry it. The gradient of that loss holds the perturbation's own dependence on the weights, which a fixed-point
iteration approximates (Grazzi et al., ICML 2020, arXiv:2006.16218). Defaults as in BackdoorBench (arXiv:2206.12654).
Departs from it: batches are drawn anew each round (there once), and are as equal as can be; at least one image of a
batch carries the perturbation, where a hundredth of fewer than 100 images is none.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from data.errors import expect
from defense.baseline import Repaired, after_tuning, run_baseline
from defense.deadline import Deadline
from defense.given import Given
from defense.results import DefenseResult
from defense.training import Augment, Epochs, Training, batch_count, epoch_batches, run_epochs

Loss = Callable[[Tensor], Tensor]  # of a perturbation, (1, C, H, W) to ()


@dataclass(frozen=True)
class ImplicitUnlearningConfig:
    rounds: int = 5
    rate: float = 1e-4           # Adam on the weights
    batch: int = 256             # images at most
    climb: float = 10.0          # SGD on the perturbation, from zero, one step a batch
    penalty: float = 1e-3        # of the perturbation's squared length
    share: float = 0.01          # of a batch that carries the perturbation; at least one image
    iterations: int = 5          # of the fixed point
    inner_rate: float = 0.1      # its step down the inner loss

    def __post_init__(self) -> None:
        where = "ImplicitUnlearningConfig"
        expect(self.rounds > 0 and self.batch > 1 and self.iterations > 0, f"{where} rounds, batch, iterations",
               "> 0, > 1, > 0", (self.rounds, self.batch, self.iterations))
        expect(self.rate > 0 and self.climb > 0 and self.inner_rate > 0, f"{where} rate, climb, inner_rate", "> 0",
               (self.rate, self.climb, self.inner_rate))
        expect(self.penalty >= 0 and 0 < self.share <= 1, f"{where} penalty, share", ">= 0, in (0, 1]",
               (self.penalty, self.share))


def defend(model: nn.Module, images: Tensor, labels: Tensor, config: ImplicitUnlearningConfig, *,
           generator: torch.Generator, augment: Augment | None = None,
           deadline: Deadline | None = None) -> DefenseResult:
    """Unlearn perturbations on a copy of `model`: see `run_baseline`. Norms keep their statistics."""
    def repair(given: Given, training: Training) -> Repaired:
        return after_tuning(given.model, implicit_unlearning(given.model, training, config))

    return run_baseline("i-bau", repair, model, images, labels, generator=generator, augment=augment,
                        deadline=deadline)


def implicit_unlearning(model: nn.Module, given: Training, config: ImplicitUnlearningConfig) -> Epochs:
    """Change all parameters of `model` in place, in evaluation mode, in which it ends."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, config.rate)
    first: list[tuple[Tensor, Tensor]] = []  # one batch stands for the inner problem, as published
    found, left = given.images[:1], 0

    def descend(images: Tensor, labels: Tensor) -> Tensor:
        nonlocal found, left
        if left == 0:
            found = universal_perturbation(model, given, config)
            left = batch_count(len(given.images), config.batch)
        left -= 1
        if not first:
            first.append((images, labels))
        loss, gradients = hypergradient(
            _carried(model, images, labels, config, generator=given.generator),
            lambda delta: _inner_loss(model, first[0][0], first[0][1], delta, config.penalty),
            found, parameters, rate=config.inner_rate, iterations=config.iterations)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        return loss

    model.eval()
    return run_epochs(model, given, descend, epochs=config.rounds, batch=config.batch)


def universal_perturbation(model: nn.Module, given: Training, config: ImplicitUnlearningConfig) -> Tensor:
    """(1, C, H, W) perturbation, from zero, of one pass over the images away from the classes that the model finds."""
    delta = torch.zeros_like(given.images[:1])
    for index in epoch_batches(len(given.images), config.batch, generator=given.generator):
        images = given.images[index.to(given.images.device)]
        images = given.augment(images, given.generator) if given.augment else images
        with torch.no_grad():
            classes = model(images).argmax(1)
        delta.requires_grad_()
        (gradient,) = torch.autograd.grad(_inner_loss(model, images, classes, delta, config.penalty), delta)
        delta = delta.detach() - config.climb * gradient
    return delta


def _inner_loss(model: nn.Module, images: Tensor, labels: Tensor, delta: Tensor, penalty: float) -> Tensor:
    """What the perturbation minimises: minus the cross-entropy of the images that carry it, plus its size."""
    return penalty * delta.square().sum() - cross_entropy(model(images + delta), labels)


def _carried(model: nn.Module, images: Tensor, labels: Tensor, config: ImplicitUnlearningConfig, *,
             generator: torch.Generator) -> Loss:
    """What the weights minimise: the cross-entropy of a batch of which `share`, drawn here, carries a perturbation."""
    count = max(1, int(config.share * len(images)))
    mask = torch.zeros(len(images), 1, 1, 1, dtype=images.dtype)
    mask[torch.randperm(len(images), generator=generator)[:count]] = 1
    mask = mask.to(images.device)
    return lambda delta: cross_entropy(model(images + mask * delta), labels)


def hypergradient(outer: Loss, inner: Loss, delta: Tensor, parameters: Sequence[Tensor], *, rate: float,
                  iterations: int) -> tuple[Tensor, list[Tensor | None]]:
    """(outer loss, its gradient in the parameters where `delta` minimises `inner`, None of what is not used).

    With the step P(d) = d - rate * inner'(d) and g = outer'(d), both at `delta`: the outer loss's own gradient plus
    (dP/dparameters)^T v, v the sum of (dP/dd)^T^k g over k < iterations.
    """
    delta = delta.detach().requires_grad_()
    loss = outer(delta)
    own, *direct = torch.autograd.grad(loss, [delta, *parameters], allow_unused=True)
    own = torch.zeros_like(delta) if own is None else own
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
        (slope,) = torch.autograd.grad(inner(delta), delta, create_graph=True)
    moved, v = delta - rate * slope, own
    for _ in range(iterations - 1):
        (back,) = torch.autograd.grad(moved, delta, v, retain_graph=True)
        v = back + own
    implicit = torch.autograd.grad(moved, parameters, v, allow_unused=True)
    return loss.detach(), [a if b is None else b if a is None else a + b
                           for a, b in zip(direct, implicit, strict=True)]
