"""One score for an image, and its map, from the scores of its patches.

Sources: the report of a contest entry on zero-shot anomaly detection (the two highest patch scores, weighted 3 to 1),
and MuSc (Li et al., ICLR 2024, arXiv:2401.16753: the maximum of the map, upsampled to the size of the input).
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from data.errors import expect

HIGHEST, SECOND = 0.75, 0.25  # weights of the report


def two_highest(patch_scores: Tensor) -> Tensor:
    """(N,) of (N, L) patch scores, higher = more anomalous; an image of one patch has that patch's score."""
    expect(patch_scores.ndim == 2 and patch_scores.shape[1] >= 1, "patch_scores.shape", "(N, L) with L >= 1",
           tuple(patch_scores.shape))
    top = patch_scores.topk(min(2, patch_scores.shape[1]), dim=1).values
    return HIGHEST * top[:, 0] + SECOND * top[:, -1]


def score_maps(patch_scores: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """(N, 1, size, size) maps of (N, L) patch scores on a grid of rows and columns: bilinear, corners aligned."""
    return _upsampled(patch_scores, grid, (size, size))


def _upsampled(patch_scores: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    rows, columns = grid
    expect(patch_scores.ndim == 2 and patch_scores.shape[1] == rows * columns, "patch_scores.shape",
           f"(N, {rows * columns})", tuple(patch_scores.shape))
    maps = patch_scores.unflatten(1, (1, rows, columns))
    return interpolate(maps, size=size, mode="bilinear", align_corners=True)


def highest_of_map(patch_scores: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(N,) the maximum of each map of `size` pixels (height, width), image by image: whole maps would fill memory."""
    return torch.cat([_upsampled(part, grid, size).amax((1, 2, 3)) for part in patch_scores.split(16)])
