"""Countermeasures against unlearnable examples: `python -m benchmarks.unlearnable_sweep --data DIR [--recipe NAME]`.

A recipe of defense/sweeps: unlearnable_cpu (CIFAR-10, 500 images a class, narrow networks), dvae_ablations (parts of
D-VAE on the same), unlearnable_full (all of it, full width, for a GPU). Finished runs are kept under runs/sweeps/NAME,
where `python -m submit defend sweep` finds them too. With `--minutes` no new run starts later than that; the same
command then goes on, and a record is written once all runs are there.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.devices import chosen_device
from data.errors import InputError
from data.files import write_json
from submit.engines import chosen_engine
from submit.records import environment, peak_memory_gib
from submit.unlearnable_commands import print_accuracies, trial_line
from submit.unlearnable_runs import run_trials
from submit.unlearnable_sweeps import read_unlearnable_sweep, unlearnable_summaries

ROOT = Path(__file__).parent
SWEEPS = ROOT.parent / "defense" / "sweeps"
HIDDEN = ("losses", "details", "settings", "attack_settings")  # of a unit: in the recipe, or long


class TimeUp(Exception):
    """No further run is to start."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar10/")
    parser.add_argument("--recipe", default="unlearnable_cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    options = parser.parse_args()
    try:
        sweep = read_unlearnable_sweep(SWEEPS / f"{options.recipe}.toml")
    except InputError as error:
        parser.error(str(error))
    end = time.monotonic() + 60 * options.minutes

    def report(unit: Mapping[str, Any]) -> None:
        print(trial_line(unit), file=sys.stderr)
        if time.monotonic() > end:
            raise TimeUp

    try:
        units = run_trials(sweep.trials(), sweep.ground(options.data, Path("runs/sweeps") / options.recipe),
                           engine=chosen_engine("local", options.workers, str(chosen_device())), report=report,
                           poisoned=lambda line: print(line, file=sys.stderr))
    except TimeUp:
        sys.exit("time is up: the same command goes on from here")
    tables = unlearnable_summaries(units)
    slim = [{key: value for key, value in unit.items() if key not in HIDDEN} for unit in units]
    write_json(ROOT / "records" / f"{options.recipe}.json", {
        "command": f"python -m benchmarks.unlearnable_sweep --data DIR --recipe {options.recipe}", "tables": tables,
        "attacks": sweep.attacks, "defenses": sweep.defenses, "victim": sweep.victim, "units": slim,
        "hours_of_runs": sum(unit["seconds"] for unit in units) / 3600, "peak_memory_gib": peak_memory_gib(),
        "environment": environment()})
    print_accuracies(tables)


if __name__ == "__main__":
    main()
