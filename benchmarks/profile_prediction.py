"""Predicted against measured seconds on this machine, at sizes that the calibration did not see:
`python -m benchmarks.profile_prediction [--device cuda] [--preset report]`.

The rates come from the micro-benchmark alone (`submit.calibration`); the costs of a comparison from smaller sets, those
of nets from `meta`. A prediction is right where the measured median lies within its range.
"""
from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from data.files import write_json
from submit.calibration import measured_rates, synchronize
from submit.op_costs import count, total
from submit.profiling import Sampled, stage_profiles
from submit.records import environment
from submit.workloads import Place, Stage, Workload, anomaly, backdoor, repair, retrieval

REPEATS = 3
TIMES_SMALLER, TIMES_LARGER = 3, 2  # than the sample: the held-out sizes of nets
CATEGORIES = (24, 64)               # images: the held-out sizes of comparisons
MOST_FLOP = 2e12                    # of one measured call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", default="embedded", choices=("embedded", "report"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    half = device.type == "cuda"
    rates = measured_rates(device)
    rows = []
    for made in (retrieval(arguments.preset, 100, half), anomaly(arguments.preset, 100, 1, half),
                 backdoor(10, half), repair(100, 10, half)):
        for stage in (stage for stage in made.stages if not stage.host):
            for size in held_out(stage):
                row = compared(stage, size, rates, device)
                if row:
                    rows.append(row)
                    print("{stage:40s} {size:5d}: measured {measured:.4f} s, predicted {low:.4f} - {high:.4f} s{mark}"
                          .format(**row, mark="" if row["within"] else "  MISSED"), flush=True)
    right = sum(row["within"] for row in rows)
    print(f"{right} of {len(rows)} within the predicted range")
    name = "profile_prediction" + ("_gpu" if half else "")
    write_json(Path(__file__).parent / "records" / f"{name}.json", {
        "command": f"python -m benchmarks.profile_prediction --device {device} --preset {arguments.preset}",
        "rows": rows, "within": right, "n": len(rows), "environment": environment()})


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
    main()
