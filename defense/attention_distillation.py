"""NAD: the network learns to look where a fine-tuned copy of it looks.

Paper: Li et al., Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks, ICLR 2021,
arXiv:2101.05930. The teacher is the given network tuned on the clean images; the student, the given network again, is
tuned with the distance of both attention maps in the loss. Settings as in BackdoorBench (arXiv:2206.12654).
Departs from it: its third map, of the 1x1 pooled features, is left out, as a normalised map of one place is always 1;
the student's statistics see each batch once, where BackdoorBench passes it once for the loss and once for each map.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from data.errors import expect
from defense.baseline import Repaired, after_tuning, run_baseline
from defense.deadline import Deadline
from defense.fine_tuning import FineTuningConfig, fine_tuning
from defense.given import Given
from defense.results import DefenseResult
from defense.training import Augment, Epochs, Training

TEACHER_SHARE = 0.4  # of the time there is, at most: the student passes each batch through both
TINY = 1e-6          # beside the norm of a map, as published


def _teacher() -> FineTuningConfig:
    return FineTuningConfig(epochs=10, horizon=100)  # the cosine of BackdoorBench goes on for 100


def _student() -> FineTuningConfig:
    return FineTuningConfig(epochs=10, horizon=math.inf)  # there a constant rate


@dataclass(frozen=True)
class AttentionDistillationConfig:
    layers: tuple[str, ...] = ("layer3", "layer4")  # modules whose outputs are compared: the last of a ResNet
    weights: tuple[float, ...] = (500.0, 1000.0)    # of each one's distance, beside the cross-entropy
    teacher: FineTuningConfig = field(default_factory=_teacher)
    student: FineTuningConfig = field(default_factory=_student)

    def __post_init__(self) -> None:
        where = "AttentionDistillationConfig"
        expect(self.layers and len(set(self.layers)) == len(self.layers), f"{where}.layers", "different names",
               self.layers)
        expect(len(self.weights) == len(self.layers) and min(self.weights) >= 0, f"{where}.weights",
               f"{len(self.layers)} of them, >= 0", self.weights)


def defend(model: nn.Module, images: Tensor, labels: Tensor, config: AttentionDistillationConfig, *,
           generator: torch.Generator, augment: Augment | None = None,
           deadline: Deadline | None = None) -> DefenseResult:
    """Distil a copy of `model`: see `run_baseline`. Other nets than ResNets need `config.layers` of their own."""
    return run_baseline("nad", partial(_repair, config=config), model, images, labels,
                        generator=generator, augment=augment, deadline=deadline)


def _repair(given: Given, training: Training, config: AttentionDistillationConfig) -> Repaired:
    known = dict(given.model.named_modules())
    for name in config.layers:
        expect(name in known, "AttentionDistillationConfig.layers", "names of modules of the model", name)
    teacher = copy.deepcopy(given.model)
    taught = fine_tuning(teacher, replace(training, deadline=training.deadline.part(TEACHER_SHARE)), config.teacher)
    if not taught.losses:
        failed = "no time to tune the teacher" if taught.finite else "no finite epoch of the teacher"
        return Repaired(given.model, taught.finite, taught.complete, failed)
    learned = distil(given.model, teacher, training, config)
    both = replace(learned, finite=learned.finite and taught.finite, complete=learned.complete and taught.complete)
    return after_tuning(given.model, both, {"teacher_epochs": len(taught.losses)})


def distil(student: nn.Module, teacher: nn.Module, given: Training, config: AttentionDistillationConfig) -> Epochs:
    """Tune `student` in place on cross-entropy and the weighted distances of its attention maps from the teacher's.

    The teacher is set to evaluation mode, its parameters without gradient.
    """
    teacher.eval().requires_grad_(False)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        theirs.clear()
        ours.clear()
        teacher(images)
        total = cross_entropy(student(images), labels)
        for name, weight in zip(config.layers, config.weights, strict=True):
            total = total + weight * mse_loss(attention_map(ours[name]), attention_map(theirs[name]))
        return total

    with outputs_of(student, config.layers) as ours, outputs_of(teacher, config.layers) as theirs:
        return fine_tuning(student, given, config.student, loss=loss)


def attention_map(features: Tensor) -> Tensor:
    """(B, C, H, W) features, or (B, T, C) of tokens, to (B, H * W) or (B, T): squares summed over C, of length 1."""
    shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    expect(len(shape) in (3, 4) and isinstance(shape, tuple), "AttentionDistillationConfig.layers",
           "modules that give (B, C, H, W) or (B, T, C)", shape)
    squares = features.square().sum(1 if features.ndim == 4 else 2).flatten(1)
    return squares / (squares.norm(dim=1, keepdim=True) + TINY)


@contextmanager
def outputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """For a while each pass through `model` leaves the outputs of these modules in the dictionary, by name."""
    seen: dict[str, Tensor] = {}
    handles = [model.get_submodule(name).register_forward_hook(
        lambda module, inputs, output, name=name: seen.__setitem__(name, output)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
