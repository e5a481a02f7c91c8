"""`defend`: one defense over a zoo, or a sweep of defenses over victims of a recipe; tables and the record."""
from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from data.errors import InputError, expect
from data.files import write_json
from data.model_zoo import ZooModel
from defense.defenses import DEFENSES, ORACLES
from submit.defense_runs import Plan, run_plans
from submit.engines import Engine
from submit.records import environment, peak_memory_gib
from submit.sweeps import METRICS, built_victims, read_sweep, summaries
from submit.tables import console, print_record, unit_progress
from submit.zoo_commands import victim_line
from submit.zoo_victims import backdoored_samples

Outcome = tuple[list[dict[str, Any]], list[InputError]]  # units, and what was left out


def check_method(name: str) -> None:
    """InputError with all names where there is no such defense."""
    expect(name in DEFENSES, "METHOD", f"sweep or one of {', '.join(DEFENSES)}", name)


def defend_zoo(method: str, zoo: Path, data: Path | None, *, clean: float, seed: int, device: str, engine: Engine,
               runs: Path) -> Outcome:
    """One defense over the backdoored networks of `zoo`; finished ones are found again in `runs`/defend."""
    expect(0 < clean <= 1, "--clean", "a share in (0, 1]", clean)
    samples, problems = backdoored_samples(zoo)
    return _run(samples, problems, [Plan(method, method, {}, clean, seed)], data, runs / "defend", device, engine)


def defend_sweep(recipe: Path, data: Path | None, *, device: str, engine: Engine, out: Path) -> Outcome:
    """Train the victims that `out` lacks, then run what it lacks of the sweep."""
    sweep = read_sweep(recipe)
    plans = sweep.plans()
    chosen = torch.device(device)
    with unit_progress() as bar:
        done = 0

        def trained(name: str, record: Mapping[str, Any]) -> None:
            nonlocal done
            done += 1
            bar("victims", done, done)
            print(victim_line(name, record), file=sys.stderr)

        samples, problems = built_victims(sweep.victims, data, out, device=chosen,
                                          workers=engine.workers, progress=trained)
    return _run(samples, problems, plans, data, out, device, engine)


def _run(samples: Sequence[ZooModel], problems: list[InputError], plans: Sequence[Plan], data: Path | None, out: Path,
         device: str, engine: Engine) -> Outcome:
    units, refused, done, total = [], [], 0, len(samples) * len(plans)
    with unit_progress() as bar:
        def report(unit: Mapping[str, Any]) -> None:
            nonlocal done
            done += 1
            bar("defend", done, total)
            print(unit_line(unit), file=sys.stderr)

        bar("defend", 0, total)
        for found, problem in run_plans(samples, plans, data, out, device=torch.device(device),
                                        engine=engine, report=report):
            units += found
            refused += [problem] if problem else []
    problems = refused + problems
    expect(units, out, "at least one network that could be judged", problems[0] if problems else "none")
    order = {sample.name: i for i, sample in enumerate(samples)}
    return sorted(units, key=lambda unit: order[unit["victim"]]), problems  # stable: a victim's plans in their order


def unit_line(unit: Mapping[str, Any]) -> str:
    """One finished unit, for stderr."""
    pairs = [f"{name} {100 * unit['before'][name]:.1f} -> {100 * unit['after'][name]:.1f}" for name in ("ACC", "ASR")]
    failed = f"; failed: {unit['failed']}" if unit["failed"] else ""
    return f"{unit['victim']}, {unit['defense']}: {', '.join(pairs)}, DER {100 * unit['DER']:.1f}, " \
           f"{unit['seconds']:.0f} s{failed}"


def finish(outcome: Outcome, run: Path, *, command: str, seed: int | None, device: str, as_json: bool) -> int:
    """Write the record, print it or the tables; how many networks were left out."""
    units, problems = outcome
    record = {"command": command, "seed": seed, "device": device,
              "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "tables": summaries(units),
              "problems": [str(problem) for problem in problems], "units": units, "environment": environment(),
              "peak_memory_gib": peak_memory_gib()}
    write_json(run / "record.json", record)
    if as_json:
        print_record(record)
    else:
        print_summaries(record["tables"])
        oracles = dict.fromkeys(unit["defense"] for unit in units if unit["method"] in ORACLES)
        if oracles:
            console().print(f"{', '.join(oracles)}: chooses on triggered test images, which no defender has",
                            style="dim")
        console().print(f"record: {run / 'record.json'}", style="dim")
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return len(problems)


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
                      *(_cell(row["all"][metric]) for metric in METRICS), f"{row['seconds']:.1f}")
    return table


def _by_attack(where: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    attacks = list(rows[0]["attacks"])
    table = Table("defense", title=f"{where}: ACC, ASR, DER by attack, percent")
    for attack in attacks:
        table.add_column(attack, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["defense"], *(_three(row["attacks"].get(attack)) for attack in attacks))
    return table


def _cell(spread: Mapping[str, float | None]) -> str:
    deviation = "" if spread["std"] is None else f" ± {spread['std']:.1f}"
    return f"{spread['mean']:.1f}{deviation}"


def _three(found: Mapping[str, Mapping[str, float]] | None) -> str:
    return "-" if found is None else "  ".join(f"{found[name]['mean']:.1f}" for name in ("ACC", "ASR", "DER"))

