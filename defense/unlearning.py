"""Clean unlearning: the network forgets the clean images, and the neurons of a backdoor change the most.

Paper: Lin et al., Unveiling and Mitigating Backdoor Vulnerabilities based on Unlearning Weight Changes and Backdoor
Activeness, NeurIPS 2024, arXiv:2405.20291, first stage.
Departs from the released code: the images' order is drawn anew each epoch, and the accuracy that ends the stage
is chance for the model's number of classes (there 0.1 whatever that is).
"""
from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data.errors import expect
from defense.training import Epochs, Training, check_statistics, predicted_classes, run_epochs, training_mode


@dataclass(frozen=True)
class UnlearningConfig:
    rate: float = 1e-4          # of the ascent, SGD (released code)
    momentum: float = 0.9
    batch: int = 256            # images at most
    epochs: int = 1000          # at most
    stop: float | None = None   # end at this accuracy on the clean images or below; None = chance, 1 / classes
    statistics: str = "batch"   # of batch norms: "batch" as released, "running" = the given model's
    decay: float = 0.0          # of the weights
    drops: tuple[int, ...] = ()  # epochs after which the rate falls to a tenth

    def __post_init__(self) -> None:
        expect(self.rate > 0 and 0 <= self.momentum < 1, "UnlearningConfig rate, momentum", "> 0, in [0, 1)",
               (self.rate, self.momentum))
        expect(self.batch > 1 and self.epochs > 0, "UnlearningConfig batch, epochs", "> 1, > 0",
               (self.batch, self.epochs))
        expect(self.stop is None or 0 <= self.stop < 1, "UnlearningConfig.stop", "None or in [0, 1)", self.stop)
        expect(self.decay >= 0 and all(drop > 0 for drop in self.drops), "UnlearningConfig decay, drops", ">= 0, > 0",
               (self.decay, self.drops))
        check_statistics(self.statistics, "UnlearningConfig.statistics")


@dataclass(frozen=True)
class Unlearned:
    """model: the network after the ascent, in its last finite state. accuracies: in evaluation mode, by epoch.

    epochs: how the stage went; reached: whether the accuracy fell to the mark.
    """

    model: nn.Module
    accuracies: tuple[float, ...]
    epochs: Epochs
    reached: bool

    @property
    def accuracy(self) -> float | None:
        """The last one; None where time ended within the first epoch."""
        return self.accuracies[-1] if self.accuracies else None


def clean_unlearning(model: nn.Module, given: Training, num_classes: int, config: UnlearningConfig) -> Unlearned:
    """Maximise the mean cross-entropy of the clean images on a copy of `model`, all parameters, until its accuracy
    on them (as they are, evaluation mode) is at most `config.stop`. `model` stays as it is."""
    ours = copy.deepcopy(model)
    stop = 1 / num_classes if config.stop is None else config.stop
    parameters = [p for p in ours.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, config.rate, config.momentum, weight_decay=config.decay, maximize=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, list(config.drops))
    accuracies: list[float] = []

    def ascend(images: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(ours(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.detach()

    def forgotten() -> bool:
        schedule.step()
        accuracies.append((predicted_classes(ours, given.images) == given.labels).double().mean().item())
        return accuracies[-1] <= stop + 1e-9

    training_mode(ours, config.statistics)
    epochs = run_epochs(ours, given, ascend, epochs=config.epochs, batch=config.batch, done=forgotten)
    return Unlearned(ours, tuple(accuracies), epochs, bool(accuracies) and accuracies[-1] <= stop + 1e-9)
