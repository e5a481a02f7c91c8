"""Ranking metrics from counts per score level: AUROC, average precision, F1-max, equal to scikit-learn's.

Scores with four decimals, as score files hold them, are counted in one exact histogram; others are sorted once. Both
go through the pixels of a category block by block. Because counts add up, the same function takes a whole batch of
bootstrap resamples.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

DECIMALS = 10_000  # score files hold four decimals in [0, 1]: 10,001 possible levels
BLOCK = 1 << 18    # scores at a time: what is worked out of them stays in the processor's cache


def ranking(truth: np.ndarray, scores: np.ndarray) -> tuple[float, float, float]:
    """(AUROC, average precision, F1-max) in [0, 1] of booleans and finite scores, any shape alike.

    Needs at least one of each label. Beyond its input it holds one copy of scores that are not on the grid.
    """
    truth, scores = truth.ravel(), scores.ravel()
    histogram = grid_counts(truth, scores)
    if histogram is None:
        positives, negatives = scores[truth], scores[~truth]
        positives.sort()  # in place: np.sort would hold two copies
        negatives.sort()
        return _sorted_ranking(positives, negatives)
    auroc, average_precision, f1 = ranking_metrics(*histogram)
    return float(auroc), float(average_precision), float(f1)


def level_counts(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positives and negatives (levels,) at each distinct score, from the highest score to the lowest."""
    levels = np.unique(scores.ravel(), return_inverse=True)[1]
    return _by_label(np.bincount(levels * 2 + truth.ravel().astype(bool)))


def grid_counts(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """level_counts of scores (n,) that all have at most four decimals and lie in [0, 1]; None for others."""
    both = np.zeros(2 * (DECIMALS + 1), dtype=np.int64)
    for start in range(0, len(scores), BLOCK):
        levels = _grid_levels(scores[start:start + BLOCK])
        if levels is None:
            return None
        both += np.bincount(levels * 2 + truth[start:start + BLOCK], minlength=len(both))
    return _by_label(both)


def _grid_levels(scores: np.ndarray) -> np.ndarray | None:
    """The level 0..10000 of each score if every one has at most four decimals in [0, 1], else None."""
    if scores.min() < 0 or scores.max() > 1:
        return None
    levels = np.rint(scores * DECIMALS)
    return levels.astype(np.int64) if np.array_equal(levels / DECIMALS, scores) else None


def _by_label(both: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positives and negatives, highest level first, from counts at 2 * level + truth; empty levels are left out."""
    both = np.pad(both, (0, len(both) % 2)).reshape(-1, 2)
    both = both[both.any(axis=1)][::-1]
    return both[:, 1].astype(np.float64), both[:, 0].astype(np.float64)


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


def _sorted_ranking(positives: np.ndarray, negatives: np.ndarray) -> tuple[float, float, float]:
    """The same three from the rising scores of both labels.

    Only scores that some positive has need a look: between two of them precision and F1 fall with every negative,
    and no step adds to average precision.
    """
    total, others = len(positives), len(negatives)
    won = steps = best = 0.0
    for first, count in _ties(positives):
        values = positives[first]
        lower = np.searchsorted(negatives, values, side="left")  # negatives below each value
        lower_or_equal = np.searchsorted(negatives, values, side="right")
        hits = total - first  # positives at or above each value
        alarms = others - lower
        won += float((count * ((lower + lower_or_equal) / 2)).sum())  # a tie counts half
        steps += float((count * (hits / (hits + alarms))).sum())
        best = max(best, float((2 * hits / (hits + alarms + total)).max()))
    return won / total / others, steps / total, best


def _ties(rising: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """First index and number of each distinct value, many values at a time; no value is split between two yields."""
    start = 0
    while start < len(rising):
        last = rising[min(start + BLOCK, len(rising)) - 1]
        stop = start + int(np.searchsorted(rising[start:], last, side="right"))
        block = rising[start:stop]
        first = np.flatnonzero(np.concatenate([[True], block[1:] != block[:-1]]))
        yield start + first, np.diff(first, append=stop - start)
        start = stop
