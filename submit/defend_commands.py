"""`defend`: which kind of run is asked for; one defense over a zoo, or a sweep of defenses over victims of a recipe;
tables and the record."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.table import Table

from data.errors import InputError, expect
from data.files import write_json
from data.model_zoo import ZooModel
from data.unlearnable import UNLEARNABLE
from defense.countermeasures import COUNTERMEASURES
from defense.defenses import DEFENSES, ORACLES
from submit.defense_runs import Plan, run_plans
from submit.engines import Engine
from submit.records import environment, peak_memory_gib
from submit.sweeps import METRICS, built_victims, read_sweep, summaries
from submit.tables import console, print_record, unit_progress
from submit.zoo_commands import victim_line
from submit.zoo_victims import backdoored_samples

SWEEP, ZOO, ATTACK = "sweep", "zoo", "attack"  # kinds of runs; the first stands in place of a method's name
CLEAN = 0.05  # share of the training images that a defense gets unless told
NEEDED = {SWEEP: "RECIPE", ZOO: "--zoo", ATTACK: "--attack"}
OPTIONAL = {SWEEP: {"--out"}, ZOO: {"--clean"}, ATTACK: {"--ratio", "--set"}}


@dataclass(frozen=True)
class Outcome:
    """tables: of the record, by key. show: prints them. problems: what was left out."""

    units: Sequence[Mapping[str, Any]]
    problems: Sequence[InputError]
    tables: Mapping[str, Any]
    show: Callable[[], None]


def kind_asked(method: str, options: Mapping[str, Any]) -> str:
    """SWEEP, ZOO or ATTACK, as the method is; options: by name, None = not given. InputError where one is missing or
    is another kind's."""
    kind = SWEEP if method == SWEEP else ZOO if method in DEFENSES else ATTACK
    expect(kind != ATTACK or method in COUNTERMEASURES, "METHOD",
           f"sweep or one of {', '.join(DEFENSES)} (with --zoo) or of {', '.join(COUNTERMEASURES)} (with --attack)",
           method)
    wanted = {SWEEP: "a RECIPE", ZOO: "--zoo DIR", ATTACK: f"--attack, one of {', '.join(UNLEARNABLE)}"}[kind]
    for name, value in options.items():
        welcome = value is None or name == NEEDED[kind] or name in OPTIONAL[kind]
        expect(welcome, f"defend {method}", f"{wanted} and no {name}", f"{name} {value}")
    expect(options[NEEDED[kind]] is not None, f"defend {method}", wanted, "nothing")
    return kind


def defend_zoo(method: str, zoo: Path, data: Path | None, *, clean: float, seed: int, engine: Engine, runs: Path
               ) -> Outcome:
    """One defense over the backdoored networks of `zoo`; finished ones are found again in `runs`/defend."""
    expect(0 < clean <= 1, "--clean", "a share in (0, 1]", clean)
    samples, problems = backdoored_samples(zoo)
    return _run(samples, problems, [Plan(method, method, {}, clean, seed)], data, runs / "defend", engine)


def defend_sweep(recipe: Path, data: Path | None, *, engine: Engine, out: Path) -> Outcome:
    """Train the victims that `out` lacks, then run what it lacks of the sweep."""
    sweep = read_sweep(recipe)
    with unit_progress() as bar:
        done = 0

        def trained(name: str, record: Mapping[str, Any]) -> None:
            nonlocal done
            done += 1
            bar("victims", done, done)
            print(victim_line(name, record), file=sys.stderr)

        samples, problems = built_victims(sweep.victims, data, out, engine=engine, progress=trained)
    return _run(samples, problems, sweep.plans(), data, out, engine)


