"""95 % bootstrap intervals: over queries, images or models, seeded."""
from __future__ import annotations

import numpy as np

from submit.aupro import area_under, region_curves
from submit.pixel_curves import DECIMALS, ranking_metrics
from submit.scoring import IMAGE_METRICS, PIXEL_METRICS

RESAMPLES = 1000
PIXEL_RESAMPLES = 200  # each one weighs every map's histogram again
TAILS = (2.5, 97.5)  # percentiles that bound 95 %


def share_interval(correct: np.ndarray, seed: int) -> tuple[float, float]:
    """Interval in percent of the share of `correct` (n,), booleans.

    The number right in a resample is binomial, so it is drawn directly. All right or all wrong leaves nothing
    to resample; there the exact binomial bound stands in (Clopper and Pearson, 1934).
    """
    n, share = len(correct), float(np.mean(correct))
    if share in (0.0, 1.0):
        bound = 100 * (TAILS[0] / 100) ** (1 / n)
        return (bound, 100.0) if share else (0.0, 100.0 - bound)
    draws = np.random.default_rng(seed).binomial(n, share, RESAMPLES) / n
    low, high = 100 * np.percentile(draws, TAILS)
    return float(low), float(high)


def percentile_interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values (R,)."""
    low, high = np.percentile(draws, TAILS)
    return float(low), float(high)


def resampled_metrics(image_truth: np.ndarray, image_scores: np.ndarray, pixel_truth: np.ndarray | None,
                      pixel_scores: np.ndarray | None, seed: int) -> dict[str, np.ndarray]:
    """The defined metrics of one category under resampling of its images, in [0, 1]: name -> (R,).

    Good and defective images are drawn apart, so each resample has both. Pixel scores are put on a grid of
    10,001 levels between the category's extremes, and AUPRO keeps the category's thresholds.
    """
    image_truth = np.asarray(image_truth).astype(bool)
    weights = _resample_weights(image_truth, np.random.default_rng(seed))
    values = {}
    if image_truth.any() and not image_truth.all():
        levels = np.unique(image_scores, return_inverse=True)[1]
        histogram = np.eye(levels.max() + 1)[levels]
        values |= _ranked(IMAGE_METRICS, weights, histogram, image_truth[:, None])
    if pixel_truth is not None and pixel_truth.any() and not pixel_truth.all():
        positives, negatives = _pixel_histograms(pixel_truth, pixel_scores)
        values |= _named(PIXEL_METRICS, ranking_metrics(weights @ positives, weights @ negatives))
        curves = region_curves(pixel_truth, pixel_scores)
        if curves is not None:
            values["pixel_aupro"] = np.nan_to_num(area_under(curves, weights))
    return values


def _resample_weights(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How often each image is drawn, (R, N)."""
    weights = np.zeros((PIXEL_RESAMPLES, len(truth)))
    for members in (np.flatnonzero(truth), np.flatnonzero(~truth)):
        if len(members):
            share = np.full(len(members), 1 / len(members))
            weights[:, members] = rng.multinomial(len(members), share, PIXEL_RESAMPLES)
    return weights


def _ranked(names: tuple[str, ...], weights: np.ndarray, histogram: np.ndarray, truth: np.ndarray) -> dict:
    downwards = histogram[:, ::-1]
    return _named(names, ranking_metrics(weights @ (downwards * truth), weights @ (downwards * ~truth)))


def _named(names: tuple[str, ...], values: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
    auroc, average_precision, f1 = values
    return dict(zip(names[:3], (auroc, f1, average_precision), strict=True))


def _pixel_histograms(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positive and negative pixels of each image at each of 10,001 levels, highest first: two (N, levels)."""
    low, high = scores.min(), scores.max()
    scale, columns = DECIMALS / max(high - low, 1e-12), DECIMALS + 1
    counts = np.empty((2, len(scores), columns))
    for image, (defective, values) in enumerate(zip(truth, scores, strict=True)):  # at once they would fill memory
        levels = np.rint((values - low) * scale).astype(np.int64)
        both = np.bincount((defective * columns + levels).ravel(), minlength=2 * columns).reshape(2, columns)
        counts[:, image] = both[:, ::-1]
    return counts[1], counts[0]
