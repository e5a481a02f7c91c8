"""A profile on the page: every stage as a bar from the quick to the slow end of what is predicted."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from submit.report_parts.run_records import Run

TEMPLATE = "profile.html.jinja"
PREFIX = "largest_"


@dataclass(frozen=True)
class Stage:
    name: str
    units: str
    host: bool
    here: float | None  # seconds measured on the machine that made the record
    guessed: tuple[float, float] | None  # seconds predicted for it where none were measured
    low: float  # seconds predicted
    high: float
    start: float  # of the bar's uncertain part and its end, percent of the longest
    end: float
    peak_gib: float


@dataclass(frozen=True)
class ProfileSection:
    record: Mapping[str, Any]
    stages: tuple[Stage, ...]
    largest: tuple[str, int] | None  # what may grow, and the largest number that surely fits
    seconds: tuple[float, float]
    remarks: tuple[str, ...]  # of the workload
    notes: tuple[str, ...] = ()
    template: str = TEMPLATE


def section(run: Run) -> ProfileSection:
    record = run.record
    longest = max((stage["seconds"][1] for stage in record["stages"]), default=0.0) or 1.0
    sizes = [(key.removeprefix(PREFIX), record[key]) for key in record if key.startswith(PREFIX)]
    low, high = record["seconds"]
    return ProfileSection(record, tuple(_stage(stage, longest) for stage in record["stages"]),
                          sizes[0] if sizes else None, (low, high), tuple(record["notes"]))


def _stage(stage: Mapping[str, Any], longest: float) -> Stage:
    low, high = stage["seconds"]
    return Stage(stage["stage"], stage["units"], stage["on"] == "host", stage["seconds_here"],
                 stage.get("seconds_here_predicted"), low, high, 100 * low / longest, 100 * high / longest,
                 stage["peak_bytes"] / 2**30)