def _run(samples: Sequence[ZooModel], problems: list[InputError], plans: Sequence[Plan], data: Path | None, out: Path,
         engine: Engine) -> Outcome:
    units, refused = [], []
    with reporting(len(samples) * len(plans), unit_line) as report:
        for found, problem in run_plans(samples, plans, data, out, engine=engine, report=report):
            units += found
            refused += [problem] if problem else []
    problems = refused + problems
    expect(units, out, "at least one network that could be judged", problems[0] if problems else "none")
    order = {sample.name: i for i, sample in enumerate(samples)}
    units = sorted(units, key=lambda unit: order[unit["victim"]])  # stable: a victim's plans in their order
    tables = summaries(units)
    return Outcome(units, problems, {"tables": tables}, lambda: _show(units, tables))


@contextmanager
def reporting(total: int, line: Callable[[Mapping[str, Any]], str]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Give a function that takes a finished unit: its line goes to stderr, the bar moves on."""
    done = 0
    with unit_progress() as bar:
        def report(unit: Mapping[str, Any]) -> None:
            nonlocal done
            done += 1
            bar("defend", done, total)
            print(line(unit), file=sys.stderr)

        bar("defend", 0, total)
        yield report


def unit_line(unit: Mapping[str, Any]) -> str:
    """One finished unit, for stderr."""
    pairs = [f"{name} {100 * unit['before'][name]:.1f} -> {100 * unit['after'][name]:.1f}" for name in ("ACC", "ASR")]
    failed = f"; failed: {unit['failed']}" if unit["failed"] else ""
    return f"{unit['victim']}, {unit['defense']}: {', '.join(pairs)}, DER {100 * unit['DER']:.1f}, " \
           f"{unit['seconds']:.0f} s{failed}"


def finish(outcome: Outcome, run: Path, *, command: str, seed: int | None, device: str, as_json: bool) -> int:
    """Write the record, print it or the tables; how much was left out."""
    record = {"command": command, "seed": seed, "device": device,
              "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), **outcome.tables,
              "problems": [str(problem) for problem in outcome.problems], "units": list(outcome.units),
              "environment": environment(), "peak_memory_gib": peak_memory_gib()}
    write_json(run / "record.json", record)
    if as_json:
        print_record(record)
    else:
        outcome.show()
        console().print(f"record: {run / 'record.json'}", style="dim")
    for problem in outcome.problems:
        print(f"left out: {problem}", file=sys.stderr)
    return len(outcome.problems)


def _show(units: Sequence[Mapping[str, Any]], tables: Sequence[Mapping[str, Any]]) -> None:
    print_summaries(tables)
    oracles = dict.fromkeys(unit["defense"] for unit in units if unit["method"] in ORACLES)
    if oracles:
        console().print(f"{', '.join(oracles)}: chooses on triggered test images, which no defender has", style="dim")


def print_summaries(tables: Sequence[Mapping[str, Any]]) -> None:
    """Two tables a summary: every defense over all attacks, and by attack."""
    out = console()
    for found in tables:
        where = f"{found['set']}, {100 * found['ratio']:g} % poisoned, {100 * found['clean']:g} % clean"
        out.print(_overall(where, found["rows"]))
        if len(found["rows"][0]["attacks"]) > 1:
            out.print(_by_attack(where, found["rows"]))


def _overall(where: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("defense", title=f"{where}: mean ± standard deviation, percent")
    for name in ("runs", "failed", *METRICS, "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["defense"], str(row["runs"]), str(row["failed"]),
                      *(cell(row["all"][metric]) for metric in METRICS), f"{row['seconds']:.1f}")
    return table


def _by_attack(where: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    attacks = list(rows[0]["attacks"])
    table = Table("defense", title=f"{where}: ACC, ASR, DER by attack, percent")
    for attack in attacks:
        table.add_column(attack, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["defense"], *(_three(row["attacks"].get(attack)) for attack in attacks))
    return table


def cell(spread: Mapping[str, float | None]) -> str:
    """Mean and deviation of a table's cell."""
    deviation = "" if spread["std"] is None else f" ± {spread['std']:.1f}"
    return f"{spread['mean']:.1f}{deviation}"


def _three(found: Mapping[str, Mapping[str, float]] | None) -> str:
    return "-" if found is None else "  ".join(f"{found[name]['mean']:.1f}" for name in ("ACC", "ASR", "DER"))

