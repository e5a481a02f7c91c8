"""`profile`: time and memory of a task by stage, here and on a GPU that one does not have, against the limit."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from data.devices import free_bytes
from data.errors import expect
from data.files import write_json
from submit import workloads
from submit.calibration import measured_rates
from submit.op_costs import total
from submit.profiling import (
    EXCEEDS,
    StageProfile,
    largest,
    peak_bytes,
    sample,
    stage_profiles,
    verdict,
    whole,
)
from submit.records import environment
from submit.roofline import Gpu, Range, Rates, assumed_rates, carried_rates, gpu, gpu_called
from submit.rules import rules
from submit.tables import console, print_record, unit_progress
from submit.workloads import Workload

HERE = "here"
GIB = 2**30
BAR = 24  # columns of the longest bar
IMAGES, CATEGORIES, QUERIES, CLASSES, CLEAN, TREE = 100, 10, 1000, 10, 100, 50_000  # where nothing else is asked
NETWORK_CLASSES = 3  # at least, of a network; a tree to purify may have one
LEAST = {"retrieval": 1, "anomaly": 2, "backdoor": NETWORK_CLASSES, "repair": 2, "purify": 2}  # smallest size there is
SIZES = {"retrieval": "queries", "anomaly": "images", "backdoor": "classes", "repair": "images",
         "purify": "images"}  # what may grow


@dataclass(frozen=True)
class Asked:
    """One call of the command."""

    task: str
    preset: str
    sizes: dict[str, int]  # images, categories, queries, classes, side, as far as the task has them
    target: str  # a GPU's key, or "here"
    gpu_memory: float | None  # GiB
    device: torch.device

    def build(self, half: bool) -> Callable[[int], Workload]:
        """The workload by the size that `SIZES` names."""
        own = self.sizes
        return {"retrieval": lambda n: workloads.retrieval(self.preset, n, half),
                "anomaly": lambda n: workloads.anomaly(self.preset, n, own["categories"], half),
                "backdoor": lambda n: workloads.backdoor(n, half),
                "repair": lambda n: workloads.repair(n, own["classes"], half),
                "purify": lambda n: workloads.purify(n, own["classes"], own["side"], half)}[self.task]

    @property
    def size(self) -> int:
        return self.sizes[SIZES[self.task]]


def asked_for(task: str, preset: str, given: dict[str, int | None], target: str, gpu_memory: float | None,
              device: torch.device) -> Asked:
    """The call with its defaults. Refuses a size that the task does not have."""
    known = {"retrieval": {"queries": QUERIES}, "anomaly": {"images": IMAGES, "categories": CATEGORIES},
             "backdoor": {"classes": CLASSES}, "repair": {"images": CLEAN, "classes": CLASSES},
             "purify": {"images": TREE, "classes": CLASSES, "side": workloads.SIDE}}[task]
    for name, value in given.items():
        expect(value is None or name in known, f"--{name}", f"with another task; {task} has "
               + ", ".join(f"--{own}" for own in known), value)
    expect(preset == "embedded" or task in ("retrieval", "anomaly"), "--preset", "with retrieval or anomaly", task)
    if target != HERE:
        gpu(target)
    sizes = {name: given.get(name) or value for name, value in known.items()}
    expect(task == "purify" or sizes.get("classes", CLASSES) >= NETWORK_CLASSES, "--classes",
           f">= {NETWORK_CLASSES} of a network", sizes.get("classes"))
    return Asked(task, preset, sizes, target, gpu_memory, device)


def profile(asked: Asked, run: Path, *, command: str, as_json: bool) -> str:
    """Print the profile, write `run/record.json`, return the verdict."""
    memory = _memory(asked)
    if asked.device.type == "cuda" and asked.gpu_memory:
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, memory / torch.cuda.get_device_properties(asked.device).total_memory), asked.device)
    on_gpu = asked.device.type == "cuda"
    build = asked.build(half=on_gpu or asked.target != HERE)
    workload, own = build(asked.size), asked.build(half=on_gpu)(asked.size)
    with unit_progress() as bar:
        done = iter(range(len(workload.stages) + 1))
        samples = sample(workload, own, asked.device,
                         say=lambda stage: bar(f"profile: {stage}", next(done), len(workload.stages)))
        rates, basis = _rates(asked)
        untimed = any(samples[stage.name].seconds is None for stage in workload.stages)
        here = (rates if asked.target == HERE else measured_rates(asked.device)) if untimed else None
    stages = stage_profiles(workload, samples, rates, here)
    seconds, peak, limit = whole(stages), peak_bytes(stages, memory), _limit(asked.task)
    found = verdict(seconds, limit, peak, memory, planned=workload.planned)
    notes = [*workload.notes, *_group_notes(workload, memory)]
    fitting = largest(build, samples, rates, limit, memory, start=asked.size, least=LEAST[asked.task])
    record = {"command": command, "task": asked.task, "workload": workload.title, "gpu": asked.target, "rates": basis,
              "stages": [stage.record() for stage in stages], "chart": [_bar(stage, stages) for stage in stages],
              "seconds": [seconds.low, seconds.high], "limit_s": limit, "peak_gib": peak / GIB,
              "memory_gib": memory / GIB, "verdict": found, f"largest_{SIZES[asked.task]}": fitting,
              "notes": notes, "environment": environment()}
    write_json(run / "record.json", record)
    print_record(record) if as_json else _print(asked, workload, stages, record, run / "record.json")
    return found


def _group_notes(workload: Workload, memory: float) -> list[str]:
    """That images would score each other in groups, as the features of all do not fit."""
    from anomaly.category import FREE_SHARE

    held = max((stage.kept_bytes * stage.units for stage in workload.stages if stage.adapts), default=0)
    groups = math.ceil(held / (FREE_SHARE * memory))
    return [f"the features of all images do not fit: they would score each other in about {groups} groups, which takes "
            f"less time than all together, as counted here, and loses some accuracy"] if groups > 1 else []


def broken(found: str) -> bool:
    return found == EXCEEDS


def _limit(task: str) -> float:
    """Seconds of the run or, where a sample has its own, of that; a repair keeps the detector's. A purification is
    part of no contest: its limit is its own, not a rule."""
    if task == "purify":
        from defense.purification import LIMIT_S

        return LIMIT_S
    limits = rules("backdoor" if task == "repair" else task).limits
    return limits.seconds_per_sample or limits.seconds


def _memory(asked: Asked) -> float:
    """Bytes of the GPU, or of the limit where one is asked for."""
    if asked.gpu_memory is not None:
        return asked.gpu_memory * GIB
    return free_bytes(asked.device) if asked.target == HERE else gpu(asked.target).memory * GIB


def _rates(asked: Asked) -> tuple[Rates, str]:
    """What the target does in a second, and how that is known."""
    known: Gpu | None = None
    if asked.device.type == "cuda":
        known = gpu_called(torch.cuda.get_device_name(asked.device))
    if asked.target == HERE:
        return measured_rates(asked.device), "measured on this machine"
    target = gpu(asked.target)
    if known is None:
        return assumed_rates(target), f"assumed shares of {target.name}'s published peaks; no GPU was measured"
    measured = measured_rates(asked.device)
    return carried_rates(measured, known, target), f"shares of peak measured on {known.name}, carried over"


# --- what is printed

def _print(asked: Asked, workload: Workload, stages: list[StageProfile], record: dict, path: Path) -> None:
    where = "this machine" if asked.target == HERE else gpu(asked.target).name
    table = Table("stage", title=workload.title, title_justify="left")
    for name in ("units", "TFLOP", "GiB at once", "here, s", f"{where}, s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for stage, bar in zip(stages, record["chart"], strict=True):
        flop = total(stage.costs).flop
        table.add_row(stage.name, stage.units, _number(flop / 1e12) if flop else "-",
                      "-" if stage.host else _number(stage.peak_bytes / GIB),
                      _here(stage), _span(stage.predicted), bar)
    out = console()
    out.print(table)
    seconds = Range(*record["seconds"])
    sample_of = " a network" if workload.sample else ""
    out.print(f"{record['verdict']}: {_span(seconds)} s of {record['limit_s']:g} s{sample_of}, "
              f"{record['peak_gib']:.1f} of {record['memory_gib']:.0f} GiB; largest that surely fits: about "
              f"{record['largest_' + SIZES[asked.task]]} {SIZES[asked.task]}", style="bold")
    out.print(f"rates: {record['rates']}", style="dim")
    if any(stage.guessed for stage in stages):
        out.print("~: predicted from a short benchmark of this machine, as a sample would take minutes", style="dim")
    for note in record["notes"]:
        out.print(f"note: {note}", style="dim")
    out.print(f"record: {path}", style="dim")


def _bar(stage: StageProfile, stages: list[StageProfile]) -> str:
    """The slow end by its length, filled up to the quick end; of the host in another shade."""
    longest = max(other.predicted.high for other in stages) or 1.0
    low, high = (round(BAR * value / longest) for value in (stage.predicted.low, stage.predicted.high))
    return ("▓" if stage.host else "█") * low + "░" * max(0, high - low)


def _here(stage: StageProfile) -> str:
    """Measured, or with a mark what is predicted where measuring would take minutes."""
    if stage.here is not None:
        return _number(stage.here)
    return f"~ {_span(stage.guessed)}" if stage.guessed else "-"


def _span(seconds: Range) -> str:
    return f"{_number(seconds.low)} - {_number(seconds.high)}"


def _number(value: float) -> str:
    """Two or three figures that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2g}"
