"""All defenses on the same victims: `python -m benchmarks.defense_sweep --data DIR [--recipe NAME]`.

A sweep of defense/sweeps: cpu (GTSRB, narrow networks, four attacks, three victims each, 5 % clean images), half (the
same at 16 x 16, every defense at its published length) or full (CIFAR-10, PreActResNet18, eight attacks at 10 %, three
at 5 and 1 %, for a GPU), or a TOML file. One victim after the
other is trained, meets every defense and, with `--drop`, loses its weights; its units are then kept in a file under
runs/sweeps/NAME/whole that says which victim it was, so that another machine that has the files goes on with the next
one. With `--minutes` nothing starts that would not end by then, by the longest of its kind so far; a victim that not
every defense has met is left out of the tables. `--rounds 2` takes two victims of each attack. Exit status 3 where
victims are left.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import TIME_UP, add_device, add_minutes, add_out, device_of, record_file
from benchmarks.time_limit import TimeLimit
from benchmarks.victim_repairs import Task, kind, learn, repaired, seconds_of, tasks_of, with_rounds
from benchmarks.work_pool import threads_each, within_time
from benchmarks.zoo_work import job_kind
from data.errors import InputError, expect
from data.files import write_json
from submit.defend_commands import print_summaries, unit_line
from submit.records import environment, peak_memory_gib
from submit.sweeps import Sweep, read_sweep, summaries

SWEEPS = Path(__file__).parent.parent / "defense" / "sweeps"
HIDDEN = ("details", "before", "settings")  # of a unit: in other parts of the record, or long


def recipe_file(name: str) -> Path:
    """A sweep of the repository by name, else the file."""
    return path if (path := SWEEPS / f"{name}.toml").is_file() else Path(name)


def go_on(tasks: Sequence[Task], limit: TimeLimit, workers: int) -> None:
    """Do what fits into the time, a line on stderr for each unit."""
    lacking = [task for task in tasks if task.found() is None]
    for task, found, error in within_time(repaired, lacking, kind, limit, workers=workers,
                                          initializer=torch.set_num_threads,
                                          initargs=(threads_each(tasks[0].device, workers),)):
        if found:
            limit.took(job_kind(task.job), found["training_seconds"])
        for unit in found["units"] if found else ():
            limit.took(unit["defense"], seconds_of(unit))
            print(unit_line(unit), file=sys.stderr)
        print(f"{task.job.name}: {_outcome(found, error)}", file=sys.stderr, flush=True)


def _outcome(found: Mapping[str, Any] | None, error: Exception | None) -> str:
    if found is None:
        return f"left out, {type(error).__name__}: {error}"
    if found["failed"]:
        return f"failed, {found['failed']}"
    return f"{found['left']} defenses left" if found["left"] else "met every defense"


def gathered(sweep: Sweep, tasks: Sequence[Task]) -> dict[str, Any]:
    """The record's part on the victims: tables of those that met every defense."""
    contents = {task.job.name: task.found() for task in tasks}
    whole = [content for content in contents.values() if content and not content["failed"]]
    units = [unit for content in whole for unit in content["units"]]
    return {"of": len(tasks), "n": len(whole), "left": sum(content is None for content in contents.values()),
            "failed": {name: found["failed"] for name, found in contents.items() if found and found["failed"]},
            "tables": summaries(units), "settings": {plan.label: plan.settings for plan in sweep.plans()},
            "victims": {unit["victim"]: unit["before"] for unit in units},
            "units": [{key: value for key, value in unit.items() if key not in HIDDEN} for unit in units]}


def write_record(found: Mapping[str, Any], command: str, device: torch.device, path: Path) -> None:
    write_json(path, {"command": command, "device": str(device), **found, "peak_memory_gib": peak_memory_gib(),
                      "environment": environment()})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder that holds the image set, unless it is built in")
    parser.add_argument("--recipe", default="cpu", help="cpu, half, full or a TOML file")
    parser.add_argument("--runs", type=Path, help="folder of what is kept; default runs/sweeps/RECIPE")
    parser.add_argument("--rounds", type=int, help="victims of each attack; default what the recipe says")
    parser.add_argument("--workers", type=int, default=1, help="victims side by side")
    parser.add_argument("--drop", action="store_true", help="delete a victim's weights when its units are whole")
    add_minutes(parser)
    add_device(parser)
    add_out(parser, "defense_sweep (of other recipes defense_sweep_RECIPE)")
    options = parser.parse_args(arguments)
    device, name, limit = device_of(options, parser), Path(options.recipe).stem, TimeLimit(options.minutes)
    try:
        for option in ("workers", "rounds"):
            expect((getattr(options, option) or 1) > 0, f"--{option}", "> 0", getattr(options, option))
        sweep = with_rounds(read_sweep(recipe_file(options.recipe)), options.rounds)
        tasks = tasks_of(sweep, options.data, options.runs or Path("runs/sweeps") / name, device, limit,
                         drop=options.drop)
    except InputError as error:
        parser.error(str(error))
    learn(tasks, limit)
    go_on(tasks, limit, options.workers)
    found = gathered(sweep, tasks)
    command = f"python -m benchmarks.defense_sweep --data DIR --recipe {name}" + \
        (f" --rounds {options.rounds}" if options.rounds else "")
    file = "defense_sweep" if name == "cpu" else f"defense_sweep_{name}"
    write_record({"sweep": f"{name}.toml", **found}, command, device, record_file(file, device, options.out))
    print(f"{found['n']} of {found['of']} victims met every defense, {len(found['failed'])} below their floors, "
          f"{found['left']} left")
    print_summaries(found["tables"])
    return TIME_UP if found["left"] else 0


if __name__ == "__main__":
    sys.exit(main())
