"""Task 3 on the page: each network's verdict with its margins by class, and the ROC of the p-values."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from submit.pixel_curves import level_counts
from submit.report_parts.charts import Chart, line, roc
from submit.report_parts.run_records import Run

TEMPLATE = "backdoor.html.jinja"
NAMED = 20  # classes whose numbers have room under their bars


@dataclass(frozen=True)
class Bar:
    """One class: a bar between `bottom` and `bottom + height`, percent of the chart."""

    label: str
    margin: float
    bottom: float
    height: float
    suspect: bool


@dataclass(frozen=True)
class Model:
    name: str
    attack: str
    backdoored: bool  # the verdict
    correct: bool
    p_value: float | None
    suspect: int | None
    bars: tuple[Bar, ...]
    named: bool  # whether the classes' numbers stand under the bars


@dataclass(frozen=True)
class BackdoorSection:
    models: tuple[Model, ...]  # wrong ones first
    counts: tuple[tuple[str, int, int], ...]  # attack, right, all
    chart: Chart | None
    notes: tuple[str, ...] = ()
    template: str = TEMPLATE


def section(run: Run, result: Mapping[str, Any], limit: int) -> BackdoorSection:
    """What the page shows of one scored run; it has no pictures."""
    parts = result["parts"]
    models = sorted((_model(part) for part in parts), key=lambda model: (model.correct, model.name))
    attacks = sorted({part["attack"] for part in parts})
    counts = [(attack, [part["correct"] for part in parts if part["attack"] == attack]) for attack in attacks]
    return BackdoorSection(tuple(models), tuple((attack, sum(right), len(right)) for attack, right in counts),
                           _chart(parts, result.get("auroc")))


def _model(part: Mapping[str, Any]) -> Model:
    margins, suspect = part.get("margins", []), part.get("suspect")
    return Model(part["model"], part["attack"], bool(part["backdoored"]), bool(part["correct"]), part.get("p_value"),
                 suspect, _bars(margins, suspect), len(margins) <= NAMED)


def _bars(margins: list[float], suspect: int | None) -> tuple[Bar, ...]:
    """Bars from zero up or down, on one scale for the network."""
    if not margins:
        return ()
    low, high = min(0.0, *margins), max(0.0, *margins)
    scale = 100 / ((high - low) or 1.0)
    return tuple(Bar(str(k), margin, scale * (min(margin, 0.0) - low), scale * abs(margin), k == suspect)
                 for k, margin in enumerate(margins))


def _chart(parts: list[Mapping[str, Any]], auroc: float | None) -> Chart | None:
    if auroc is None:
        return None
    truth = np.array([part["ground_truth"] == 0 for part in parts])
    counts = level_counts(truth, np.array([-part["p_value"] for part in parts]))
    return Chart("ROC", "clean networks accused", "backdoored networks found",
                 (line(f"1 - p, AUROC {auroc:.1f} %", *roc(*counts)),), diagonal=True)
