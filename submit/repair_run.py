"""Repairs beside the score of task 3: every network that the detector flags goes through the shipped repair.

What it did is measured where `zoo.json` tells set and trigger: on the test images that the repair was not given. Of
the others, also of clean networks flagged by mistake, the accuracy on the given images is all there is.
"""
from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from data.devices import chosen_device
from data.errors import InputError
from data.files import fingerprint, write_json
from data.images import list_images
from data.model_zoo import MODEL, ZooModel, load_model, read_zoo
from submit.defense_runs import as_json, code_of
from submit.dev_splits import ROOT, dev_split
from submit.results import Result
from submit.score_run import Outcome
from submit.tables import console
from submit.zoo_victims import measured, read_victim

Progress = Callable[[str, int, int], None]
NAMES = ("ACC", "ASR")


def repaired_outcome(outcome: Outcome, zoo: Path | None, sets: Path | None, runs: Path, progress: Progress) -> Outcome:
    """The outcome of the backdoor task on `zoo` (None = the built-in one) with its flagged networks repaired."""
    models = {model.name: model for model in read_zoo(zoo or dev_split("backdoor", 0)).models}
    return replace(outcome, result=with_repairs(outcome.result, models, sets, runs / "repair", progress))


def with_repairs(result: Result, models: Mapping[str, ZooModel], sets: Path | None, kept: Path,
                 progress: Progress) -> Result:
    """`result` of the backdoor task with a record of the repair of each flagged network, up to a minute each.

    sets: folder of the image sets that are not built in. Finished repairs are found again in `kept`.
    """
    flagged = [models[part["model"]] for part in result.parts if part["backdoored"]]
    rows = []
    for done, sample in enumerate(flagged):
        progress("repair", done, len(flagged))
        rows.append(_found_or_made(sample, sets, kept))
    progress("repair", len(flagged), len(flagged))
    return replace(result, extra={**result.extra, "repair": {**summary(rows), "networks": rows}})


def _found_or_made(sample: ZooModel, sets: Path | None, kept: Path) -> dict[str, Any]:
    code = (ROOT / "defense" / "repair.py", ROOT / "defense" / "folder_images.py", Path(__file__))
    key = fingerprint(sample.name, sample.folder / MODEL, *list_images(sample.images_folder),
                      json.dumps(sample.record), str(sets), str(chosen_device()), code_of("tsbd"), *code)
    path = kept / "units" / f"{key}.json"
    if path.exists():
        return json.loads(path.read_text())
    row = repaired(sample, sets, kept)
    write_json(path, row)
    return row


def repaired(sample: ZooModel, sets: Path | None, kept: Path) -> dict[str, Any]:
    """One network through the shipped repair. before, after: ACC and ASR, None where they are not known."""
    from defense.repair import shipped

    start = time.perf_counter()
    found = shipped(load_model(sample), sample.num_classes, sample.images_folder, sample.transformation)
    seconds = time.perf_counter() - start
    row = {"model": sample.name, "attack": (sample.record or {}).get("attack"), "failed": found.failed,
           "seconds": round(seconds, 3), "details": as_json(found.details), "before": None, "after": None,
           "unknown": ""}
    try:
        victim = read_victim(sample, sets, kept / "triggers", device=chosen_device())
        unseen = _not_given(sample, len(victim.test.images)).to(victim.test.images.device)
    except InputError as problem:
        return {**row, "unknown": str(problem)}
    test, triggered = victim.test.subset(unseen), victim.triggered[unseen]
    before, after = (measured(model, test, triggered, victim.record["target"], victim.scale)
                     for model in (victim.model, found.model))
    return {**row, "before": before, "after": after}


def _not_given(sample: ZooModel, count: int) -> torch.Tensor:
    """Positions of the test images that are not in the sample's folder, told by their names: `{index}_{label}`."""
    given = {int(path.stem.split("_")[0]) for path in list_images(sample.images_folder)
             if path.stem.split("_")[0].isdigit()}
    return torch.tensor([i for i in range(count) if i not in given])


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts, and the means of ACC and ASR before and after, over the networks where they are known; fractions."""
    known = [row for row in rows if row["after"] is not None]
    means = {when: {name: sum(row[when][name] for row in known) / len(known) for name in NAMES} if known else None
             for when in ("before", "after")}
    return {"flagged": len(rows), "failed": sum(bool(row["failed"]) for row in rows), "known": len(known), **means}


def print_repairs(repair: Mapping[str, Any]) -> None:
    """The table of repairs, and one line of means."""
    table = Table(title="repair of the flagged networks: ACC, ASR in percent, before -> after")
    for name in ("model", *NAMES, "seconds", ""):
        table.add_column(name)
    for row in repair["networks"]:
        note = f"not repaired: {row['failed']}" if row["failed"] else row["unknown"] and "set or trigger not known"
        table.add_row(row["model"], *(_change(row, name) for name in NAMES), f"{row['seconds']:.1f}", note)
    console().print(table)
    if repair["known"]:
        console().print(f"mean of {repair['known']}: " + ", ".join(f"{name} {_change(repair, name)}" for name in NAMES))


def _change(row: Mapping[str, Any], name: str) -> str:
    return "-" if row["after"] is None else f"{100 * row['before'][name]:.1f} -> {100 * row['after'][name]:.1f}"
