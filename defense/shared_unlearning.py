"""SAU: perturbations that mislead the network as they mislead the given one are unlearned.

Paper: Wei et al., Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared Adversarial Examples,
NeurIPS 2023, arXiv:2307.10562. Each batch is perturbed so that the network and a frozen copy of the given one answer
alike and wrongly; then the network lowers its probability of the copy's wrong answers. Defaults as in BackdoorBench
(arXiv:2206.12654).
Departs from it: batches are as equal as can be, and augmented where an augmentation is given. The images given are
normalised already, so the perturbation's size is a share of the range that each channel has on the clean images, which
is a share of [0, 1] where they reach from black to white.
"""
from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data.errors import expect
from defense.baseline import Repaired, after_tuning, run_baseline
from defense.deadline import Deadline
from defense.given import Given
from defense.results import DefenseResult
from defense.training import Augment, Epochs, Training, run_epochs

LEAST = 1e-8   # probability in the divergence, as published
SHARED = 1e-3  # a smaller probability of the wrong answer has no gradient, as published
TINY = 1e-6    # beside it in the logarithm


@dataclass(frozen=True)
class SharedUnlearningConfig:
    rounds: int = 100          # over the clean images
    rate: float = 1e-4         # Adam
    batch: int = 256           # images at most
    radius: float = 0.2        # largest change of a pixel, as a share of its channel's range
    step: float = 0.2          # of the perturbation down its loss's sign, in the same unit
    steps: int = 5
    wrong: float = 0.01        # weight of the cross-entropy that the perturbation raises, beside the divergence
    clean: float = 1.0         # weight of the images' own cross-entropy
    shared: float = 1.0        # weight of the shared wrong answers

    def __post_init__(self) -> None:
        where = "SharedUnlearningConfig"
        expect(self.rounds > 0 and self.batch > 1 and self.steps > 0, f"{where} rounds, batch, steps",
               "> 0, > 1, > 0", (self.rounds, self.batch, self.steps))
        expect(self.rate > 0 and self.radius > 0 and self.step > 0, f"{where} rate, radius, step", "> 0",
               (self.rate, self.radius, self.step))
        expect(self.wrong >= 0 and self.clean >= 0 and self.shared >= 0, f"{where} wrong, clean, shared", ">= 0",
               (self.wrong, self.clean, self.shared))


def defend(model: nn.Module, images: Tensor, labels: Tensor, config: SharedUnlearningConfig, *,
           generator: torch.Generator, augment: Augment | None = None,
           deadline: Deadline | None = None) -> DefenseResult:
    """Unlearn shared perturbations on a copy of `model`: see `run_baseline`. Norms keep their statistics."""
    def repair(given: Given, training: Training) -> Repaired:
        return after_tuning(given.model, shared_unlearning(given.model, training, config))

    return run_baseline("sau", repair, model, images, labels, generator=generator, augment=augment,
                        deadline=deadline)


def shared_unlearning(model: nn.Module, given: Training, config: SharedUnlearningConfig) -> Epochs:
    """Change all parameters of `model` in place, in evaluation mode, in which it ends."""
    model.eval()
    reference = copy.deepcopy(model).requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, config.rate)
    extent = given.images.amax((0, 2, 3), keepdim=True) - given.images.amin((0, 2, 3), keepdim=True)  # (1, C, 1, 1)

    def descend(images: Tensor, labels: Tensor) -> Tensor:
        moved = images + shared_perturbation(model, reference, images, labels, extent, config)
        with torch.no_grad():
            answers, own = reference(moved).argmax(1), reference(images).argmax(1)
        logits, misled = model(torch.cat([images, moved])).split(len(images))
        loss = config.clean * cross_entropy(logits, labels) \
            + config.shared * shared_risk(misled, answers, (answers != labels) & (answers != own))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.detach()

    return run_epochs(model, given, descend, epochs=config.rounds, batch=config.batch)


def shared_perturbation(model: nn.Module, reference: nn.Module, images: Tensor, labels: Tensor, extent: Tensor,
                        config: SharedUnlearningConfig) -> Tensor:
    """(B, C, H, W) change of each image, from the largest, `steps` signed steps down `perturbation_loss`, clipped.

    extent: (1, C, 1, 1), of which `radius` and `step` are shares. Ends when all answers are shared.
    """
    with torch.no_grad():
        before = model(images).argmax(1), reference(images).argmax(1)
    bound = config.radius * extent
    delta = bound.expand_as(images).clone()
    for _ in range(config.steps):
        delta.requires_grad_()
        logits = model(images + delta), reference(images + delta)
        loss, shared = perturbation_loss(logits, before, labels, config.wrong)
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = delta.detach() - config.step * extent * gradient.sign()
        delta = torch.minimum(torch.maximum(delta, -bound), bound)
        if shared:
            break
    return delta


def perturbation_loss(logits: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], labels: Tensor,
                      wrong: float) -> tuple[Tensor, bool]:
    """(mean over the images of what a perturbation lowers, whether all of them have a shared wrong answer).

    logits: (B, K) each, of both networks on the perturbed images; before: (B,) classes each, without. The
    Jensen-Shannon divergence of both networks counts where the answer is not yet shared, minus `wrong` times the
    cross-entropy, halved, where a network's class is not yet changed.
    """
    classes = [part.argmax(1) for part in logits]
    changed = [now != then for now, then in zip(classes, before, strict=True)]
    shared = changed[0] & changed[1] & (classes[0] == classes[1])
    entropies = sum(cross_entropy(part, labels, reduction="none") * ~done
                    for part, done in zip(logits, changed, strict=True))
    divergence = jensen_shannon(logits[0].softmax(1), logits[1].softmax(1)) * ~shared
    return (divergence - wrong * entropies / 2).mean(), bool(shared.all())


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """(B,) divergence, in [0, log 2], of (B, K) probabilities."""
    first, second = first.clamp_min(LEAST), second.clamp_min(LEAST)
    middle = ((first + second) / 2).log()
    return (first * (first.log() - middle) + second * (second.log() - middle)).sum(1) / 2


def shared_risk(logits: Tensor, answers: Tensor, misled: Tensor) -> Tensor:
    """Mean over (B, K) logits of -log(1 - probability of `answers`), zero where the reference is not `misled`.

    answers, misled: (B,), the reference's classes of the perturbed images and whether they are wrong.
    """
    probability = logits.softmax(1).gather(1, answers[:, None])[:, 0]
    return -((1 + TINY - probability.clamp_min(SHARED)).log() * misled).mean()
