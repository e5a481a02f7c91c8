"""Four detectors on every network of a recipe, none of them kept: `python -m benchmarks.contest_zoo --data DIR`.

A network is trained and measured as `zoo build` does, judged at once by the four detectors and dropped; its figures are
one JSON unit under runs/contest_zoo/RECIPE, named by settings, images, detectors' code and kind of device: found again
where none changed. Several networks side by side share one GPU, or have a CPU thread each. With `--minutes` no network
starts later than that, nor one that by the longest of its kind so far would not end by then; those under way end. The
order is drawn once (sets, and clean and attacked ones, take turns), so what is done is a fair sample. The record is
written from whatever is there: n, what is left, and the networks below their recipe's floors, which are counted and in
no table. Exit status 3 where networks are left.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.detector_tables import lines, tables
from benchmarks.detector_verdicts import DETECTORS, asked_detectors, detectors_code, verdict
from benchmarks.options import TIME_UP, add_device, add_minutes, add_out, device_of, record_file
from benchmarks.time_limit import TimeLimit
from benchmarks.work_pool import threads_each, within_time
from benchmarks.zoo_work import image_key, job_kind
from data.errors import InputError, expect
from data.files import fingerprint, write_json
from data.image_sets import ImageSet
from data.model_zoo import read_zoo
from data.tensor_files import read_tensors, write_tensors
from data.zoo_building import Sets, build_zoo
from data.zoo_recipes import Recipe, ZooJob, jobs, read_recipe
from submit.kept_units import as_json
from submit.records import environment, peak_memory_gib
from submit.zoo_commands import read_set, victim_line

ORDER_SEED = 0
_SETS: dict[str, tuple[ImageSet, ImageSet]] = {}  # of a worker process


@dataclass(frozen=True)
class Task:
    """A network to train and judge. unit: its file."""

    job: ZooJob
    unit: Path
    detectors: tuple[str, ...]
    device: torch.device

    def done(self) -> dict[str, Any] | None:
        """Its unit, if it is there with the word of every detector, or as one below the floors."""
        try:
            found = json.loads(self.unit.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        usable = isinstance(found, dict) and {"record", "verdicts", "seconds"} <= found.keys()
        whole = usable and (found["verdicts"].keys() >= set(self.detectors) or self.failure(found))
        return found if whole else None

    def failure(self, unit: Mapping[str, Any]) -> str:
        """Why it does not count; floors may change, the unit need not."""
        return self.job.failure(unit["record"])


def kind(task: Task) -> str:
    return job_kind(task.job)


def in_fair_order(work: Sequence[ZooJob]) -> list[ZooJob]:
    """Sets, and in each clean and attacked networks, take turns; drawn within these. A recipe lists ratios one after
    the other and adversarially trained networks last."""
    groups: dict[tuple[str, bool], list[ZooJob]] = {}
    for job in work:
        groups.setdefault((job.set_name, job.attack is None), []).append(job)
    generator = torch.Generator().manual_seed(ORDER_SEED)
    drawn = [[group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
             for group in groups.values()]
    return [group[i] for i in range(max(map(len, drawn))) for group in drawn if i < len(group)]


def tasks_of(recipe: Recipe, sets: Sets, folder: Path, detectors: Sequence[str], device: torch.device) -> list[Task]:
    """Every network of the recipe in the order of training."""
    code = detectors_code()
    keys = {name: image_key(parts) for name, parts in sets.items()}

    def unit(job: ZooJob) -> Path:
        settings = json.dumps(job.settings(), sort_keys=True)
        return folder / f"{job.name}-{fingerprint(settings, keys[job.set_name], code, device.type)}.json"

    return [Task(job, unit(job), tuple(detectors), device) for job in in_fair_order(jobs(recipe))]


def write_sets(file: Path, sets: Sets) -> None:
    """All sets as one file that workers read: what is handed over by shared memory may not fit there."""
    tensors = {f"{name}/{half}/{part}": getattr(found, part) for name, halves in sets.items()
               for half, found in zip(("train", "test"), halves, strict=True) for part in ("images", "labels")}
    write_tensors(file, tensors, {name: halves[0].num_classes for name, halves in sets.items()})


def prepare(file: Path, threads: int) -> None:
    """What a worker does first: read the sets."""
    torch.set_num_threads(threads)
    tensors, classes = read_tensors(file)
    for name, count in classes.items():
        _SETS[name] = tuple(ImageSet(tensors[f"{name}/{half}/images"], tensors[f"{name}/{half}/labels"], count, name)
                            for half in ("train", "test"))


def measured(task: Task) -> dict[str, Any]:
    """Train, measure and judge one network and keep its unit; weights are gone afterwards."""
    start, on_gpu = time.perf_counter(), task.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(task.device)
    with TemporaryDirectory() as scratch:
        zoo = Path(scratch) / "zoo"
        record = build_zoo(zoo, [task.job], {task.job.set_name: _SETS[task.job.set_name]})[task.job.name]
        samples = () if "failed" in record else read_zoo(zoo).models
        verdicts = {name: verdict(sample, name, task.device) for sample in samples for name in task.detectors}
    peak = round(torch.cuda.max_memory_allocated(task.device) / 2**30, 3) if on_gpu else None
    unit = {"record": {key: value for key, value in record.items() if key not in ("failed", "fingerprint")},
            "verdicts": as_json(verdicts), "seconds": round(time.perf_counter() - start, 2), "gpu_gib": peak}
    write_json(task.unit, unit)
    return unit


def train_and_judge(tasks: Sequence[Task], sets: Sets, limit: TimeLimit, workers: int) -> Iterator[str]:
    """Do what fits into the time; a line on each network."""
    lacking = []
    for task in tasks:
        unit = task.done()
        if unit is None:
            lacking.append(task)
        else:
            limit.took(kind(task), unit["seconds"])
    if not lacking or not any(limit.fits(kind(task)) for task in lacking):
        return
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "sets.safetensors"
        write_sets(file, {name: sets[name] for name in {task.job.set_name for task in lacking}})
        prepared = (file, threads_each(tasks[0].device, workers))
        for task, unit, error in within_time(measured, lacking, kind, limit, workers=min(workers, len(lacking)),
                                             initializer=prepare, initargs=prepared):
            if unit:
                limit.took(kind(task), unit["seconds"])
            yield f"{task.job.name}: left out, {type(error).__name__}: {error}" if error else _line(task, unit)


def _line(task: Task, unit: Mapping[str, Any]) -> str:
    failed = task.failure(unit)
    record = {**unit["record"], "seconds": unit["seconds"], **({"failed": failed} if failed else {})}
    said = ", ".join(f"{name} p {found['p']:.2g}" if "p" in found else f"{name} {found['score']:.3f}"
                     for name, found in unit["verdicts"].items())
    return f"{victim_line(task.job.name, record)}; {said}" if said else victim_line(task.job.name, record)


def gathered(tasks: Sequence[Task]) -> dict[str, Any]:
    """The record's part on the networks: tables of those that count, what failed, what is left."""
    units = [(task, unit) for task in tasks if (unit := task.done())]
    counted = [(task, unit) for task, unit in units if not task.failure(unit)]
    rows = [{"model": task.job.name, **{key: unit["record"][key] for key in ("set", "attack", "ratio", "target", "ACC",
                                                                            "ASR", "radius")},
             "seconds": unit["seconds"]} for task, unit in counted]
    detectors = tasks[0].detectors
    found = tables(rows, {name: [unit["verdicts"][name] for _, unit in counted] for name in detectors})
    waiting = [kind(task) for task in tasks if task.done() is None]
    return {"of": len(tasks), "n": len(rows), "failed": {task.job.name: task.failure(unit) for task, unit in units
                                                        if task.failure(unit)},
            "left": len(waiting), "left_by_kind": {name: waiting.count(name) for name in sorted(set(waiting))},
            "gpu_gib_a_network": max((unit["gpu_gib"] or 0.0 for _, unit in units), default=0.0), **found}


