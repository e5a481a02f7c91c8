"""One scoring run: read, predict what is not predicted yet, score, record."""
from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from data.errors import InputError, expect
from data.files import fingerprint, write_json
from submit.dev_splits import ROOT, dev_split
from submit.engines import HERE, Engine, each
from submit.organizer_files import write_results
from submit.records import environment, peak_memory_gib
from submit.results import Result, Split
from submit.rules import place, rules
from submit.units import Units

PACKAGES = {"retrieval": "retrieval", "anomaly": "anomaly", "backdoor": "backdoor_detection"}
CODE = {".py", ".txt", ".safetensors", ".json"}
Progress = Callable[[str, int, int], None]  # task, units done, units in all


@dataclass(frozen=True)
class Outcome:
    """A task's result with what it took."""

    task: str
    result: Result
    seconds: float
    place: int | None
    dev: bool  # scored on the built-in split
    problems: tuple[InputError, ...]
    fresh: Units | None  # predictions of this run, still locked
    data: Path
    predictions: Path | None  # given ones; those of this run come to lie in its folder


def score_task(task: str, runs: Path, *, data: Path | None, predictions: Path | None, seed: int, device: str,
               progress: Progress, settings: tuple[str, ...], explain: bool = False, engine: Engine = HERE
               ) -> Outcome:
    """Score one task, after predicting into `runs/unfinished` unless `predictions` holds the outputs.

    settings: what else the predictions depend on; unfinished ones of other settings are not gone on with. explain: the
    parts of the result also say how they came about, where the task's module can tell.
    """
    module = import_module(f"submit.task_{task}")
    folder = data or dev_split(task, seed)
    start = time.perf_counter()
    split = module.read(folder)
    problems, saved_seconds = split.problems, 0.0
    units = None
    with ExitStack() as stack:
        if predictions is None:
            units = Units(_unfinished(task, runs, folder, (device, *settings)))
            stack.callback(units.close)
            saved_seconds = sum(units.seconds.values())
            failed = _predict(task, split, units, progress, engine)
            if failed and split.indivisible:
                raise next(iter(failed.values()))
            split = replace(split, units={name: unit for name, unit in split.units.items() if name not in failed})
            problems += tuple(failed.values())
            expect(split.units, folder, "at least one part that can be scored", next(iter(failed.values()), "none"))
        result = module.evaluate(split, predictions or units.folder, seed)
        if explain:
            result = module.explained(result, split, predictions or units.folder, own=predictions is None)
        stack.pop_all()  # stays locked until `finish_run` moves it
    seconds = time.perf_counter() - start + saved_seconds
    where = place(result.value, rules(task).leaderboard)
    return Outcome(task, result, seconds, where, data is None, problems + result.problems, units, folder, predictions)


def _predict(task: str, split: Split, units: Units, progress: Progress, engine: Engine) -> dict[str, InputError]:
    """Predict what is not finished; the units that cannot be predicted, each with its reason."""
    waiting = [(name, unit) for name, unit in split.units.items() if name not in units.seconds]
    failed = {}
    progress(task, len(units.seconds), len(split.units))
    for position, found in each(partial(predict_unit, task, units.folder), waiting, engine):
        name, _ = waiting[position]
        if isinstance(found, str):
            failed[name] = InputError(f"{name}: {found}")
        else:
            units.finish(name, found)
        progress(task, len(units.seconds) + len(failed), len(split.units))
    return {name: failed[name] for name in split.units if name in failed}


def predict_unit(task: str, folder: Path, unit: tuple[str, Any]) -> float | str:
    """Predict one named unit, which leaves its files in `folder`: the seconds, or why it cannot be predicted."""
    start = time.perf_counter()
    try:
        import_module(f"submit.task_{task}").predict(*unit, folder)
    except InputError as problem:
        return str(problem)
    return time.perf_counter() - start


def _unfinished(task: str, runs: Path, data: Path, settings: tuple[str, ...]) -> Path:
    """Where unfinished predictions of this very work lie: same input files, code, embedded weights and settings."""
    inputs = [(str(p.relative_to(data)), p.stat().st_size, p.stat().st_mtime_ns) for p in _files(data)]
    packages = (ROOT / "data", ROOT / PACKAGES[task])
    code = [p for folder in packages for p in sorted(folder.glob("**/*")) if p.suffix in CODE]
    return runs / "unfinished" / f"{task}-{fingerprint(str(data.resolve()), inputs, *settings, *code)}"


def _files(folder: Path) -> list[Path]:
    """Every file below `folder`, through links too, each linked folder once."""
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in sorted(folders)
                      if (real := os.path.realpath(os.path.join(parent, name))) not in seen and not seen.add(real)]
        found += [path for name in names if (path := Path(parent, name)).is_file()]
    return sorted(found)


def finish_run(run: Path, outcomes: list[Outcome], *, command: str, seed: int, device: str) -> dict:
    """Move fresh predictions to `run/predictions`, write the organizers' result files and, last, the record."""
    for outcome in outcomes:
        if outcome.fresh:
            (run / "predictions").mkdir(parents=True, exist_ok=True)
            outcome.fresh.move(run / "predictions" / outcome.task)
        if outcome.task == "anomaly":
            write_results(run / "output", outcome.result.parts)
    record = {"command": command, "seed": seed, "device": device,
              "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
              "results": [_result_record(outcome) for outcome in outcomes],
              "environment": environment(), "peak_memory_gib": peak_memory_gib()}
    write_json(run / "record.json", record)
    return record


def _result_record(outcome: Outcome) -> dict:
    result = outcome.result
    return {"task": outcome.task, "metric": rules(outcome.task).metric, "value": result.value,
            "interval_95": list(result.interval), "n": result.n, "counted": result.counted,
            "seconds": round(outcome.seconds, 3), "place_in_top_10": outcome.place, "dev_split": outcome.dev,
            "data": str(outcome.data.resolve()),
            "predictions": str(outcome.predictions.resolve()) if outcome.predictions else None, **result.extra,
            "notes": list(result.notes), "problems": [str(p) for p in outcome.problems], "parts": result.parts}
