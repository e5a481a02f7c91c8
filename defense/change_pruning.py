"""NWC-FP: fine-pruning that cuts the neurons first whose weights clean unlearning moves the most.

Paper: Lin et al., Unveiling and Mitigating Backdoor Vulnerabilities based on Unlearning Weight Changes and Backdoor
Activeness, NeurIPS 2024, arXiv:2405.20291, appendix; the pruning of `fine_pruning.py` in the order of neuron weight
change (`weight_change.py`). The exact rule of the appendix could not be read: that of fine-pruning is kept.
Departs from it: what `fine_pruning.py` and `unlearning.py` depart in.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from data.errors import expect
from defense.baseline import Repaired, after_tuning, run_baseline
from defense.deadline import Deadline
from defense.fine_pruning import FinePruningConfig, bearable_count, cutter, last_inputs, last_layer
from defense.fine_tuning import fine_tuning
from defense.given import Given
from defense.neurons import neuron_weights
from defense.results import DefenseResult
from defense.training import Augment, Training
from defense.unlearning import UnlearningConfig, clean_unlearning
from defense.weight_change import neuron_weight_change, weight_change

UNLEARNING_SHARE = 0.3  # of the time there is, at most


@dataclass(frozen=True)
class ChangePruningConfig:
    unlearning: UnlearningConfig = field(default_factory=UnlearningConfig)
    pruning: FinePruningConfig = field(default_factory=FinePruningConfig)


def defend(model: nn.Module, images: Tensor, labels: Tensor, config: ChangePruningConfig, *,
           generator: torch.Generator, augment: Augment | None = None,
           deadline: Deadline | None = None) -> DefenseResult:
    """Prune and tune a copy of `model`: see `run_baseline`. Without time to unlearn or to tune it counts as failed."""
    def repair(given: Given, training: Training) -> Repaired:
        last = last_layer(given.model, given.num_classes)
        feeding = feeding_layer(given.model, last, given.num_classes)
        first = replace(training, deadline=training.deadline.part(UNLEARNING_SHARE))
        unlearned = clean_unlearning(given.model, first, given.num_classes, config.unlearning)
        went = unlearned.epochs
        if not went.losses:
            return Repaired(given.model, went.finite, went.complete,
                            "no time to unlearn" if went.finite else "no finite epoch of unlearning")
        order = change_order(given.model, unlearned.model, feeding)
        inputs = last_inputs(given.model, last, given.images)
        count = bearable_count(inputs, given.labels, last, order, config.pruning)
        cut = cutter(last, order[:count])
        cut()
        epochs = fine_tuning(given.model, training, config.pruning.tuning, after=cut)
        details = {"pruned": count, "inputs": len(order), "unlearned_accuracy": unlearned.accuracy}
        found = after_tuning(given.model, epochs, details)
        return replace(found, finite=found.finite and went.finite, complete=found.complete and went.complete)

    return run_baseline("nwc-fp", repair, model, images, labels, generator=generator, augment=augment,
                        deadline=deadline)


def feeding_layer(model: nn.Module, last: nn.Linear, num_classes: int) -> str:
    """Name of the weight whose neurons are the inputs of `last`: the layer before it, shortcuts left out."""
    name, weight = list(neuron_weights(model, num_classes, "all").items())[-1]
    expect(len(weight) == last.in_features, f"model {name!r}",
           f"a neuron for each of the {last.in_features} inputs of the last layer", len(weight))
    return name


def change_order(before: nn.Module, after: nn.Module, name: str) -> Tensor:
    """(F,) positions of the neurons of the weight `name`, the most changed first; of equal ones the first."""
    change = weight_change({name: before.get_parameter(name)}, {name: after.get_parameter(name)})
    return neuron_weight_change(change).argsort(descending=True, stable=True)
