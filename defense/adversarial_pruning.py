"""ANP: neurons that matter when the weights of the norms are disturbed for the worst are cut off.

Paper: Wu and Wang, Adversarial Neuron Pruning Purifies Backdoored Deep Models, NeurIPS 2021, arXiv:2110.14430. A mask
in [0, 1] on each channel's norm weight is learned so that the clean images keep their classes with and without noise
on the norms' weights and biases, the noise climbing the loss; weights with small masks become zero. Rates, steps and
thresholds as in BackdoorBench (arXiv:2206.12654).
Departs from it: BackdoorBench takes the threshold with the lowest attack success on poisoned test images among those
that cost less than a tenth of the test accuracy. That is an oracle. Here the largest threshold is taken up to which
held-out clean images lose less than that share; the oracle is `oracle_pruning.py`. Batches hold every image once an
epoch, where they are drawn with replacement; layer and group norms have masks where a model has no batch norm.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from data.errors import expect
from defense.baseline import Repaired, clean_accuracy, run_baseline
from defense.deadline import Deadline
from defense.given import Given
from defense.neuron_ratio import RatioConfig, split_clean, subset
from defense.results import DefenseResult
from defense.training import (
    Augment,
    Epochs,
    Training,
    batch_count,
    check_statistics,
    run_epochs,
    statistics_kept,
    training_mode,
)

MaskLoss = Callable[[nn.ParameterList, Tensor, Tensor], Tensor]  # of the masks on a batch and its labels
LEARNING_SHARE = 0.9  # of the time there is, at most; the rest is for the thresholds


@dataclass(frozen=True)
class AdversarialPruningConfig:
    rate: float = 0.01         # SGD on the masks
    momentum: float = 0.9
    batch: int = 256           # images at most
    steps: int = 2000          # of learning the masks, rounded up to whole epochs
    noise: float = 0.4         # largest relative change where the noise starts, and length of its climb
    climbs: int = 1            # steps of the noise up the loss's sign, for each step of the masks
    clean: float = 0.2         # share of the loss without noise, in [0, 1]
    threshold: float | None = None  # masks up to it are cut; None = chosen on held-out images
    thresholds: tuple[float, ...] = tuple(round(0.05 * i, 2) for i in range(19))  # to choose from, 0 to 0.9
    drop: float = 0.1          # of held-out accuracy, as a share of it, that pruning stays below
    held_out: float = 0.2      # share of the images that judge; of few images half, up to 20
    fallback: float = 0.2      # the threshold where images or time do not allow a choice; the paper's
    statistics: str = "batch"  # of batch norms while masks are learned: "batch" as published, "running"

    def __post_init__(self) -> None:
        where = "AdversarialPruningConfig"
        expect(self.rate > 0 and 0 <= self.momentum < 1, f"{where} rate, momentum", "> 0, in [0, 1)",
               (self.rate, self.momentum))
        expect(self.batch > 1 and self.steps > 0, f"{where} batch, steps", "> 1, > 0", (self.batch, self.steps))
        expect(self.noise >= 0 and self.climbs > 0, f"{where} noise, climbs", ">= 0, > 0", (self.noise, self.climbs))
        expect(0 <= self.clean <= 1, f"{where}.clean", "in [0, 1]", self.clean)
        rising = list(self.thresholds) == sorted(set(self.thresholds))
        expect(self.thresholds and rising and self.thresholds[0] >= 0 and self.thresholds[-1] < 1,
               f"{where}.thresholds", "rising numbers in [0, 1)", self.thresholds)
        for name in ("threshold", "fallback"):
            value = getattr(self, name)
            expect(value is None or 0 <= value < 1, f"{where}.{name}", "in [0, 1)", value)
        expect(0 < self.drop <= 1 and 0 < self.held_out < 1, f"{where} drop, held_out", "in (0, 1], in (0, 1)",
               (self.drop, self.held_out))
        check_statistics(self.statistics, f"{where}.statistics")


def defend(model: nn.Module, images: Tensor, labels: Tensor, config: AdversarialPruningConfig, *,
           generator: torch.Generator, augment: Augment | None = None,
           deadline: Deadline | None = None) -> DefenseResult:
    """Prune a copy of `model`: see `run_baseline`. Where no threshold keeps the accuracy, it counts as failed."""
    return run_baseline("anp", partial(_repair, config=config), model, images, labels,
                        generator=generator, augment=augment, deadline=deadline)


def _repair(given: Given, training: Training, config: AdversarialPruningConfig) -> Repaired:
    fixed = config.threshold is not None
    split = None if fixed else split_clean(given.labels, RatioConfig(held_out=config.held_out),
                                           generator=training.generator)
    learning = replace(training, deadline=training.deadline.part(LEARNING_SHARE))
    if split:
        images, labels = subset((given.images, given.labels), split[0])
        learning = replace(learning, images=images, labels=labels)
    masks, epochs = learn_masks(given.model, learning, config)
    if not epochs.losses:
        failed = "no time to learn the masks" if epochs.finite else "no finite epoch of the masks"
        return Repaired(given.model, epochs.finite, epochs.complete, failed)
    threshold, tried, searched = config.threshold if fixed else config.fallback, {}, True
    if split:
        judges = subset((given.images, given.labels), split[1])
        threshold, tried, searched = choose_threshold(given.model, masks, *judges, config, training.deadline)
    epochs = replace(epochs, complete=epochs.complete and searched)
    details: dict[str, Any] = {"threshold": threshold, "tried": {str(key): value for key, value in tried.items()}}
    if threshold is None:
        return Repaired(given.model, epochs.finite, epochs.complete, "no threshold keeps the accuracy",
                        epochs.losses, details)
    details["pruned"] = prune(given.model, masks, threshold)
    return Repaired(given.model, epochs.finite, epochs.complete, "", epochs.losses, details)


def masked_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The batch norms with weights by name; layer and group norms where there is none. InputError without either."""
    for kinds in ((_BatchNorm,), (nn.LayerNorm, nn.GroupNorm)):
        found = {name: module for name, module in model.named_modules()
                 if isinstance(module, kinds) and module.weight is not None}
        if found:
            return found
    expect(False, "model", "batch, layer or group norms with weights", "none")
    return {}


