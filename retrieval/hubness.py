"""Images that lie near many requests (hubs) are pushed back, by vectors that cosine and argmax alone compare.

Inverted softmax over a bank of requests that are not the test's: Bogolin et al., arXiv:2112.12777; Smith et al.,
arXiv:1702.03859. score(q, d) = cos(q, d) + b(d), with b(d) = -(1/s) log mean_u exp(s cos(u, d)) over the bank u.
b lies in [-1, 1], so the sum is half a cosine of unit vectors two numbers longer:
[q, 1, 0] / sqrt 2 and [d, b, sqrt(1 - b^2)] / sqrt 2. Neither side needs to know the other.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from data.errors import expect

BLOCK = 4096  # images compared with the bank at a time


def bank_bias(gallery: Tensor, bank: Tensor, sharpness: float) -> Tensor:
    """b(d) for each image: (G,) in [-1, 1]; the lower, the more requests of the bank lie near.

    gallery (G, D), bank (U, D): unit rows. sharpness > 0: the higher, the more the nearest of the bank count alone.
    """
    expect(len(bank) > 0, "bank", "at least one vector", "none")
    blocks = [torch.logsumexp(sharpness * block @ bank.T, dim=1) for block in gallery.split(BLOCK)]
    sums = torch.cat(blocks) if blocks else gallery.new_zeros(0)
    return (-(sums - math.log(len(bank))) / sharpness).clamp(-1, 1)


def biased_queries(queries: Tensor) -> Tensor:
    """Unit rows (Q, D) -> unit rows (Q, D + 2) that meet `biased_gallery`."""
    return torch.cat([queries, queries.new_ones(len(queries), 1), queries.new_zeros(len(queries), 1)], 1) / 2**0.5


def biased_gallery(gallery: Tensor, bias: Tensor) -> Tensor:
    """Unit rows (G, D) and bias (G,) in [-1, 1] -> unit rows (G, D + 2): cosine with a query is (cos + bias) / 2."""
    rest = (1 - bias.square()).clamp(min=0).sqrt()
    return torch.cat([gallery, bias[:, None], rest[:, None]], 1) / 2**0.5
