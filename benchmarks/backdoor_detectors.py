"""Four detectors on the networks of one zoo or several, side by side: `python -m benchmarks.backdoor_detectors ZOO...`.

Every model is judged by every detector once, one thread each on a CPU; what is done is kept under runs/, named by the
detectors' code and the network's files, so a second call goes on and a changed detector judges anew. The record: the
tables of `benchmarks.detector_tables`, and each model.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.detector_tables import lines, tables
from benchmarks.detector_verdicts import DETECTORS, asked_detectors, detectors_code, verdict
from benchmarks.options import RECORDS, add_device, device_of
from data.errors import InputError, expect
from data.files import fingerprint, write_json
from data.images import list_images
from data.model_zoo import METADATA, MODEL, ZooModel, read_zoo
from submit.kept_units import kept_unit
from submit.records import environment

KEPT = Path("runs") / "backdoor_detectors"
KEYS = frozenset({"seconds"})  # of every verdict


def judged(sample: ZooModel, detector: str, file: Path, device: torch.device) -> dict:
    """One verdict, kept in `file`."""
    torch.set_num_threads(1)
    return kept_unit(file, KEYS, partial(verdict, sample, detector, device))


def verdict_name(sample: ZooModel, code: str, device: torch.device) -> str:
    """The file that a verdict is kept in, the same for each detector's folder."""
    files = (sample.folder / MODEL, sample.folder / METADATA, *list_images(sample.images_folder))
    return f"{sample.name}-{fingerprint(*files, code, device.type)}.json"


def judge_all(models: list[ZooModel], detectors: list[str], workers: int, device: torch.device
              ) -> dict[str, list[dict]]:
    """By detector a verdict for each model; the quick detectors first."""
    code = detectors_code()
    names = [verdict_name(model, code, device) for model in models]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        futures = {detector: [pool.submit(judged, model, detector, KEPT / detector / name, device)
                              for model, name in zip(models, names, strict=True)] for detector in detectors}
        every = [future for row in futures.values() for future in row]
        for done, future in enumerate(as_completed(every)):
            future.result()
            print(f"{done + 1}/{len(every)}", end="\r", file=sys.stderr, flush=True)
        return {detector: [future.result() for future in row] for detector, row in futures.items()}


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
    verdicts = judge_all(models, detectors, options.workers, device)
    rows = [{"model": m.name, "zoo": m.folder.parent.name, "set": m.record["set"], "attack": m.record["attack"],
             "target": m.record["target"], "radius": m.record.get("radius", 0.0)} for m in models]
    found = tables(rows, verdicts)
    command = f"python -m benchmarks.backdoor_detectors {' '.join(names)} --detectors {','.join(detectors)}"
    name = "_".join(names) + ("" if device.type == "cpu" else "_gpu")
    write_json(options.out or RECORDS / f"backdoor_detectors_{name}.json",
               {"command": command, **found, "environment": environment()})
    print("\n".join(lines(found["detectors"])))


if __name__ == "__main__":
    main()
