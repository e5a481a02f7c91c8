"""Neuron weight change (NWC): how far unlearning moved each neuron's incoming weights.

Paper: Lin et al., NeurIPS 2024, arXiv:2405.20291: sum over a neuron's weights of |unlearned - backdoored|.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def weight_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|after - before| of every layer in `before`, as `neuron_weights` gives them; same shapes."""
    return {name: (after[name].detach() - weight.detach()).abs() for name, weight in before.items()}


def neuron_weight_change(change: Mapping[str, Tensor]) -> Tensor:
    """(M,) sums over each neuron's weights, >= 0, the layers one after the other; larger = more suspicious.

    Neither divided by the number of weights nor by layer: wide late layers lead, as in the released code.
    """
    return torch.cat([part.flatten(1).sum(1) for part in change.values()])
