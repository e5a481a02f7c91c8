"""All defenses on the same victims: `python -m benchmarks.defense_sweep --data DIR`.

The sweep defense/sweeps/cpu.toml: GTSRB, narrow networks, four attacks, three victims each, 5 % clean images. Victims
and finished runs are kept under runs/sweeps/cpu, where `python -m submit defend sweep` finds them too. With
`--minutes` no new run starts later than that, and networks that not every defense has met are left out of the tables;
`--rounds 2` takes two victims of each attack.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.devices import chosen_device
from data.errors import InputError
from data.files import write_json
from data.model_zoo import ZooModel
from data.zoo_recipes import jobs
from submit.defend_commands import print_summaries, unit_line
from submit.defense_runs import run_plans
from submit.engines import Engine, chosen_engine
from submit.records import environment, peak_memory_gib
from submit.sweeps import Sweep, built_victims, read_sweep, summaries
from submit.zoo_commands import victim_line
from submit.zoo_victims import backdoored_samples

RECORDS = Path(__file__).parent / "records"
SWEEP = Path(__file__).parent.parent / "defense" / "sweeps" / "cpu.toml"


class TimeUp(Exception):
    """No further run is to start."""


def victims(sweep: Sweep, data: Path, out: Path, engine: Engine) -> tuple[list[ZooModel], list[InputError]]:
    """The sweep's networks: read where all are there, even among those of more rounds, else trained."""
    names = {job.name for job in jobs(sweep.victims) if job.attack}
    if all((out / "victims" / name).is_dir() for name in names):
        samples, problems = backdoored_samples(out / "victims")
        return [sample for sample in samples if sample.name in names], problems
    return built_victims(sweep.victims, data, out, engine=engine,
                         progress=lambda name, record: print(victim_line(name, record), file=sys.stderr))


def collect(sweep: Sweep, data: Path, out: Path, engine: Engine, end: float) -> list[dict[str, Any]]:
    """The units of every victim, found or measured, as far as the time allows."""
    units: list[dict[str, Any]] = []

    def keep(unit: dict[str, Any]) -> None:
        units.append(unit)
        print(unit_line(unit), file=sys.stderr)
        if time.monotonic() > end:
            raise TimeUp

    try:
        samples, problems = victims(sweep, data, out, engine)
        samples = sorted(samples, key=lambda sample: sample.name.rsplit("-", 1)[-1])  # round by round
        for _, problem in run_plans(samples, sweep.plans(), data, out, engine=engine, report=keep):
            problems += [problem] if problem else []
        for problem in problems:
            print(f"left out: {problem}", file=sys.stderr)
    except TimeUp:
        print("time is up: the same command goes on from here", file=sys.stderr)
    return units


def whole_victims(units: Sequence[Mapping[str, Any]], plans: int) -> list[Mapping[str, Any]]:
    """The units of the victims that have all of them."""
    counts: dict[str, int] = {}
    for unit in units:
        counts[unit["victim"]] = counts.get(unit["victim"], 0) + 1
    return [unit for unit in units if counts[unit["victim"]] == plans]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds gtsrb32/")
    parser.add_argument("--out", type=Path, default=Path("runs/sweeps/cpu"))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--rounds", type=int, default=3, help="victims of each attack, at most three")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    options = parser.parse_args()
    sweep, start = read_sweep(SWEEP), time.monotonic()
    sweep = replace(sweep, victims=replace(sweep.victims, repeats=min(options.rounds, sweep.victims.repeats)))
    engine = chosen_engine("local", options.workers, str(chosen_device()))
    units = collect(sweep, options.data, options.out, engine, start + 60 * options.minutes)
    units = whole_victims(units, len(sweep.plans()))
    tables = summaries(units)
    before = {unit["victim"]: unit["before"] for unit in units}
    slim = [{key: value for key, value in unit.items() if key not in ("details", "before", "settings")}
            for unit in units]
    command = f"python -m benchmarks.defense_sweep --data DIR --rounds {options.rounds}"
    record = {"command": command, "sweep": SWEEP.name, "tables": tables,
              "settings": {plan.label: plan.settings for plan in sweep.plans()}, "victims": before, "units": slim,
              "peak_memory_gib": peak_memory_gib(), "environment": environment()}
    write_json(RECORDS / "defense_sweep.json", record)
    print_summaries(tables)


if __name__ == "__main__":
    main()
