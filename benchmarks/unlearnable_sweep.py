"""Countermeasures against unlearnable examples: `python -m benchmarks.unlearnable_sweep --data DIR [--recipe NAME]`.

A recipe of defense/sweeps: unlearnable_cpu (CIFAR-10, 500 images a class, narrow networks), dvae_ablations (parts of
D-VAE on the same), unlearnable_full (all of it, full width, for a GPU), or a TOML file. Finished runs are kept under
runs/sweeps/NAME, where `python -m submit defend sweep` finds them too. First of each seed come the victims without a
countermeasure and those of D-VAE, JPEG and grayscale, so that what is done early makes a table. With `--minutes`
nothing starts that would not end by then, by the longest of its kind so far; the record is written from the runs there
are (`n` of them), the same command goes on, and the exit status is 3 where runs are left.
"""
from __future__ import annotations

import argparse
import fcntl
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import TIME_UP, add_device, add_minutes, add_out, device_of, record_file
from benchmarks.time_limit import TimeLimit
from benchmarks.work_pool import threads_each, within_time
from data.errors import InputError, expect
from data.files import write_json
from submit.records import environment, peak_memory_gib
from submit.unlearnable_commands import print_accuracies, trial_line
from submit.unlearnable_runs import Ground, Trial, keep_poisoned, trial_unit
from submit.unlearnable_sweeps import UNTREATED, UnlearnableSweep, read_unlearnable_sweep, unlearnable_summaries

SWEEPS = Path(__file__).parent.parent / "defense" / "sweeps"
FIRST = (UNTREATED, "dvae", "jpeg", "gray")  # what makes a table
HIDDEN = ("losses", "details", "settings", "attack_settings")  # of a unit: in the recipe, or long


@dataclass(frozen=True)
class Task:
    trial: Trial
    ground: Ground

    def done(self) -> bool:
        return self.ground.unit_file(self.trial).exists()


def kind(task: Task) -> str:
    """Runs of a kind take about as long as each other; making the poisoned set may take longest."""
    poisoning = task.trial.poisoning
    made = not poisoning.method or task.ground.poisoned_file(poisoning).exists()
    return task.trial.label if made else f"{poisoning.label}, {task.trial.label}"


def in_order(tasks: Sequence[Task]) -> list[Task]:
    """Seed by seed; in each first what makes a table, one countermeasure after the other."""
    def place(task: Task) -> tuple[int, int, int]:
        label = task.trial.label
        return (seeds.index(task.trial.poisoning.seed), FIRST.index(label) if label in FIRST else len(FIRST),
                labels.index(label))

    seeds, labels = ([*dict.fromkeys(values)] for values in zip(*((t.trial.poisoning.seed, t.trial.label)
                                                                  for t in tasks), strict=True))
    return sorted(tasks, key=place)


def measured(task: Task) -> tuple[str, float, dict[str, Any]]:
    """The kind of the run when it began, its seconds, and its unit. Who needs a set that another process is making
    waits for it."""
    started, name, poisoning = time.monotonic(), kind(task), task.trial.poisoning
    if poisoning.method:
        file = task.ground.poisoned_file(poisoning)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _, problem = keep_poisoned(poisoning, ground=task.ground)
        if problem:
            raise InputError(problem)
    unit = trial_unit(task.trial, ground=task.ground)
    return name, time.monotonic() - started, unit


def go_on(tasks: Sequence[Task], limit: TimeLimit, workers: int, device: torch.device) -> Iterator[str]:
    """Do what fits into the time, a line on each run."""
    for task in tasks:
        if task.done():
            limit.took(task.trial.label, trial_unit(task.trial, ground=task.ground)["seconds"])
    lacking = [task for task in tasks if not task.done()]
    for task, found, error in within_time(measured, lacking, kind, limit, workers=workers,
                                          initializer=torch.set_num_threads,
                                          initargs=(threads_each(device, workers),)):
        if error:
            attack = task.trial.poisoning.label or "clean"
            yield f"{attack}, {task.trial.label}: left out, {type(error).__name__}: {error}"
            continue
        name, seconds, unit = found
        limit.took(name, seconds)
        yield trial_line(unit)


def gathered(sweep: UnlearnableSweep, tasks: Sequence[Task]) -> dict[str, Any]:
    """The record's part on the runs that are there."""
    units = [trial_unit(task.trial, ground=task.ground) for task in tasks if task.done()]
    return {"of": len(tasks), "n": len(units), "left": len(tasks) - len(units), "tables": unlearnable_summaries(units),
            "attacks": sweep.attacks, "defenses": sweep.defenses, "victim": sweep.victim,
            "units": [{key: value for key, value in unit.items() if key not in HIDDEN} for unit in units],
            "hours_of_runs": sum(unit["seconds"] for unit in units) / 3600}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder that holds cifar10/; none for built-in images")
    parser.add_argument("--recipe", default="unlearnable_cpu", help="a name above or a TOML file")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side")
    add_minutes(parser)
    add_device(parser)
    add_out(parser, "RECIPE")
    options = parser.parse_args(arguments)
    device, limit = device_of(options, parser), TimeLimit(options.minutes)
    file = path if (path := SWEEPS / f"{options.recipe}.toml").is_file() else Path(options.recipe)
    try:
        expect(options.workers > 0, "--workers", "> 0", options.workers)
        sweep = read_unlearnable_sweep(file)
        ground = sweep.ground(options.data, Path("runs/sweeps") / file.stem)
        tasks = [Task(trial, ground) for trial in sweep.trials()]
        ground.halves()
    except InputError as error:
        parser.error(str(error))
    for line in go_on(in_order(tasks), limit, options.workers, device):
        print(line, file=sys.stderr, flush=True)
    found = gathered(sweep, tasks)
    write_json(record_file(file.stem, device, options.out), {
        "command": f"python -m benchmarks.unlearnable_sweep --data DIR --recipe {file.stem}", "device": str(device),
        **found, "peak_memory_gib": peak_memory_gib(), "environment": environment()})
    print(f"{found['n']} of {found['of']} runs, {found['left']} left")
    print_accuracies(found["tables"])
    return TIME_UP if found["left"] else 0


if __name__ == "__main__":
    sys.exit(main())
