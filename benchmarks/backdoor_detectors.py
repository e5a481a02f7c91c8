"""Four detectors on the networks of one zoo or several, side by side: `python -m benchmarks.backdoor_detectors ZOO...`.

Every model is judged by every detector once, one thread each on a CPU; what is done is kept under runs/, so a second
call goes on. The record: the tables of `benchmarks.detector_tables`, and each model.
"""
from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.detector_tables import lines, tables
from benchmarks.detector_verdicts import DETECTORS, asked_detectors, verdict
from benchmarks.options import RECORDS, add_device, device_of
from data.errors import InputError, expect
from data.files import write_json
from data.model_zoo import ZooModel, read_zoo
from submit.records import environment


def judged(sample: ZooModel, detector: str, file: Path, device: torch.device) -> None:
    """One verdict, kept in `file`."""
    torch.set_num_threads(1)
    write_json(file, verdict(sample, detector, device))


def verdict_file(sample: ZooModel, detector: str, device: torch.device) -> Path:
    """Where the verdict is kept: by zoo, and apart for a GPU."""
    zoo = sample.folder.parent.name + ("" if device.type == "cpu" else "_gpu")
    return Path("runs") / "backdoor_detectors" / zoo / detector / f"{sample.name}.json"


def judge_all(models: list[ZooModel], detectors: list[str], workers: int, device: torch.device) -> None:
    """Every verdict that is not kept yet, the quick detectors first."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        futures = {pool.submit(judged, sample, detector, file, device): file
                   for detector in detectors for sample in models
                   if not (file := verdict_file(sample, detector, device)).exists()}
        for done, future in enumerate(as_completed(futures)):
            future.result()
            print(f"{done + 1}/{len(futures)} {futures[future]}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("zoos", type=Path, nargs="+", help="folders of different names")
    parser.add_argument("--detectors", default=",".join(DETECTORS), help="some of them, with commas between")
    parser.add_argument("--max-classes", type=int, default=10**6, help="models of more classes are left out")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="record; default benchmarks/records/backdoor_detectors_<zoos>.json, "
                                                 "on a GPU ..._gpu.json")
    add_device(parser, "cpu")
    options = parser.parse_args(arguments)
    device = device_of(options, parser)
    try:
        detectors = asked_detectors(options.detectors)
        names = [zoo.resolve().name for zoo in options.zoos]
        expect(len(names) == len(set(names)), "zoos", "folders of different names", ", ".join(names))
        models = [m for zoo in options.zoos for m in read_zoo(zoo.resolve()).models
                  if m.num_classes <= options.max_classes]
    except InputError as error:
        parser.error(str(error))
    judge_all(models, detectors, options.workers, device)
    rows = [{"model": m.name, "zoo": m.folder.parent.name, "set": m.record["set"], "attack": m.record["attack"],
             "target": m.record["target"], "radius": m.record.get("radius", 0.0)} for m in models]
    found = tables(rows, {d: [json.loads(verdict_file(m, d, device).read_text()) for m in models] for d in detectors})
    command = f"python -m benchmarks.backdoor_detectors {' '.join(names)} --detectors {','.join(detectors)}"
    name = "_".join(names) + ("" if device.type == "cpu" else "_gpu")
    write_json(options.out or RECORDS / f"backdoor_detectors_{name}.json",
               {"command": command, **found, "environment": environment()})
    print("\n".join(lines(found["detectors"])))


if __name__ == "__main__":
    main()
