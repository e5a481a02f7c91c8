"""Patch features that know their neighbourhood.

Paper: LNAMD, the local neighbourhood aggregation of MuSc (Li et al., ICLR 2024, arXiv:2401.16753).
Departs from it: the published steps (one layer norm over a whole image, r x r neighbourhoods with zero padding,
adaptive average pooling of C * r * r values to C, unit length) reduce exactly to a box filter of the centred
features; the tests compare it with the literal form. The grid is given, never guessed, and need not be square.
"""
from __future__ import annotations

from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from data.errors import expect


def neighbourhood_features(patches: Tensor, grid: tuple[int, int], degree: int) -> Tensor:
    """Mean of the degree x degree patches around each patch, centred over the image, of unit length.

    patches: (N, L, D) float of one layer, L = grid rows * grid columns. degree: odd. Returns (N, L, D).
    """
    rows, columns = grid
    expect(patches.ndim == 3, "patches.ndim", 3, patches.ndim)
    expect(patches.shape[1] == rows * columns, "patches.shape[1]", f"{rows} x {columns} patches", patches.shape[1])
    expect(degree >= 1 and degree % 2 == 1, "degree", "an odd number from 1", degree)
    centred = patches - patches.mean((1, 2), keepdim=True)  # the deviation cancels in the unit length
    if degree > 1:
        maps = centred.transpose(1, 2).unflatten(2, grid)  # (N, D, rows, columns)
        maps = avg_pool2d(maps, degree, stride=1, padding=degree // 2)
        centred = maps.flatten(2).transpose(1, 2)
    return normalize(centred, dim=-1)
