"""TSBD: two-stage backdoor defense from a model and a few clean images.

Paper: Lin et al., Unveiling and Mitigating Backdoor Vulnerabilities based on Unlearning Weight Changes and Backdoor
Activeness, NeurIPS 2024, arXiv:2405.20291. Unlearn the clean images (`unlearning.py`), rank the neurons by how far
their weights moved (`weight_change.py`), zero the most moved weights of the given model (`zero_reinitialisation.py`),
tune with the gradient's norm in the loss (`activeness_tuning.py`).
Departs from it: the ratio of neurons is chosen on clean images alone (`neuron_ratio.py`; the released code sweeps it
and names no rule); what each stage departs in stands in its head.
"""
from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import expect
from defense.activeness_tuning import TuningConfig, activeness_aware_finetuning
from defense.baseline import returned
from defense.deadline import Deadline
from defense.given import Given, own_randomness, take
from defense.neuron_ratio import RatioConfig, largest_bearable, split_clean, subset
from defense.neurons import KINDS, neuron_weights
from defense.results import DefenseResult
from defense.training import Augment, Epochs, Training, predicted_classes
from defense.unlearning import Unlearned, UnlearningConfig, clean_unlearning
from defense.weight_change import weight_change
from defense.zero_reinitialisation import ReinitialisationConfig, weights_to_zero, zero_reinitialisation

UNLEARNING_SHARE = 0.3  # of the time there is, at most
TUNING_STEP = 2         # passes forward and back, in those of an unlearning step: until tuning has been timed


