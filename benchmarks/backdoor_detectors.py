"""Four detectors on one zoo, side by side: `python -m benchmarks.backdoor_detectors ZOO`.

Every model is judged by every detector once, one thread each on a CPU; what is done is kept under runs/, so a second
call goes on. The record: the tables of `benchmarks.detector_tables`, and each model.
"""
from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.detector_tables import lines, tables
from benchmarks.detector_verdicts import DETECTORS, asked_detectors, verdict
from benchmarks.options import RECORDS, add_device, device_of
from data.errors import InputError
from data.files import write_json
from data.model_zoo import ZooModel, read_zoo
from submit.records import environment


def judged(sample: ZooModel, detector: str, file: Path, device: torch.device) -> None:
    """One verdict, kept in `file`."""
    torch.set_num_threads(1)
    write_json(file, verdict(sample, detector, device))


def judge_all(models: list[ZooModel], work: Path, detectors: list[str], workers: int, device: torch.device) -> None:
    """Every verdict that `work` lacks, the quick detectors first."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        futures = {pool.submit(judged, sample, detector, file, device): file
                   for detector in detectors for sample in models
                   if not (file := work / detector / f"{sample.name}.json").exists()}
        for done, future in enumerate(as_completed(futures)):
            future.result()
            print(f"{done + 1}/{len(futures)} {futures[future]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--detectors", default=",".join(DETECTORS), help="some of them, with commas between")
    parser.add_argument("--max-classes", type=int, default=10**6, help="models of more classes are left out")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="record; default benchmarks/records/backdoor_detectors_<zoo>.json, "
                                                 "on a GPU ..._gpu.json")
    add_device(parser, "cpu")
    options = parser.parse_args()
    device = device_of(options, parser)
    try:
        detectors = asked_detectors(options.detectors)
        models = [m for m in read_zoo(options.zoo).models if m.num_classes <= options.max_classes]
    except InputError as error:
        parser.error(str(error))
    name = options.zoo.name if device.type == "cpu" else f"{options.zoo.name}_gpu"
    work = Path("runs") / "backdoor_detectors" / name
    judge_all(models, work, detectors, options.workers, device)
    rows = [{"model": m.name, "set": m.record["set"], "attack": m.record["attack"], "target": m.record["target"],
             "radius": m.record.get("radius", 0.0)} for m in models]
    found = tables(rows, {d: [json.loads((work / d / f"{m.name}.json").read_text()) for m in models]
                          for d in detectors})
    command = f"python -m benchmarks.backdoor_detectors {options.zoo.name} --detectors {','.join(detectors)}"
    write_json(options.out or RECORDS / f"backdoor_detectors_{name}.json",
               {"command": command, **found, "environment": environment()})
    print("\n".join(lines(found["detectors"])))


if __name__ == "__main__":
    main()
