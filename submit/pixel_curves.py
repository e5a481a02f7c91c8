"""Ranking metrics from counts per score level: AUROC, average precision, F1-max, equal to scikit-learn's.

One sort (or, for scores with four decimals, one histogram) serves all of them, and because counts add up,
the same functions take a whole batch of bootstrap resamples.
"""
from __future__ import annotations

import numpy as np

DECIMALS = 10_000  # score files hold four decimals in [0, 1]: 10,001 possible levels


def level_counts(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positives and negatives (levels,) at each distinct score, from the highest score to the lowest."""
    truth, scores = truth.ravel().astype(bool), scores.ravel()
    levels = grid_levels(scores)
    if levels is None:
        levels = np.unique(scores, return_inverse=True)[1]
    both = np.bincount(levels * 2 + truth)
    both = np.pad(both, (0, len(both) % 2)).reshape(-1, 2)
    both = both[both.any(axis=1)][::-1]
    return both[:, 1].astype(np.float64), both[:, 0].astype(np.float64)


def grid_levels(scores: np.ndarray) -> np.ndarray | None:
    """The level 0..10000 of each score if every one has at most four decimals in [0, 1], else None."""
    if scores.size == 0 or scores.min() < 0 or scores.max() > 1:
        return None
    levels = np.rint(scores * DECIMALS).astype(np.int64)
    return levels if np.array_equal(levels / DECIMALS, scores) else None


def ranking_metrics(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, ...]:
    """(AUROC, average precision, F1-max) in [0, 1] from counts (..., levels), highest level first.

    Needs at least one positive and one negative. AUROC counts ties as half, average precision is the step
    sum over distinct scores, F1-max is over all distinct scores: scikit-learn's conventions.
    """
    hits, alarms = positives.cumsum(-1), negatives.cumsum(-1)  # at or above each level
    total = hits[..., -1:]
    below = hits - positives / 2  # a tie counts half
    auroc = (below * negatives).sum(-1) / (total * alarms[..., -1:])[..., 0]
    flagged = np.maximum(hits + alarms, 1)  # a resample may have nothing at the top levels
    precision = hits / flagged
    average_precision = (positives * precision).sum(-1) / total[..., 0]
    f1 = (2 * hits / (flagged + total)).max(-1)
    return auroc, average_precision, f1
