"""RNP: neurons that a network which forgot the clean images cannot use to recover them are cut off.

Paper: Li et al., Reconstructive Neuron Pruning for Backdoor Defense, ICML 2023, arXiv:2305.14876. A copy unlearns the
clean images (`unlearning.py`); masks in [0, 1] on its norms' weights are then learned to recover them; the neurons with
small masks are cut from the given model. Settings as in BackdoorBench (arXiv:2206.12654), whose threshold is fixed.
Departs from it: the accuracy that ends unlearning is measured in evaluation mode after each epoch, there in training
mode during it; all clean images given are used, there a hundredth of the training set; layer and group norms have masks
where a model has no batch norm.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from data.errors import expect
from defense.adversarial_pruning import masked_loss, masked_norms, prune, tuned_masks
from defense.baseline import Repaired, run_baseline
from defense.deadline import Deadline
from defense.given import Given
from defense.results import DefenseResult
from defense.training import Augment, Epochs, Training, check_statistics
from defense.unlearning import UnlearningConfig, clean_unlearning

UNLEARNING_SHARE = 0.5  # of the time there is, at most: both stages have as many epochs as published


def _unlearning() -> UnlearningConfig:
    return UnlearningConfig(rate=0.01, epochs=20, stop=0.2, decay=5e-4, drops=(10, 20))


@dataclass(frozen=True)
class ReconstructivePruningConfig:
    unlearning: UnlearningConfig = field(default_factory=_unlearning)
    rate: float = 0.2          # SGD on the masks
    momentum: float = 0.9
    batch: int = 256           # images at most
    epochs: int = 20           # of learning the masks
    weight: float = 0.2        # of the cross-entropy that the masks minimise
    threshold: float = 0.7     # masks up to it are cut
    statistics: str = "batch"  # of batch norms while masks are learned: "batch" as published, "running"

    def __post_init__(self) -> None:
        where = "ReconstructivePruningConfig"
        expect(self.rate > 0 and 0 <= self.momentum < 1 and self.weight > 0, f"{where} rate, momentum, weight",
               "> 0, in [0, 1), > 0", (self.rate, self.momentum, self.weight))
        expect(self.batch > 1 and self.epochs > 0, f"{where} batch, epochs", "> 1, > 0", (self.batch, self.epochs))
        expect(0 <= self.threshold < 1, f"{where}.threshold", "in [0, 1)", self.threshold)
        check_statistics(self.statistics, f"{where}.statistics")


def defend(model: nn.Module, images: Tensor, labels: Tensor, config: ReconstructivePruningConfig, *,
           generator: torch.Generator, augment: Augment | None = None,
           deadline: Deadline | None = None) -> DefenseResult:
    """Prune a copy of `model`: see `run_baseline`. Without a finite epoch of either stage it counts as failed."""
    def repair(given: Given, training: Training) -> Repaired:
        first = replace(training, deadline=training.deadline.part(UNLEARNING_SHARE))
        masked_norms(given.model)  # refused before the work begins
        unlearned = clean_unlearning(given.model, first, given.num_classes, config.unlearning)
        went = unlearned.epochs
        if not went.losses:
            return Repaired(given.model, went.finite, went.complete,
                            "no time to unlearn" if went.finite else "no finite epoch of unlearning")
        masks, epochs = recovering_masks(unlearned.model, training, config)
        failed = "no time to learn the masks" if epochs.finite else "no finite epoch of the masks"
        pruned = prune(given.model, masks, config.threshold) if epochs.losses else 0
        details = {"pruned": pruned, "neurons": sum(len(mask) for mask in masks.values()),
                   "unlearned_accuracy": unlearned.accuracy, "unlearning_epochs": len(went.losses)}
        return Repaired(given.model, went.finite and epochs.finite, went.complete and epochs.complete,
                        "" if epochs.losses else failed, epochs.losses, details)

    return run_baseline("rnp", repair, model, images, labels, generator=generator, augment=augment,
                        deadline=deadline)


def recovering_masks(unlearned: nn.Module, given: Training,
                     config: ReconstructivePruningConfig) -> tuple[dict[str, Tensor], Epochs]:
    """(masks in [0, 1] by name of the norm, smaller = more suspicious; how learning went). The weights stay."""
    norms = masked_norms(unlearned)

    def loss(masks: nn.ParameterList, images: Tensor, labels: Tensor) -> Tensor:
        return config.weight * masked_loss(unlearned, norms, masks, None, images, labels)

    return tuned_masks(unlearned, norms, given, loss, rate=config.rate, momentum=config.momentum,
                       epochs=config.epochs, batch=config.batch, statistics=config.statistics)
