"""What reading, predicting and scoring hand to each other."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data.errors import InputError


@dataclass(frozen=True)
class Split:
    """A task's input: `units` are predicted one by one and can be resumed; `data` is what scoring needs."""

    data: Any
    units: dict[str, Any]
    problems: tuple[InputError, ...] = ()
    indivisible: bool = False  # without any one unit nothing can be scored


@dataclass(frozen=True)
class Result:
    """The figure of one task on the leaderboard's scale (percent), and what it is made of."""

    value: float
    interval: tuple[float, float]  # 95 %
    n: int
    counted: str  # what n counts: queries, images or models
    parts: list[dict]  # per query, category or model; the rows of the detail table
    notes: tuple[str, ...] = ()
    problems: tuple[InputError, ...] = ()
    extra: dict = field(default_factory=dict)  # further figures for the record
