"""Which weights are set to zero: the most changed ones of the most changed neurons.

Paper: Lin et al., NeurIPS 2024, arXiv:2405.20291, second stage (its V3). V1 and V2 are the two natural ablations: whole
neurons, and weights wherever they lie; whether they are the paper's V1 and V2 could not be checked.
Departs from the released code: of equal changes the first count, so that the share is exact.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.errors import expect
from defense.weight_change import neuron_weight_change

SCHEMES = ("V1", "V2", "V3")


@dataclass(frozen=True)
class ReinitialisationConfig:
    """V1: every weight of the top neurons. V2: the top neurons * weights of all weights. V3: the top `weights` of
    the weights of the top `neurons`."""

    neurons: float = 0.15  # n: share of all neurons, in (0, 1]
    weights: float = 0.7   # m: share of their weights, in (0, 1]; the released code's
    scheme: str = "V3"

    def __post_init__(self) -> None:
        expect(0 < self.neurons <= 1, "ReinitialisationConfig.neurons", "in (0, 1]", self.neurons)
        expect(0 < self.weights <= 1, "ReinitialisationConfig.weights", "in (0, 1]", self.weights)
        expect(self.scheme in SCHEMES, "ReinitialisationConfig.scheme", f"one of {', '.join(SCHEMES)}", self.scheme)


def weights_to_zero(change: Mapping[str, Tensor], config: ReinitialisationConfig) -> dict[str, Tensor]:
    """A mask of the shape of every layer in `change` (`weight_change`): True where the weight is to be zero.

    Neurons and weights are ranked over all layers together; shares are rounded down, but at least one counts.
    """
    shapes = [part.shape for part in change.values()]
    flat = torch.cat([part.flatten() for part in change.values()])
    if config.scheme == "V2":
        mask = _largest(flat, _share(config.neurons * config.weights, len(flat)))
    else:
        nwc = neuron_weight_change(change)
        chosen = _largest(nwc, _share(config.neurons, len(nwc)))                       # (M,)
        sizes = torch.cat([torch.full((s[0],), s[1:].numel(), device=flat.device) for s in shapes])
        mask = chosen.repeat_interleave(sizes)                                         # (weights,)
        if config.scheme == "V3":
            pool = flat[mask]
            mask[mask.clone()] = _largest(pool, _share(config.weights, len(pool)))
    parts = mask.split([shape.numel() for shape in shapes])
    return {name: part.view(shape) for name, part, shape in zip(change, parts, shapes, strict=True)}


def _share(share: float, count: int) -> int:
    return max(1, int(share * count + 1e-9))  # 0.29 * 100 is a little below 29


def _largest(values: Tensor, count: int) -> Tensor:
    """(V,) mask of the `count` largest of (V,) values; of equal ones the first."""
    mark = values.kthvalue(len(values) - count + 1).values
    mask = values > mark
    ties = (values == mark).nonzero()[:, 0]
    mask[ties[:count - int(mask.sum())]] = True
    return mask


@torch.no_grad()
def zero_reinitialisation(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the masked weights of `model` to zero, in place. Biases, norms and their statistics stay: they are the
    given model's, and tuning moves them."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        parameters[name].masked_fill_(mask, 0)
