"""Parts of a benchmark measured one after the other as far as the time lasts, kept until all are there."""
from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.time_limit import TimeLimit
from data.files import fingerprint
from submit.kept_units import kept_unit

PARTS = Path("runs/parts")
SECONDS = "part_seconds"


def measured_parts(name: str, device: torch.device, parts: Mapping[str, Callable[[], dict[str, Any]]],
                   limit: TimeLimit) -> tuple[dict[str, dict[str, Any]], int]:
    """(what each part measured, by its label; how many are left). A label says all that decides its part.

    What is there waits under runs/parts for the next call; when nothing is left it is taken away, so that a later call
    measures anew.
    """
    folder, found = PARTS / f"{name}_{device.type}", {}
    for label, measure in parts.items():
        file = folder / f"{fingerprint(label)}.json"
        if not file.exists() and not limit.fits("part"):
            continue
        unit = kept_unit(file, frozenset({SECONDS}), lambda work=measure: _timed(work, limit))
        limit.took("part", unit[SECONDS])
        found[label] = {key: value for key, value in unit.items() if key != SECONDS}
    left = len(parts) - len(found)
    if not left:
        shutil.rmtree(folder, ignore_errors=True)
    return found, left


def _timed(work: Callable[[], dict[str, Any]], limit: TimeLimit) -> dict[str, Any]:
    start = limit.clock()
    return {**work(), SECONDS: limit.clock() - start}
