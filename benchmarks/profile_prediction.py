"""Predicted against measured seconds on this machine, at sizes that the calibration did not see:
`python -m benchmarks.profile_prediction [--device cuda] [--preset report]`.

The rates come from the micro-benchmark alone (`submit.calibration`); the costs of a comparison from smaller sets, those
of nets from `meta`. A prediction is right where the measured median lies within its range. With `--minutes` sizes that
would not end in time are left for the same command.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.kept_parts import measured_parts
from benchmarks.options import TIME_UP, add_device, add_minutes, add_out, device_of, record_file
from benchmarks.time_limit import TimeLimit
from data.files import write_json
from submit.calibration import measured_rates, synchronize
from submit.op_costs import count, total
from submit.profiling import Sampled, stage_profiles
from submit.records import environment, peak_memory_gib
from submit.workloads import Place, Stage, Workload, anomaly, backdoor, repair, retrieval

REPEATS = 3
TIMES_SMALLER, TIMES_LARGER = 3, 2  # than the sample: the held-out sizes of nets
CATEGORIES = (24, 64)               # images: the held-out sizes of comparisons
MOST_FLOP = 2e12                    # of one measured call


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="embedded", choices=("embedded", "report"))
    parser.add_argument("--most", type=int, help="only so many comparisons, the first")
    add_minutes(parser)
    add_device(parser, "cpu")
    add_out(parser, "profile_prediction")
    options = parser.parse_args(arguments)
    device, limit = device_of(options, parser), TimeLimit(options.minutes)
    half = device.type == "cuda"
    rates: list[object] = []  # measured when the first comparison asks

    def part(stage: Stage, size: int) -> dict:
        rates or rates.append(measured_rates(device))
        return shown(compared(stage, size, rates[0], device) or {})

    workloads = (retrieval(options.preset, 100, half), anomaly(options.preset, 100, 1, half), backdoor(10, half),
                 repair(100, 10, half))
    stages = [(f"{made.title} {stage.name} {size}", stage, size) for made in workloads
              for stage in made.stages if not stage.host for size in held_out(stage)]
    parts = {f"{options.preset} {label}": lambda one=stage, n=size: part(one, n)
             for label, stage, size in stages[:options.most]}
    found, left = measured_parts("profile_prediction", device, parts, limit)
    rows = [row for row in found.values() if row]
    right = sum(row["within"] for row in rows)
    print(f"{right} of {len(rows)} within the predicted range, {left} left")
    write_json(record_file("profile_prediction", device, options.out), {
        "command": f"python -m benchmarks.profile_prediction --device {device} --preset {options.preset}",
        "rows": rows, "within": right, "n": len(rows), "left": left, "peak_memory_gib": peak_memory_gib(),
        "environment": environment()})
    return TIME_UP if left else 0


def shown(row: dict) -> dict:
    """The comparison, printed; empty where it would take minutes."""
    if row:
        print("{stage:40s} {size:5d}: measured {measured:.4f} s, predicted {low:.4f} - {high:.4f} s{mark}"
              .format(**row, mark="" if row["within"] else "  MISSED"), flush=True)
    return row


def held_out(stage: Stage) -> tuple[int, ...]:
    if len(stage.sizes) > 1:
        return CATEGORIES
    (size,) = stage.sizes
    return max(1, size // TIMES_SMALLER), TIMES_LARGER * size


def compared(stage: Stage, size: int, rates: object, device: torch.device) -> dict | None:
    """Predicted range and measured median of `size` units; None where that would take minutes."""
    with TemporaryDirectory() as folder, torch.inference_mode(not stage.gradients):
        place = Place(Path(folder), torch.device("meta") if stage.net else device)
        counted = {n: count(stage.prepare(n, place)) for n in stage.sizes}
        one = replace(stage, units=size, times=1)
        (found,) = stage_profiles(Workload("", (one,)), {stage.name: Sampled(counted, 1.0)}, rates)
        if total(found.costs).flop > MOST_FLOP and device.type == "cpu":
            return None
        seconds = measured(stage, size, Place(Path(folder), device))
    low, high = found.predicted.low, found.predicted.high
    return {"stage": stage.name, "size": size, "measured": seconds, "low": low, "high": high,
            "within": low <= seconds <= high}


def measured(stage: Stage, size: int, place: Place) -> float:
    """Median seconds of the work, after one run."""
    work = stage.prepare(size, place)
    work()
    times = []
    for _ in range(REPEATS):
        synchronize(place.device)
        begin = time.perf_counter()
        work()
        synchronize(place.device)
        times.append(time.perf_counter() - begin)
    return median(times)


if __name__ == "__main__":
    sys.exit(main())