def options_of(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder that holds the recipe's image sets; none for built-in ones")
    parser.add_argument("--recipe", default="contest", help="built in (tiny, half, cpu, contest) or a TOML file")
    parser.add_argument("--workers", type=int, default=1, help="networks side by side")
    parser.add_argument("--detectors", default=",".join(DETECTORS), help="some of them, with commas between")
    parser.add_argument("--most", type=int, help="only so many networks, the first in the order")
    add_minutes(parser)
    add_device(parser)
    add_out(parser, "contest_zoo_RECIPE")
    return parser.parse_args(arguments), parser


def main(arguments: Sequence[str] | None = None) -> int:
    options, parser = options_of(arguments)
    device, name = device_of(options, parser), Path(options.recipe).stem
    limit = TimeLimit(options.minutes)
    try:
        expect(options.workers > 0, "--workers", "> 0", options.workers)
        recipe, detectors = read_recipe(options.recipe), asked_detectors(options.detectors)
        sets = {plan.name: read_set(plan, options.data) for plan in recipe.sets}
        tasks = tasks_of(recipe, sets, Path("runs/contest_zoo") / name, detectors, device)[:options.most]
    except InputError as error:
        parser.error(str(error))
    for line in train_and_judge(tasks, sets, limit, options.workers):
        print(line, file=sys.stderr, flush=True)
    found = gathered(tasks)
    command = f"python -m benchmarks.contest_zoo --data DIR --recipe {name} --workers {options.workers}"
    write_json(record_file(f"contest_zoo_{name}", device, options.out),
               {"command": command, "device": str(device), "workers": options.workers, **found,
                "peak_memory_gib": peak_memory_gib(), "environment": environment()})
    print("\n".join([f"{found['n']} of {found['of']} networks, {len(found['failed'])} below their floors, "
                     f"{found['left']} left", *lines(found["detectors"])]))
    return TIME_UP if found["left"] else 0


if __name__ == "__main__":
    sys.exit(main())
