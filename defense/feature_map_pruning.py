"""FMP: feature maps that a small change of the image can turn against the class are cut, then the network is tuned.

Paper: Huang and Bu, Adversarial Feature Map Pruning for Backdoor, ICLR 2024, arXiv:2307.11565. For each map of each
convolution, images are moved one signed step so that this map changes most; the maps whose moved images find their
class least often are cut, a 64th of each layer. As in the released code, the weight of the batch norm that follows is
cut too, and tuning may bring both back. Rate, momentum and batch of the tuning are the released ones.
Departs from it: at least one map of a layer is cut, where a 64th of fewer than 64 is none; the rate falls to zero,
there to 1e-4; the images given are normalised already, so steps are shares of the range that each channel has on the
clean images, within which moved images stay. The lengths of the noise and of the step stand in no file of the release
that could be read: 1/255, the least change of an 8-bit pixel, is our choice, as are 100 epochs.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.errors import expect
from defense.baseline import Repaired, after_tuning, run_baseline
from defense.channel_lipschitz import norms_of_convolutions
from defense.deadline import Deadline
from defense.fine_tuning import FineTuningConfig, fine_tuning
from defense.given import Given
from defense.neurons import Convolution
from defense.results import DefenseResult
from defense.training import EVALUATION_BATCH, Augment, Training, predicted_classes

PRUNING_SHARE = 0.6  # of the time there is, at most; the rest is for tuning


@dataclass(frozen=True)
class FeatureMapPruningConfig:
    images: int = 32         # clean images, at most, that judge the maps
    noise: float = 1 / 255   # of every pixel, up or down, from where the step starts; share of its channel's range
    step: float = 1 / 255    # up the change of the map, in the same unit
    share: float = 1 / 64    # of a layer's maps that are cut, at least one
    tuning: FineTuningConfig = field(default_factory=lambda: FineTuningConfig(decay=0.0))

    def __post_init__(self) -> None:
        where = "FeatureMapPruningConfig"
        expect(self.images > 0, f"{where}.images", "> 0", self.images)
        expect(self.noise > 0 and self.step > 0, f"{where} noise, step", "> 0", (self.noise, self.step))
        expect(0 < self.share < 1, f"{where}.share", "in (0, 1)", self.share)


def defend(model: nn.Module, images: Tensor, labels: Tensor, config: FeatureMapPruningConfig, *,
           generator: torch.Generator, augment: Augment | None = None,
           deadline: Deadline | None = None) -> DefenseResult:
    """Prune and tune a copy of `model`: see `run_baseline`. At the deadline the layers left are not pruned."""
    def repair(given: Given, training: Training) -> Repaired:
        layers = {name: layer for name, layer in given.model.named_modules() if isinstance(layer, Convolution)}
        expect(layers, "model", "convolutions, whose feature maps are pruned", "none")
        judging = replace(training, deadline=training.deadline.part(PRUNING_SHARE))
        found = map_accuracies(given.model, layers, judging, config)
        if not found:
            return Repaired(given.model, complete=False, failed="no time to prune")
        cut = {name: least_accurate(part, config.share) for name, part in found.items()}
        cut_maps(given.model, layers, cut)
        epochs = fine_tuning(given.model, training, config.tuning)
        details = {"pruned": sum(len(part) for part in cut.values()), "layers": len(found)}
        repaired = after_tuning(given.model, epochs, details)
        return replace(repaired, complete=repaired.complete and len(found) == len(layers))

    return run_baseline("fmp", repair, model, images, labels, generator=generator, augment=augment,
                        deadline=deadline)


def map_accuracies(model: nn.Module, layers: Mapping[str, nn.Module], given: Training,
                   config: FeatureMapPruningConfig) -> dict[str, Tensor]:
    """(M,) by layer: share of the images that keep their class when moved to change that map; lower = more suspicious.

    In evaluation mode, in which the model ends. Layers left at the deadline, or not used, are missing.
    """
    index = torch.randperm(len(given.images), generator=given.generator)[:config.images].to(given.images.device)
    images, labels = given.images[index], given.labels[index]
    low, high = given.images.amin((0, 2, 3), keepdim=True), given.images.amax((0, 2, 3), keepdim=True)
    signs = torch.randint(2, images.shape, generator=given.generator).to(images) * 2 - 1
    start = (images + config.noise * (high - low) * signs).clamp(low, high)
    found = {}
    model.eval()
    for name, layer in layers.items():
        if given.deadline():
            break
        with torch.no_grad():
            clean = maps_of(model, layer, images)
        if clean is not None:
            moved = moved_images(model, layer, clean, start, config.step * (high - low), (low, high))
            right = predicted_classes(model, moved.flatten(0, 1), EVALUATION_BATCH).view(len(moved), -1) == labels
            found[name] = right.double().mean(1)
    return found


def maps_of(model: nn.Module, layer: nn.Module, images: Tensor) -> Tensor | None:
    """(B, M, ...) outputs of the layer, of its last use; None where it is not used."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        model(images)
    finally:
        handle.remove()
    return seen[-1] if seen else None


def moved_images(model: nn.Module, layer: nn.Module, clean: Tensor, start: Tensor, step: Tensor,
                 limits: tuple[Tensor, Tensor]) -> Tensor:
    """(M, B, C, H, W): for each map, `start` moved by `step` up the sign of the map's squared distance from `clean`."""
    start = start.detach().requires_grad_()
    apart = (maps_of(model, layer, start) - clean).square().transpose(0, 1).flatten(1).mean(1)  # (M,)
    moved = []
    for number, distance in enumerate(apart):
        (gradient,) = torch.autograd.grad(distance, start, retain_graph=number + 1 < len(apart))
        moved.append((start.detach() + step * gradient.sign()).clamp(*limits))
    return torch.stack(moved)


def least_accurate(accuracies: Tensor, share: float) -> Tensor:
    """Positions of the `share` of (M,) that are lowest, at least one; of equal ones the first."""
    return accuracies.argsort(stable=True)[:max(1, int(share * len(accuracies) + 1e-9))]


@torch.no_grad()
def cut_maps(model: nn.Module, layers: Mapping[str, nn.Module], cut: Mapping[str, Tensor]) -> None:
    """Zero the kernels of these maps, and their weights in the batch norms that follow, in place; biases stay."""
    for name, positions in cut.items():
        layers[name].weight[positions] = 0
    norms = norms_of_convolutions(model) if any(isinstance(m, _BatchNorm) for m in model.modules()) else []
    names = {layer: name for name, layer in layers.items()}
    for layer, norm in norms:
        if names[layer] in cut:
            norm.weight[cut[names[layer]]] = 0