def learn_masks(model: nn.Module, given: Training,
                config: AdversarialPruningConfig) -> tuple[dict[str, Tensor], Epochs]:
    """(masks in [0, 1] by name of the norm, of its weight's shape, smaller = more suspicious; how learning went).

    The weights and statistics of `model` stay; it ends in training mode.
    """
    norms = masked_norms(model)

    def loss(masks: nn.ParameterList, images: Tensor, labels: Tensor) -> Tensor:
        noise = _climbed(model, norms, masks, images, labels, given.generator, config)
        clean = config.clean * masked_loss(model, norms, masks, None, images, labels)
        return clean + (1 - config.clean) * masked_loss(model, norms, masks, noise, images, labels)

    return tuned_masks(model, norms, given, loss, rate=config.rate, momentum=config.momentum,
                       epochs=-(-config.steps // batch_count(len(given.images), config.batch)), batch=config.batch,
                       statistics=config.statistics)


def tuned_masks(model: nn.Module, norms: Mapping[str, nn.Module], given: Training, loss: MaskLoss, *,
                rate: float, momentum: float, epochs: int, batch: int,
                statistics: str) -> tuple[dict[str, Tensor], Epochs]:
    """(masks, from ones, in [0, 1], by name of the norm; how it went): SGD on the masks of `norms` down `loss`.

    The weights and statistics of `model` stay; it ends in training mode.
    """
    masks = nn.ParameterList(torch.ones_like(norm.weight) for norm in norms.values())
    optimiser = torch.optim.SGD(masks.parameters(), rate, momentum)

    def descend(images: Tensor, labels: Tensor) -> Tensor:
        value = loss(masks, images, labels)
        for mask, gradient in zip(masks, torch.autograd.grad(value, list(masks)), strict=True):
            mask.grad = gradient
        optimiser.step()
        with torch.no_grad():
            for mask in masks:
                mask.clamp_(0, 1)
        return value.detach()

    training_mode(model, statistics)
    with statistics_kept(model):
        found = run_epochs(masks, given, descend, epochs=epochs, batch=batch)
    return {name: mask.detach() for name, mask in zip(norms, masks, strict=True)}, found


def _climbed(model: nn.Module, norms: Mapping[str, nn.Module], masks: nn.ParameterList, images: Tensor,
             labels: Tensor, generator: torch.Generator, config: AdversarialPruningConfig) -> list[Tensor]:
    """Relative noise on every weight, then on every bias: drawn evenly in +- `noise`, then moved up the loss."""
    places = [norm.weight for norm in norms.values()] + [n.bias for n in norms.values() if n.bias is not None]
    fixed = [mask.detach() for mask in masks]
    noise = [(2 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 1).to(p.device) * config.noise
             for p in places]
    for _ in range(config.climbs):
        noise = [part.requires_grad_() for part in noise]
        gradients = torch.autograd.grad(masked_loss(model, norms, fixed, noise, images, labels), noise)
        noise = [part.detach() + config.noise / config.climbs * gradient.sign()
                 for part, gradient in zip(noise, gradients, strict=True)]  # may leave +- `noise`, as published
    return noise


def masked_loss(model: nn.Module, norms: Mapping[str, nn.Module], masks: nn.ParameterList | list[Tensor],
                noise: list[Tensor] | None, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with weights * (mask + noise) and biases * (1 + noise) in the norms."""
    parts = iter(noise or [])
    changed = {f"{name}.weight": norm.weight.detach() * (mask + next(parts) if noise else mask)
               for (name, norm), mask in zip(norms.items(), masks, strict=True)}
    for name, norm in norms.items() if noise else ():
        if norm.bias is not None:
            changed[f"{name}.bias"] = norm.bias.detach() * (1 + next(parts))
    return cross_entropy(functional_call(model, changed, (images,)), labels)


def choose_threshold(model: nn.Module, masks: Mapping[str, Tensor], images: Tensor, labels: Tensor,
                     config: AdversarialPruningConfig,
                     deadline: Deadline) -> tuple[float | None, dict[float, float], bool]:
    """(the largest threshold up to which accuracy falls by less than `drop` of itself, accuracy of each tried, whether
    time allowed the whole search).

    None where already the smallest costs more; the fallback where time allows none to be tried. `model` stays.
    """
    whole, chosen, tried = clean_accuracy(model, images, labels), None, {}
    ours = copy.deepcopy(model)
    for threshold in config.thresholds:
        if deadline():
            return (chosen if tried else config.fallback), tried, False
        prune(ours, masks, threshold)  # thresholds rise: what was cut before is cut now
        tried[threshold] = clean_accuracy(ours, images, labels)
        if tried[threshold] <= (1 - config.drop) * whole:
            break
        chosen = threshold
    return chosen, tried, True


@torch.no_grad()
def prune(model: nn.Module, masks: Mapping[str, Tensor], threshold: float) -> int:
    """Zero the norms' weights whose masks are at most `threshold`, in place; how many. Biases stay, as published."""
    count = 0
    for name, mask in masks.items():
        cut = mask <= threshold
        model.get_submodule(name).weight[cut] = 0
        count += int(cut.sum())
    return count
