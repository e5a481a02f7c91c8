"""The contest's numbers, read from `submit/rules/*.toml`; nothing else in the kit knows one."""
from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).with_name("rules")


@dataclass(frozen=True)
class Rules:
    """What the contest fixes for one task."""

    title: str
    metric: str  # name and unit of the leaderboard's figure
    leaderboard: tuple[float, ...]  # the ten published scores, best first, in the metric's unit
    weights: dict[str, float] = field(default_factory=dict)  # of each metric in a combined score


@cache
def rules(task: str) -> Rules:
    """The rules of `task`: retrieval, anomaly or backdoor."""
    content = tomllib.loads((FOLDER / f"{task}.toml").read_text(encoding="utf-8"))
    return Rules(**{**content, "leaderboard": tuple(content["leaderboard"])})


def place(value: float, leaderboard: tuple[float, ...]) -> int | None:
    """The place (from 1) that `value` would have taken, ahead of equals; None below the last one listed."""
    better = sum(score > value for score in leaderboard)
    return better + 1 if better < len(leaderboard) else None
