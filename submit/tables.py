"""What a run prints: the table, details of a single task, problems; progress on stderr."""
from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from submit.rules import rules
from submit.score_run import Outcome
from submit.scoring import IMAGE_METRICS, PIXEL_METRICS

FEW_CLASSES = 10
PLAIN_WIDTH = 120  # columns where stdout is no terminal
DEV_NOTE = ("dev: built-in practice data, not the contest's; the place only shows where that value stood in its "
            "final table.")


def console() -> Console:
    # No markup: texts and names come from strangers and may hold brackets.
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False, markup=False, emoji=False)


@contextmanager
def unit_progress() -> Iterator:
    """Give a callback (task, units done, units in all) that draws bars on stderr; silent without a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:
        rows: dict[str, int] = {}

        def update(task: str, done: int, total: int) -> None:
            row = rows.setdefault(task, len(rows)) if task in rows else rows.setdefault(task, bars.add_task(task))
            bars.update(row, completed=done, total=total)

        yield update


def print_record(record: dict) -> None:
    print(json.dumps(record, indent=1, ensure_ascii=False))


def print_outcomes(outcomes: list[Outcome], record: Path) -> None:
    """The one table; for a single task its details; then notes, problems (stderr) and the record's path."""
    out = console()
    out.print(_summary(outcomes))
    for outcome in outcomes:
        details = DETAILS[outcome.task](outcome.result.parts) if len(outcomes) == 1 or outcome.task in ALWAYS else None
        if details is not None:
            out.print(details)
    if any(outcome.dev for outcome in outcomes):
        out.print(DEV_NOTE, style="dim")
    for outcome in outcomes:
        for note in outcome.result.notes:
            out.print(f"{outcome.task}: {note}", style="dim")
        for problem in outcome.problems:
            print(f"left out: {problem}", file=sys.stderr)
    out.print(f"record: {record}", style="dim")


def _summary(outcomes: list[Outcome]) -> Table:
    table = Table()
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("value", "95 % interval", "n", "seconds", "place in the top 10"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        result = outcome.result
        place = (str(outcome.place) if outcome.place else "below 10") + (" (dev)" if outcome.dev else "")
        table.add_row(outcome.task, rules(outcome.task).metric, f"{result.value:.2f}", _span(result.interval),
                      f"{result.n} {result.counted}", f"{outcome.seconds:.1f}", place)
    return table


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.1f} - {interval[1]:.1f}"


def _category_table(parts: list[dict]) -> Table:
    names = (*IMAGE_METRICS, *PIXEL_METRICS)
    table = Table("category", "images")
    for name in (*names, "score"):
        table.add_column(name.replace("_", "\n"), justify="right")
    for part in parts:
        cells = [f"{part[name]:.1f}" if name in part else "-" for name in (*names, "leaderboard_score")]
        table.add_row(part["category"], str(part["images"]), *cells)
    return table


def _model_table(parts: list[dict]) -> Table:
    table = Table("model", "truth", "verdict", "p", "suspect", "margin by class [suspect]")
    for part in parts:
        verdict = ("backdoored" if part["backdoored"] else "clean") + ("" if part["correct"] else "  (wrong)")
        p = part.get("p_value")
        table.add_row(part["model"], part["attack"], verdict, "-" if p is None else f"{p:.3f}",
                      str(part.get("suspect", "-")), _margins(part.get("margins", []), part.get("suspect")))
    return table


def _margins(margins: list[float], suspect: int | None) -> str:
    """All of up to ten classes in their order; of more the four largest, each after its class."""
    if len(margins) <= FEW_CLASSES:
        return " ".join(f"[{round(m)}]" if k == suspect else str(round(m)) for k, m in enumerate(margins))
    largest = sorted(enumerate(margins), key=lambda item: -item[1])[:4]
    return ", ".join(f"{k}: {m:.1f}" for k, m in largest)


def _query_table(parts: list[dict]) -> Table | None:
    """The first missed queries or, where they are explained, those whose target stands last."""
    missed = [part for part in parts if not part["correct"]]
    if not missed:
        return None
    if "rank" in missed[0]:
        return _worst_queries(sorted(missed, key=lambda part: -part["rank"])[:8], len(missed))
    table = Table("row", "query text", "target", "found instead", title=f"first of {len(missed)} missed")
    for part in missed[:8]:
        table.add_row(str(part["row"]), part["query"], part["target"], part["found"])
    return table


def _worst_queries(parts: list[dict], missed: int) -> Table:
    table = Table("row", "query text", title=f"worst of {missed} missed")
    if "added" in parts[0]:
        table.add_column("read as")
    table.add_column("rank of target", justify="right")
    for name in ("target", "found instead"):
        table.add_column(name)
    for part in parts:
        objects = [f"+ {name}" for name in part.get("added", [])] + [f"- {name}" for name in part.get("removed", [])]
        read = ["\n".join(objects) or "nothing"] if "added" in part else []
        table.add_row(str(part["row"]), part["query"], *read, str(part["rank"]), part["target"], part["found"])
    return table


ALWAYS = ("backdoor",)  # shown beside the other tasks too: a dozen lines, and the margins explain the verdicts
DETAILS = {"retrieval": _query_table, "anomaly": _category_table, "backdoor": _model_table}
