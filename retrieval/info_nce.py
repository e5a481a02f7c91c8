"""InfoNCE: among all rows of a batch each vector must find its own partner, from either side."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize


def both_ways(one: Tensor, other: Tensor, scale: Tensor | float) -> Tensor:
    """InfoNCE of matching rows (N, D), mean of both directions; cosines times `scale`, which is 1 / temperature."""
    logits = scale * normalize(one, dim=-1) @ normalize(other, dim=-1).T
    own = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
