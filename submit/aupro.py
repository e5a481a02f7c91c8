"""The organizers' AUPRO: area under the per-region overlap below 30 % false positives, in one pass.

Their definition: 200 thresholds, equidistant in score, over the maps of a category; at each, the mean over
all connected defect regions of the share that is covered, against the false-positive rate of all normal
pixels; the points below 0.3 are stretched to [0, 1] and integrated by trapezoids.
Departs from it: every pixel is put into its threshold interval once and counted, instead of 200 passes over
all regions. Same curve, same area.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

STEPS = 200
LIMIT = 0.3  # false-positive rate
EIGHT_NEIGHBOURS = np.ones((3, 3))


@dataclass(frozen=True)
class RegionCurves:
    """Per image i and threshold t, so that images can be weighted (resampled) afterwards."""

    overlap: np.ndarray  # (N, T) sum over the image's regions of their covered share
    regions: np.ndarray  # (N,) number of regions
    false_positives: np.ndarray  # (N, T) normal pixels above the threshold
    normal: np.ndarray  # (N,) number of normal pixels


def aupro(truth: np.ndarray, scores: np.ndarray) -> float | None:
    """AUPRO in [0, 1] of maps (N, H, W); None where it is undefined.

    Undefined: no defect or no normal pixel, constant maps (the organizers' code divides by zero), all kept
    points at one false-positive rate.
    """
    curves = region_curves(truth, scores)
    if curves is None:
        return None
    area = area_under(curves, np.ones((1, len(truth))))[0]
    return None if np.isnan(area) else float(area)


def region_curves(truth: np.ndarray, scores: np.ndarray) -> RegionCurves | None:
    """Overlap and false-positive counts of each image at each threshold; None where there are no such thresholds.

    That is for constant maps, for a range beyond float64, and with one label only.
    """
    low, high = np.float64(scores.min()), np.float64(scores.max())
    with np.errstate(over="ignore"):  # an infinite range is answered, not warned of
        step = (high - low) / STEPS
    if not 0 < step < np.inf or not np.any(truth) or np.all(truth):
        return None
    thresholds = np.arange(low, high, step)  # this very call: it sometimes yields 201 values
    shape = len(truth), len(thresholds)
    curves = RegionCurves(np.zeros(shape), np.zeros(len(truth), np.int64), np.zeros(shape, np.int64),
                          np.zeros(len(truth), np.int64))
    for i, (mask, pixels) in enumerate(zip(truth, scores, strict=True)):
        above = _thresholds_below(pixels.astype(np.float64).ravel(), thresholds, step)
        areas, reached = _reached(mask, above, len(thresholds) + 1)
        curves.overlap[i] = (reached[1:] / areas[1:, None]).sum(0)
        curves.false_positives[i] = reached[0]
        curves.regions[i], curves.normal[i] = len(areas) - 1, areas[0]
    return curves


def _reached(mask: np.ndarray, above: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Areas (1 + regions,) and pixels above each threshold (1 + regions, T) of the normal part and of each region.

    mask: (H, W); above: (H * W,), how many of the columns - 1 thresholds lie below each pixel.
    """
    regions = 0
    if mask.any():
        labels, regions = ndimage.label(mask, structure=EIGHT_NEIGHBOURS)
        above = above + labels.ravel() * np.int64(columns)
    counts = np.bincount(above, minlength=(regions + 1) * columns).reshape(-1, columns)
    return counts.sum(1), counts[:, ::-1].cumsum(1)[:, ::-1][:, 1:]


def _thresholds_below(scores: np.ndarray, thresholds: np.ndarray, step: float) -> np.ndarray:
    """How many thresholds lie strictly below each score: np.searchsorted's answer, 7 times faster.

    Division places a score to within one interval (rounding); comparing with the thresholds settles it.
    """
    bounds = np.append(thresholds, np.inf)
    with np.errstate(over="ignore", invalid="ignore"):  # 1 / step of the tiniest ranges; the comparisons notice
        count = ((scores - thresholds[0]) * (1 / step)).astype(np.int32) - 1
    np.clip(count, 0, len(thresholds), out=count)
    above = scores > bounds[count]
    stuck = ~above & (count > 0)  # where division may have gone too far
    settled = (scores[stuck] > bounds[count[stuck] - 1]).all()
    for _ in range(2):
        count += above
        above = scores > bounds[count]
    # a range near the rounding of its values (never so in score files, which have four decimals) needs the search
    return count if settled and not above.any() else np.searchsorted(thresholds, scores, side="left")


def area_under(curves: RegionCurves, weights: np.ndarray) -> np.ndarray:
    """AUPRO (R,) for image weights (R, N); NaN where a resample leaves it undefined."""
    with np.errstate(invalid="ignore", divide="ignore"):  # undefined resamples come out as NaN on purpose
        overlap = (weights @ curves.overlap) / (weights @ curves.regions)[:, None]
        rate = (weights @ curves.false_positives) / (weights @ curves.normal)[:, None]
        return np.array([_stretched_area(r, o) for r, o in zip(rate, overlap, strict=True)])


def _stretched_area(rate: np.ndarray, overlap: np.ndarray) -> float:
    kept = rate < LIMIT
    if not kept.any():
        return np.nan
    x, y = rate[kept], overlap[kept]
    x = (x - x.min()) / (x.max() - x.min())
    return float(-(np.diff(x) * (y[1:] + y[:-1]) / 2).sum())  # rates fall as thresholds rise
