"""FP: the inputs of the last layer that clean images use least are cut off, then the network is tuned.

Paper: Liu et al., Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks, RAID 2018,
arXiv:1805.12185. Defaults as in BackdoorBench (arXiv:2206.12654): by mean input, six at a time, weights cut off stay
zero in tuning.
Departs from it: accuracy is judged on the clean images given, where BackdoorBench uses the test set; the last network
within the limit is kept, there the first beyond it; all inputs counted as cut are cut, there one less. The network may
have been trained on the clean images given: its accuracy on them then falls later than on others.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from data.errors import expect
from defense.baseline import Repaired, after_tuning, run_baseline
from defense.deadline import Deadline
from defense.fine_tuning import FineTuningConfig, fine_tuning
from defense.given import Given, evaluation
from defense.results import DefenseResult
from defense.training import EVALUATION_BATCH, Augment, Training


@dataclass(frozen=True)
class FinePruningConfig:
    drop: float = 0.1  # of clean accuracy, as a share of it, that pruning alone stays below
    at_once: int = 6   # inputs cut between two looks at the accuracy
    tuning: FineTuningConfig = field(default_factory=FineTuningConfig)

    def __post_init__(self) -> None:
        expect(0 < self.drop <= 1, "FinePruningConfig.drop", "in (0, 1]", self.drop)
        expect(self.at_once > 0, "FinePruningConfig.at_once", "> 0", self.at_once)


def defend(model: nn.Module, images: Tensor, labels: Tensor, config: FinePruningConfig, *,
           generator: torch.Generator, augment: Augment | None = None,
           deadline: Deadline | None = None) -> DefenseResult:
    """Prune and tune a copy of `model`: see `run_baseline`. Without time to tune it counts as failed."""
    def repair(given: Given, training: Training) -> Repaired:
        last = last_layer(given.model, given.num_classes)
        inputs = last_inputs(given.model, last, given.images)
        order = inputs.mean(0).argsort(stable=True)
        count = bearable_count(inputs, given.labels, last, order, config)
        cut = cutter(last, order[:count])
        cut()
        epochs = fine_tuning(given.model, training, config.tuning, after=cut)
        return after_tuning(given.model, epochs, {"pruned": count, "inputs": len(order)})

    return run_baseline("fp", repair, model, images, labels, generator=generator, augment=augment,
                        deadline=deadline)


def last_layer(model: nn.Module, num_classes: int) -> nn.Linear:
    """The last linear layer of the model, if its outputs are the classes."""
    found = [module for module in model.modules() if isinstance(module, nn.Linear)]
    expect(found and found[-1].out_features == num_classes, "model",
           f"a last linear layer of {num_classes} outputs, for pruning its inputs", found[-1] if found else "none")
    return found[-1]


@torch.no_grad()
def last_inputs(model: nn.Module, last: nn.Linear, images: Tensor) -> Tensor:
    """(N, F) inputs of the layer `last` in evaluation mode; InputError where its outputs are not the logits."""
    seen: list[tuple[Tensor, Tensor]] = []
    parts = []
    handle = last.register_forward_hook(lambda layer, inputs, output: seen.append((inputs[0], output)))
    try:
        with evaluation(model):
            for part in images.split(EVALUATION_BATCH):
                seen.clear()
                logits = model(part)
                once = len(seen) == 1 and torch.equal(seen[0][1], logits)
                expect(once, "model", "logits that its last linear layer gives", "others")
                parts.append(seen[0][0])
    finally:
        handle.remove()
    return torch.cat(parts)


@torch.no_grad()
def bearable_count(inputs: Tensor, labels: Tensor, last: nn.Linear, order: Tensor, config: FinePruningConfig) -> int:
    """How many of `order` can be cut, `at_once` at a time, before accuracy on (N, F) inputs has fallen by `drop`.

    Never all of them. order: (F,) positions, the first to be cut first.
    """
    weight, whole, borne = last.weight.clone(), 0.0, 0
    for count in range(0, len(order), config.at_once):
        weight[:, order[:count]] = 0
        found = (linear(inputs, weight, last.bias).argmax(1) == labels).double().mean().item()
        if count == 0:
            whole = found
        elif found <= (1 - config.drop) * whole:
            break
        borne = count
    return borne


def cutter(last: nn.Linear, positions: Tensor) -> Callable[[], None]:
    """What sets the weights of these inputs to zero, again and again."""
    @torch.no_grad()
    def cut() -> None:
        last.weight[:, positions] = 0

    return cut
