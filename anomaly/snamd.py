"""Patch features that know the neighbours they resemble.

Paper: MuSc-V2 (arXiv:2511.10047), the aggregation of its 2-D part: around each patch, in each degree x degree square,
the mean of the features with weights exp(-distance to the patch); then the mean over the degrees, of unit length.
Departs from it: distances are measured in `tau`, by default their median over the set. Features of another scale
would else be pooled in another way: at distances far above 1 every weight but the patch's own vanishes, and the
aggregation does nothing. Features are not brought to unit length first, so their lengths still tell them apart.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from data.errors import expect

IMAGES = 8  # worked on at once: three copies of their features are held
NEXT = ((0, 1), (1, 0), (1, 1), (1, -1))  # one of each pair of opposite directions


def similarity_weighted_features(patches: Tensor, grid: tuple[int, int], degrees: Sequence[int], *,
                                 tau: float | None = None) -> Tensor:
    """Weighted mean of the patches around each patch, averaged over the degrees, of unit length.

    patches: (N, L, D) float of one layer, L = grid rows * grid columns. degrees: odd sides of the squares, in patches.
    tau: distance at which a neighbour counts 1/e; 1 = the published form, None = the median distance of neighbours.
    Beyond the border lie zeros, which count as the paper has it. Returns (N, L, D).
    """
    tau = _checked(patches, grid, degrees, tau)
    found = []
    for images in patches.split(IMAGES):
        total = torch.zeros_like(images)
        for sums, weights in _squares(images, grid, degrees, tau):
            total += sums / weights
        found.append(normalize(total, dim=-1))
    return torch.cat(found)


def centre_weights(patches: Tensor, grid: tuple[int, int], degrees: Sequence[int], *,
                   tau: float | None = None) -> tuple[float, ...]:
    """Mean share of a patch's own feature at each degree, ascending; arguments as above.

    1 = neighbours count for nothing, 1 / degree^2 = as much as the patch itself (a box filter).
    """
    tau = _checked(patches, grid, degrees, tau)
    shares = [[(1 / weights).mean((1, 2)) for _, weights in _squares(images, grid, degrees, tau)]
              for images in patches.split(IMAGES)]
    return tuple(float(torch.cat(same).mean()) for same in zip(*shares, strict=True))


def neighbour_distance(patches: Tensor, grid: tuple[int, int]) -> float:
    """Median Euclidean distance of patches that touch, over all images (N, L, D); 0 where there is one patch."""
    maps, (rows, columns) = patches.unflatten(1, grid), grid
    found = [(maps[:, :rows - y, max(0, -x):columns - max(0, x)] - maps[:, y:, max(0, x):columns + min(0, x)])
             .norm(dim=-1).flatten() for y, x in NEXT]
    found = torch.cat(found)
    return float(found.median()) if len(found) else 0.0


def _squares(patches: Tensor, grid: tuple[int, int], degrees: Sequence[int],
             tau: float) -> Iterator[tuple[Tensor, Tensor]]:
    """For each degree, ascending: weighted sums (n, L, D) and sums of weights (n, L, 1) over its square.

    Both are grown in place from degree to degree.
    """
    (rows, columns), reach = grid, max(degrees) // 2
    centre = patches.unflatten(1, grid)
    padded = pad(centre, (0, 0, reach, reach, reach, reach))
    sums, weights, done = torch.zeros_like(centre), centre.new_zeros((*centre.shape[:3], 1)), -1
    for radius in sorted({degree // 2 for degree in degrees}):
        for y, x in _ring(done, radius):
            other = padded[:, reach + y:reach + y + rows, reach + x:reach + x + columns]
            weight = torch.exp((other - centre).norm(dim=-1, keepdim=True) / -tau)
            weights += weight
            sums += weight * other
        done = radius
        yield sums.flatten(1, 2), weights.flatten(1, 2)


def _ring(inner: int, outer: int) -> list[tuple[int, int]]:
    """Steps in rows and columns farther than `inner` and at most `outer`, the larger of both counting."""
    side = range(-outer, outer + 1)
    return [(y, x) for y in side for x in side if max(abs(y), abs(x)) > inner]


def _checked(patches: Tensor, grid: tuple[int, int], degrees: Sequence[int], tau: float | None) -> float:
    rows, columns = grid
    expect(patches.ndim == 3, "patches.ndim", 3, patches.ndim)
    expect(patches.shape[1] == rows * columns, "patches.shape[1]", f"{rows} x {columns} patches", patches.shape[1])
    expect(len(degrees) > 0 and all(d >= 1 and d % 2 for d in degrees), "degrees", "odd numbers from 1",
           tuple(degrees))
    expect(tau is None or tau > 0, "tau", "a positive distance, or None", tau)
    tau = neighbour_distance(patches, grid) if tau is None else tau
    return max(tau, torch.finfo(torch.float32).tiny)  # patches all alike: any distance will do
