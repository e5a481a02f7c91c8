"""Lines of charts: points in a square of 100 x 100, y upwards on the page."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

POINTS = 160  # of a line at most: more cannot be told apart at the size of a chart


@dataclass(frozen=True)
class Line:
    name: str
    points: str  # of an SVG polyline
    style: int = 0  # which of the page's line styles


@dataclass(frozen=True)
class Chart:
    title: str
    across: str
    up: str
    lines: tuple[Line, ...]
    across_ends: tuple[str, str] = ("0", "1")
    up_ends: tuple[str, str] = ("0", "1")
    diagonal: bool = False  # the line of chance


def roc(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rate at each threshold, from counts (levels,) with the highest score first."""
    hits, alarms = positives.cumsum() / positives.sum(), negatives.cumsum() / negatives.sum()
    return np.concatenate([[0.0], alarms]), np.concatenate([[0.0], hits])


def precision_recall(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision at each threshold, from counts (levels,) with the highest score first."""
    hits, alarms = positives.cumsum(), negatives.cumsum()
    precision = hits / np.maximum(hits + alarms, 1)
    return np.concatenate([[0.0], hits / positives.sum()]), np.concatenate([precision[:1], precision])


def line(name: str, x: Sequence[float], y: Sequence[float], style: int = 0) -> Line:
    """A line through points of [0, 1] x [0, 1], of which at most POINTS are kept, evenly along it."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) > POINTS:
        along = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
        kept = np.unique(np.searchsorted(along, np.linspace(0, along[-1], POINTS)).clip(0, len(x) - 1))
        x, y = x[kept], y[kept]
    return Line(name, " ".join(f"{100 * a:.4g},{100 - 100 * b:.4g}" for a, b in zip(x, y, strict=True)), style)
