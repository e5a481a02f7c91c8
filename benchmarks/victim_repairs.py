"""One victim after the other: trained, met by every defense of a sweep, its units kept as a file, its weights dropped.

A victim's units stand under its own weights, which another machine would train otherwise. So they count when they are
whole: then they lie in one file, named by settings, images, defenses and kind of device, and are found without weights.
"""
from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.time_limit import TimeLimit
from benchmarks.zoo_work import image_key, job_kind
from data.files import fingerprint, write_json
from data.model_zoo import ZooModel, read_zoo
from data.zoo_building import build_zoo
from data.zoo_recipes import Recipe, SetPlan, ZooJob, jobs
from defense.defenses import defense_config
from submit.defense_runs import KEYS, Plan, code_of, run_plan
from submit.kept_units import equal_sums, kept_unit
from submit.sweeps import Sweep
from submit.zoo_commands import set_once
from submit.zoo_victims import Victim, read_victim


@dataclass(frozen=True)
class Task:
    """A victim and all that it meets. limit: the end, and how long work took so far; a copy for each process."""

    job: ZooJob
    plan: SetPlan
    plans: tuple[Plan, ...]
    data: Path | None
    out: Path
    device: torch.device
    whole: Path  # the file of its units
    limit: TimeLimit
    drop: bool

    @property
    def own(self) -> Path:
        """Folder of what can be dropped: a zoo of one, and triggers."""
        return self.out / "one_by_one" / self.job.name

    def found(self) -> dict[str, Any] | None:
        """Its file's content: `units`, and `failed`, why there are none."""
        try:
            content = json.loads(self.whole.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) and {"units", "failed"} <= content.keys() else None


def kind(task: Task) -> str:
    """Of what comes first: training, or going on with what is trained."""
    return "going on" if (task.own / "zoo" / task.job.name).is_dir() else job_kind(task.job)


def tasks_of(sweep: Sweep, data: Path | None, out: Path, device: torch.device, limit: TimeLimit, *, drop: bool
             ) -> list[Task]:
    """Every victim, round by round, each round in the recipe's order."""
    recipe, plans = sweep.victims, tuple(sweep.plans())
    met = [(plan.label, repr(defense_config(plan.method, plan.settings, "defense")), plan.clean, plan.seed,
            code_of(plan.method)) for plan in plans]
    by_name = {plan.name: plan for plan in recipe.sets}
    keys = {name: image_key(set_once(name, plan.size, plan.images, data)) for name, plan in by_name.items()}
    work = sorted((job for job in jobs(recipe) if job.attack), key=lambda job: int(job.name.rsplit("-", 1)[-1]))

    def whole(job: ZooJob) -> Path:
        settings = json.dumps([job.settings(), job.floor_accuracy, job.floor_success], sort_keys=True)
        return out / "whole" / f"{job.name}-{fingerprint(settings, keys[job.set_name], met, device.type)}.json"

    return [Task(job, by_name[job.set_name], plans, data, out, device, whole(job), limit, drop) for job in work]


def learn(tasks: Sequence[Task], limit: TimeLimit) -> None:
    """How long everything took in earlier calls."""
    for task in tasks:
        content = task.found()
        if content:
            limit.took(job_kind(task.job), content["training_seconds"])
    for file in sorted((tasks[0].out / "units").glob("*.json")) if tasks else ():
        unit = json.loads(file.read_text(encoding="utf-8"))
        limit.took(unit["defense"], seconds_of(unit))


def seconds_of(unit: Mapping[str, Any]) -> float:
    """Of repairing and judging; units of other commands know the first alone."""
    return unit.get("whole_seconds", unit["seconds"])


def repaired(task: Task) -> dict[str, Any]:
    """Train the victim and let it meet every defense, as far as the time allows: `units`, `left` and `failed`."""
    with equal_sums(task.device):
        sample, record = _trained(task)
        if sample is None:
            return _ended(task, [], record["failed"], record)
        victim = read_victim(sample, task.data, task.own / "triggers", device=task.device)
        units = list(_met(task, victim))
    if len(units) < len(task.plans):
        return {"units": units, "left": len(task.plans) - len(units), "failed": "",
                "training_seconds": record["seconds"]}
    return _ended(task, units, "", record)


def _ended(task: Task, units: list[dict[str, Any]], failed: str, record: Mapping[str, Any]) -> dict[str, Any]:
    content = {"victim": task.job.name, "units": units, "failed": failed, "training_seconds": record["seconds"],
               "ACC": record["ACC"], "ASR": record["ASR"]}
    write_json(task.whole, content)
    if task.drop:
        shutil.rmtree(task.own, ignore_errors=True)
    return {**content, "left": 0}


def _trained(task: Task) -> tuple[ZooModel | None, dict[str, Any]]:
    """The victim, trained where it is not there; None where it is below a floor."""
    shared = task.out / "victims"  # of `submit defend sweep`
    if (shared / task.job.name).is_dir():
        found = {sample.name: sample for sample in read_zoo(shared).models}
        if task.job.name in found:
            return found[task.job.name], found[task.job.name].record
    halves = set_once(task.plan.name, task.plan.size, task.plan.images, task.data)
    record = build_zoo(task.own / "zoo", [task.job], {task.job.set_name: halves},
                       triggers=task.own / "triggers")[task.job.name]
    samples = () if "failed" in record else read_zoo(task.own / "zoo").models
    return (samples[0] if samples else None), record


def _met(task: Task, victim: Victim) -> Iterator[dict[str, Any]]:
    """The units that are there, and those that end in time."""
    for plan in task.plans:
        path = task.out / "units" / f"{plan.key(victim)}.json"
        if not path.exists() and not task.limit.fits(plan.label):
            continue
        start = time.perf_counter()

        def timed(plan: Plan = plan, start: float = start) -> dict[str, Any]:
            unit = run_plan(victim, plan)
            return {**unit, "whole_seconds": round(time.perf_counter() - start, 2)}

        unit = kept_unit(path, KEYS, timed)
        task.limit.took(plan.label, seconds_of(unit))
        yield {**unit, "defense": plan.label}  # one method may stand under several names


def with_rounds(sweep: Sweep, rounds: int | None) -> Sweep:
    """The sweep with so many victims of each attack; None leaves it as it is."""
    recipe: Recipe = sweep.victims
    return sweep if rounds is None else replace(sweep, victims=replace(recipe, repeats=rounds))
