"""ANP with the threshold that the triggered test images like best: an oracle, to set beside published figures.

BackdoorBench (arXiv:2206.12654) reports adversarial neuron pruning at the threshold with the lowest attack success on
triggered test images, among those that cost less than a tenth of the test accuracy. No defender has such images:
`adversarial_pruning.py` is the method without them, and figures of the two are not to be compared as equals.
Departs from it: a gain of accuracy never counts against a threshold, there one of more than a tenth does.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from data.errors import expect
from defense.adversarial_pruning import LEARNING_SHARE, AdversarialPruningConfig, learn_masks, prune
from defense.baseline import Repaired, run_baseline
from defense.deadline import Deadline
from defense.given import Given
from defense.metrics import accuracy, attack_success
from defense.results import DefenseResult
from defense.training import Augment, Training, predicted_classes


@dataclass(frozen=True)
class OracleTest:
    """images: (N, C, H, W) clean test images as the model takes them. labels: (N,) int64, true. target: the attack's.

    triggered: those images with the trigger, in the same order, or what makes them of `images`; those of the
    target's own class do not count.
    """

    images: Tensor
    labels: Tensor
    triggered: Tensor | Callable[[Tensor], Tensor]
    target: int

    def like(self, model: nn.Module) -> OracleTest:
        """On the model's device and in its dtype, the triggered images made. Wrong shapes are named."""
        first = next(p for p in model.parameters() if p.is_floating_point())
        images = self.images.to(first.device, first.dtype)
        made = self.triggered if isinstance(self.triggered, Tensor) else self.triggered(self.images)
        expect(made.shape == images.shape, "OracleTest.triggered", f"{tuple(images.shape)} as the images",
               tuple(made.shape))
        expect(self.labels.shape == images.shape[:1], "OracleTest.labels", f"one for each of {len(images)} images",
               tuple(self.labels.shape))
        return OracleTest(images, self.labels.to(first.device), made.to(first.device, first.dtype), self.target)

    def judge(self, model: nn.Module) -> tuple[float, float]:
        """(ACC, ASR) of the model."""
        return (accuracy(predicted_classes(model, self.images), self.labels),
                attack_success(predicted_classes(model, self.triggered), self.labels, self.target))


@dataclass(frozen=True)
class OraclePruningConfig:
    """pruning: its `threshold`, `held_out` and `fallback` are not used; all clean images learn the masks."""

    pruning: AdversarialPruningConfig = field(default_factory=AdversarialPruningConfig)
    test: OracleTest | None = field(default=None, compare=False, repr=False)  # required: the caller fills it in


def defend(model: nn.Module, images: Tensor, labels: Tensor, config: OraclePruningConfig, *,
           generator: torch.Generator, augment: Augment | None = None,
           deadline: Deadline | None = None) -> DefenseResult:
    """Prune a copy of `model`: see `run_baseline`. Where no threshold lowers the attack's success, it failed."""
    test = config.test
    expect(test is not None, "OraclePruningConfig.test", "an OracleTest, the triggered test images", "none")

    def repair(given: Given, training: Training) -> Repaired:
        learning = replace(training, deadline=training.deadline.part(LEARNING_SHARE))
        masks, epochs = learn_masks(given.model, learning, config.pruning)
        details = {"oracle": "threshold chosen by attack success on triggered test images"}
        if not epochs.losses:
            failed = "no time to learn the masks" if epochs.finite else "no finite epoch of the masks"
            return Repaired(given.model, epochs.finite, epochs.complete, failed, details=details)
        threshold, tried = best_threshold(given.model, masks, test.like(given.model), config.pruning,
                                          training.deadline)
        details |= {"threshold": threshold, "tried": {str(key): list(value) for key, value in tried.items()}}
        if threshold is not None:
            details["pruned"] = prune(given.model, masks, threshold)
        failed = "" if threshold is not None else "no threshold lowers the attack's success"
        complete = epochs.complete and len(tried) == len(config.pruning.thresholds)
        return Repaired(given.model, epochs.finite, complete, failed, epochs.losses, details)

    return run_baseline("anp-oracle", repair, model, images, labels, generator=generator, augment=augment,
                        deadline=deadline)


def best_threshold(model: nn.Module, masks: Mapping[str, Tensor], test: OracleTest, config: AdversarialPruningConfig,
                   deadline: Deadline) -> tuple[float | None, dict[float, tuple[float, float]]]:
    """(the threshold of the lowest ASR, below the model's own, that costs less than `drop` of ACC; (ACC, ASR) of each).

    Of equal ones the smallest; None where there is none, in the time there is. `model` stays.
    """
    ours, chosen, tried = copy.deepcopy(model), None, {}
    whole, lowest = test.judge(ours)
    for threshold in config.thresholds:
        if deadline():
            break
        prune(ours, masks, threshold)  # thresholds rise: what was cut before is cut now
        tried[threshold] = found, success = test.judge(ours)
        if found > (1 - config.drop) * whole and success < lowest:
            chosen, lowest = threshold, success
    return chosen, tried