@dataclass(frozen=True)
class TSBDConfig:
    neurons: float | None = None  # n, share of neurons that are re-initialised; None = chosen by `ratio`
    weights: float = 0.7          # m, share of their weights
    scheme: str = "V3"
    kinds: str = "auto"           # of layers whose neurons count: `neuron_weights`
    unlearning: UnlearningConfig = field(default_factory=UnlearningConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    ratio: RatioConfig = field(default_factory=RatioConfig)

    def __post_init__(self) -> None:
        ReinitialisationConfig(0.15 if self.neurons is None else self.neurons, self.weights, self.scheme)
        expect(self.kinds in KINDS, "TSBDConfig.kinds", f"one of {', '.join(KINDS)}", self.kinds)


def defend(model: nn.Module, images: Tensor, labels: Tensor, config: TSBDConfig, *, generator: torch.Generator,
           augment: Augment | None = None, deadline: Deadline | None = None) -> DefenseResult:
    """Repair a copy of `model`; model, tensors and torch's global generators stay as they are.

    images: (N, C, H, W) float as the model takes them. labels: (N,) integers, their classes. generator: on the CPU.
    augment: of every training batch. At the deadline the work ends with the last finite state; without time for
    a single step of tuning, without a finite unlearning, or where tuning ends at chance or in numbers that the
    model's dtype cannot hold, the model is returned unrepaired and `failed` says so.
    """
    deadline = deadline or Deadline()
    with own_randomness(next(model.parameters(), torch.empty(0)).device, generator=generator):
        given = take(model, images, labels)
        training = Training(given.images, given.labels, generator, augment, deadline)
        layers = neuron_weights(given.model, given.num_classes, config.kinds)
        unlearned = clean_unlearning(given.model, replace(training, deadline=deadline.part(UNLEARNING_SHARE)),
                                     given.num_classes, config.unlearning)
        change = weight_change(layers, dict(unlearned.model.named_parameters()))
        begun = deadline.elapsed()
        details = {"unlearning": _unlearning_record(unlearned), "missing_classes": list(given.missing),
                   "clean_accuracy": _accuracy(given.model, given)}
        judging = deadline.elapsed() - begun  # seconds that judging the repaired model will take too
        if not unlearned.epochs.losses:
            return _result(model, given.model, unlearned.epochs, details, deadline,
                           "no finite epoch of unlearning" if not unlearned.epochs.finite else "no time to unlearn")
        ratio, tried, searched = _neuron_ratio(given, change, training, config)
        details |= {"neurons": ratio, "tried": {str(key): value for key, value in tried.items()}}
        repaired, epochs = _repaired(given.model, change, ratio, training, config)
        judged = bool(epochs.losses) and deadline.elapsed() + judging <= deadline.end - deadline.start
        details["clean_accuracy_repaired"] = _accuracy(repaired, given) if judged else None
        failed = _failure(epochs, details, given.num_classes)
        epochs = replace(epochs, finite=epochs.finite and unlearned.epochs.finite,
                         complete=epochs.complete and unlearned.epochs.complete and searched)
        return _result(model, repaired, epochs, details, deadline, failed)


def _neuron_ratio(given: Given, change: Mapping[str, Tensor], training: Training,
                  config: TSBDConfig) -> tuple[float, dict[float, float], bool]:
    """(n, held-out accuracy of every n tried, whether no trial was wanting)."""
    if config.neurons is not None:
        return config.neurons, {}, True
    split = split_clean(given.labels, config.ratio, generator=training.generator)
    if split is None:
        return config.ratio.fallback, {}, True
    images, labels = subset((given.images, given.labels), split[0])
    judges, truth = subset((given.images, given.labels), split[1])
    part = replace(training, images=images, labels=labels)
    needed = config.tuning.steps_of(len(images)) + config.tuning.steps_of(len(given.images))  # for it and the repair
    timed, searched = 0, True

    def judge(ratio: float) -> float | None:
        nonlocal timed, searched
        found = None
        if training.deadline.fits(needed if timed else TUNING_STEP * needed, latest=timed):
            tuned, epochs = _repaired(given.model, change, ratio, part, config)
            timed += epochs.steps
            found = _held_out_accuracy(tuned, epochs, ratio, judges, truth)
        searched = searched and found is not None
        return found

    return *largest_bearable(judge, config.ratio, len(judges)), searched


def _held_out_accuracy(tuned: nn.Module, epochs: Epochs, ratio: float, judges: Tensor, truth: Tensor) -> float | None:
    if not epochs.finite:  # a ratio that tuning cannot bear; or, without one, no mark to measure others by
        return 0.0 if ratio > 0 else None
    return (predicted_classes(tuned, judges) == truth).double().mean().item() if epochs.complete else None


def _repaired(model: nn.Module, change: Mapping[str, Tensor], ratio: float, training: Training,
              config: TSBDConfig) -> tuple[nn.Module, Epochs]:
    """A copy of `model`, re-initialised (unless the ratio is 0) and tuned."""
    ours = copy.deepcopy(model)
    if ratio > 0:
        zero_reinitialisation(ours, weights_to_zero(
            change, ReinitialisationConfig(ratio, config.weights, config.scheme)))
    return ours, activeness_aware_finetuning(ours, training, config.tuning)


def _failure(epochs: Epochs, details: Mapping[str, Any], num_classes: int) -> str:
    """Why the tuned model is none to give back; empty where it is one."""
    if not epochs.losses:
        return "no time to tune" if epochs.finite else "no finite epoch of tuning"
    found = details["clean_accuracy_repaired"]
    lost = found is not None and found <= 1 / num_classes < details["clean_accuracy"]
    return f"the repaired model is lost: accuracy {found:.3f} on the clean images" if lost else ""


def _accuracy(model: nn.Module, given: Given) -> float:
    return (predicted_classes(model, given.images) == given.labels).double().mean().item()


def _unlearning_record(unlearned: Unlearned) -> dict[str, Any]:
    return {"epochs": len(unlearned.epochs.losses), "reached": unlearned.reached, "finite": unlearned.epochs.finite,
            "accuracy": unlearned.accuracy}


def _result(given: nn.Module, ours: nn.Module, epochs: Epochs, details: dict[str, Any], deadline: Deadline,
            failed: str) -> DefenseResult:
    repaired, failed = returned(ours, given, failed)
    return DefenseResult("tsbd", repaired, epochs.finite, epochs.complete, failed, epochs.losses, deadline.elapsed(),
                         details)
