"""A run as the judge on the page: a line a verdict."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from submit.report_parts.run_records import Run

TEMPLATE = "judge.html.jinja"


@dataclass(frozen=True)
class JudgeSection:
    judge: Mapping[str, Any]  # of the record: package, tier, python, verdicts
    broken: int
    notes: tuple[str, ...] = ()
    template: str = TEMPLATE


def section(run: Run) -> JudgeSection:
    judge = run.record["judge"]
    return JudgeSection(judge, sum(not line["ok"] for line in judge["verdicts"]))
