"""Patch scores from the other images of the same set.

Paper: Li et al., MuSc, ICLR 2024, arXiv:2401.16753 (mutual scoring over the nearest share of the images).
Departs from it: at least one image is kept, so small sets score too (else NaN below 5 images); every pair of images
is compared once and used from both sides; the root is taken after the search for the nearest patch.
"""
from __future__ import annotations

import torch
from torch import Tensor

from data.errors import expect

BYTES = 32 * 2**20  # distances held at once unless told otherwise; a processor's cache likes few, a GPU takes more
DOUBTFUL = 3e-3  # squared distance, in squared norms of the patch: below, float32 products were seen 1e-5 off and more


def mutual_scores(patches: Tensor, keep: float = 0.3, *, max_bytes: int = BYTES) -> Tensor:
    """Score every patch by how poorly the other images explain it.

    patches: (N, L, D) float, N >= 2. keep: share of the other images that count, the nearest first, in (0, 1].
    Returns (N, L), same device, float32 (float64 for float64): 0 = common, larger = more anomalous.
    Memory: N * N * L numbers, and max_bytes (or one pair of images, if that is more).
    """
    expect(0 < keep <= 1, "keep", "a share in (0, 1]", keep)
    nearest = nearest_distances(patches, max_bytes=max_bytes)
    kept = max(1, int(keep * (len(patches) - 1)))
    return nearest.topk(kept, dim=1, largest=False, sorted=False).values.mean(1)


@torch.no_grad()
def nearest_distances(patches: Tensor, *, max_bytes: int = BYTES) -> Tensor:
    """Euclidean distance of every patch to the nearest patch of each other image.

    patches: (N, L, D) float. Returns (N, N, L): [i, j, m] for patch m of image i and image j; infinite at i = j.
    """
    _check(patches)
    patches = patches if patches.dtype in (torch.float32, torch.float64) else patches.float()
    patches = patches - patches.mean((0, 1))  # distances stay as they are, products lose less
    left, right = _extended(patches)
    count, length, _ = patches.shape
    closest = patches.new_empty((count, count, length))  # -distance^2 / 2, the largest
    side = max(1, int((max_bytes / (length * length * patches.element_size())) ** 0.5))
    for top in range(0, count, side):
        for first in range(top, count, side):
            _compare(closest, left, right, slice(top, top + side), slice(first, first + side))
    squared = closest.mul_(-2).clamp_min_(0)
    if patches.dtype == torch.float32:
        _mend(squared, patches)
    distances = squared.sqrt_()
    distances.diagonal(dim1=0, dim2=1).fill_(torch.inf)
    return distances


def _check(patches: Tensor) -> None:
    expect(patches.ndim == 3, "patches.ndim", 3, patches.ndim)
    expect(len(patches) >= 2, "patches.shape[0]", ">= 2 images", len(patches))
    expect(patches.numel() > 0, "patches.shape", "no empty side", tuple(patches.shape))
    expect(patches.is_floating_point(), "patches.dtype", "a floating type", patches.dtype)
    expect(bool(torch.isfinite(patches).all()), "patches", "finite features", "NaN or infinity")


def _extended(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors (N, L, D + 2) whose product is -|x - y|^2 / 2: the norms ride in two columns more."""
    half = patches.square().sum(-1, keepdim=True) / 2
    one = torch.ones_like(half)
    return torch.cat([patches, -half, one], -1), torch.cat([patches, one, -half], -1)


def _compare(closest: Tensor, left: Tensor, right: Tensor, rows: slice, columns: slice) -> None:
    """Fill both directions of one block of image pairs from one matrix product."""
    queries, others = left[rows], right[columns]  # (b, L, D + 2), (c, L, D + 2)
    b, length, c = len(queries), queries.shape[1], len(others)
    block = queries.flatten(0, 1) @ others.flatten(0, 1).T  # (b * L, c * L)
    closest[rows, columns] = block.view(b, length, c, length).amax(3).transpose(1, 2)
    closest[columns, rows] = block.view(b, length, c * length).amax(1).view(b, c, length).transpose(0, 1)


def _mend(squared: Tensor, patches: Tensor) -> None:
    """Measure tiny distances again in float64: there the product form has lost the digits (twin images)."""
    doubtful = squared < DOUBTFUL * patches.square().sum(-1)[:, None]  # a near patch has about the same norm
    doubtful.diagonal(dim1=0, dim2=1).fill_(False)
    for i, j in doubtful.any(-1).nonzero().tolist():
        rows = doubtful[i, j]
        left, right = _extended(torch.stack([patches[i], patches[j]]).double())
        squared[i, j, rows] = ((left[0, rows] @ right[1].T).amax(1) * -2).clamp_min(0).float()
