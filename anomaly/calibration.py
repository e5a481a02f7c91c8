"""Scores of a category's maps spread so that the organizers' AUPRO sees where it looks; their order stays.

AUPRO there has 200 thresholds equidistant in score, of which those below 30 % false positives count. Raw distances put
few of them there where one outlier stretches the range, and none where maps are constant, which ends the evaluation
in a division by zero. Here scores follow the logarithm of the share of pixels above them: thresholds are dense among
the few highest pixels and down to 30 %, and the highest still differ at four decimals, as average precision needs.
"""
from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from data.errors import expect

SOFT = 3e-3  # share of the pixels from which the logarithm sets in; smaller and larger ones gained no more AUPRO
KNOTS = 1024  # where score and rank are tied to each other; straight lines between them keep all scores apart
SAMPLE = 2**20  # values that the ranks are taken from, at even steps through the maps
LIMIT, LEVELS = 0.3, 8  # share of pixels that AUPRO looks at, and different scores there below which ties are broken


def calibrated(maps: Tensor, *, in_place: bool = False) -> Tensor:
    """(N, 1, H, W) float32 in [0, 1] of the maps (N, 1, H, W) of one category, higher = more anomalous.

    Strictly rising: no two scores swap or become equal but by rounding. Only where too few scores differ for an AUPRO,
    as in constant maps, equal ones are told apart: the nearer to the middle of the image, the higher.
    in_place: float32 maps are overwritten, as many maps fill the memory.
    """
    expect(maps.ndim == 4 and maps.shape[1] == 1 and maps.numel() > 0, "maps.shape", "(N, 1, H, W), not empty",
           tuple(maps.shape))
    finite = all(bool(torch.isfinite(image).all()) for image in maps)  # one by one: it makes copies
    expect(finite, "maps", "finite scores", "NaN or infinity")
    values, heights = _knots(maps)
    share = _share_above(heights)
    if int(((share > 0) & (share < LIMIT)).sum()) < LEVELS:
        maps = _told_apart(maps)
        values, heights = _knots(maps)
    heights = (heights - heights[0]) / (1 - heights[0]).clamp_min(torch.finfo(torch.float64).tiny)
    found = maps if in_place and maps.dtype == torch.float32 else torch.empty_like(maps, dtype=torch.float32)
    for image, place in zip(maps, found, strict=True):  # one by one: float64 is large
        place.copy_(_interpolated(image, values, heights))
    return found


def _knots(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending scores (K,), float64, from the lowest to the highest of all, and what they become (K,), up to 1."""
    flat = maps.flatten()
    ordered = flat[::math.ceil(len(flat) / SAMPLE)].double().sort().values
    heights = torch.linspace(0, 1, KNOTS, dtype=torch.float64, device=maps.device)
    places = ((1 - _share_above(heights)) * (len(ordered) - 1)).round().long().clamp(0, len(ordered) - 1)
    values = ordered[places]
    values[0], values[-1] = flat.min(), flat.max()
    last = torch.cat([values[1:] > values[:-1], values.new_ones(1, dtype=torch.bool)])  # ties count those above alone
    return values[last], heights[last]


def _share_above(heights: Tensor) -> Tensor:
    """Share of pixels above a calibrated score: 1 at 0, 0 at 1, falling exponentially but for SOFT."""
    return (1 + SOFT) * (SOFT / (1 + SOFT)) ** heights - SOFT


def _interpolated(image: Tensor, values: Tensor, heights: Tensor) -> Tensor:
    if len(values) == 1:
        return torch.zeros_like(image, dtype=torch.float32)
    found = np.interp(image.double().cpu().numpy(), values.cpu().numpy(), heights.cpu().numpy())
    return torch.from_numpy(found).to(image.device, torch.float32)


def _told_apart(maps: Tensor) -> Tensor:
    """Ranks of the scores, and within one rank those nearer to the middle higher: (N, 1, H, W) float64."""
    height, width = maps.shape[2:]
    y = torch.linspace(-1, 1, height, dtype=torch.float64, device=maps.device)[:, None]
    x = torch.linspace(-1, 1, width, dtype=torch.float64, device=maps.device)
    middle = 1 - (y ** 2 + x ** 2) / 3  # 1/3 at the corners, 1 in the middle: less than one rank
    return maps.flatten().unique(return_inverse=True)[1].view(maps.shape) + middle
