"""Defenses on the page: their tables, what each trades of accuracy for attack success, and curves over a sweep."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from submit.report_parts.charts import Chart, line
from submit.report_parts.run_records import Run
from submit.sweeps import METRICS

TEMPLATE = "defense.html.jinja"
VARIED = {"clean": "share of clean images", "ratio": "share of poisoned images"}
OF_ALL = {"clean": "clean", "ratio": "poisoned"}
STYLES = 8  # line styles of the page


@dataclass(frozen=True)
class Dot:
    """A defense at (ASR, ACC) percent; number: its row in the table."""

    number: int
    name: str
    x: float
    y: float


@dataclass(frozen=True)
class Table:
    title: str
    rows: tuple[Mapping[str, Any], ...]  # as in the record
    attacks: tuple[str, ...]
    dots: tuple[Dot, ...]
    lowest: int  # ACC at the bottom of the chart of dots, percent


@dataclass(frozen=True)
class DefenseSection:
    tables: tuple[Table, ...]
    charts: tuple[Chart, ...]
    failed: tuple[tuple[str, str, str], ...]  # victim, defense, why
    notes: tuple[str, ...]
    metrics: tuple[str, ...] = METRICS
    template: str = TEMPLATE


def section(run: Run) -> DefenseSection:
    record = run.record
    failed = [(unit["victim"], unit["defense"], unit["failed"]) for unit in record["units"] if unit["failed"]]
    return DefenseSection(tuple(_table(table) for table in record["tables"]), tuple(_curves(record["tables"])),
                          tuple(failed), tuple(f"left out: {problem}" for problem in record["problems"]))


def _table(table: Mapping[str, Any]) -> Table:
    rows = tuple(table["rows"])
    means = [(row["all"]["ASR"]["mean"], row["all"]["ACC"]["mean"]) for row in rows]
    lowest = min(90, int(min(acc for _, acc in means)) // 10 * 10)
    dots = tuple(Dot(number, row["defense"], asr, 100 * (acc - lowest) / (100 - lowest))
                 for number, (row, (asr, acc)) in enumerate(zip(rows, means, strict=True)))
    title = f"{table['set']}, {100 * table['ratio']:g} % poisoned, {100 * table['clean']:g} % clean"
    return Table(title, rows, tuple(rows[0]["attacks"]), dots, lowest)


def _curves(tables: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """DER of every defense over what the sweep varies, where it does, for each setting of the rest."""
    charts = []
    for varied, title in VARIED.items():
        groups: dict[tuple, list[Mapping[str, Any]]] = {}
        for table in tables:
            rest = tuple((key, table[key]) for key in ("set", *VARIED) if key != varied)
            groups.setdefault(rest, []).append(table)
        charts += [_curve(varied, title, dict(rest), found) for rest, found in groups.items() if len(found) > 1]
    return charts


def _curve(varied: str, title: str, rest: Mapping[str, Any], tables: Sequence[Mapping[str, Any]]) -> Chart:
    tables = sorted(tables, key=lambda table: table[varied])
    first, last = tables[0][varied], tables[-1][varied]
    points: dict[str, list[tuple[float, float]]] = {}
    for table in tables:
        for row in table["rows"]:
            x = (table[varied] - first) / (last - first)
            points.setdefault(row["defense"], []).append((x, row["all"]["DER"]["mean"] / 100))
    lines = tuple(line(name, *zip(*found, strict=True), i % STYLES) for i, (name, found) in enumerate(points.items()))
    other = ", ".join(f"{100 * share:g} % {OF_ALL[key]}" if key in OF_ALL else str(share)
                      for key, share in rest.items())
    return Chart(f"{other}: DER", title, "DER", lines, across_ends=(f"{100 * first:g} %", f"{100 * last:g} %"))
