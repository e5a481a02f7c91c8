"""`zoo observe`: what the backdoors of a zoo look like from inside, as numbers and plots (`defense/observations.py`).

Clean unlearning takes a share of the training images, poison unlearning as many triggered test images labelled as the
attacker wants: this is for study by somebody who knows the trigger, no defense.
"""
from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from data.devices import chosen_device
from data.errors import InputError, expect
from data.files import new_folder, write_json
from data.victims import normalise
from defense.observations import (
    ByLayer,
    correlation,
    coverage,
    joined,
    trigger_activation_change,
    unlearning_activeness,
    unlearning_change,
)
from defense.unlearning import UnlearningConfig
from submit.defend_commands import CLEAN
from submit.kept_units import as_json, equal_sums
from submit.observation_plots import coverage_plot, neurons_plot, save_png, weight_change_plot
from submit.records import environment
from submit.tables import console, unit_progress
from submit.zoo_victims import Victim, backdoored_samples, clean_part, own_seed, read_victim

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # of the neurons, for the coverage
SHOWN = 0.1   # the one in the table
UNLEARNING = UnlearningConfig(rate=5e-4, batch=32)  # five times the published rate: few images, a fifth of the epochs
RECORD = "observations.json"


def observe(zoo: Path, out: Path, data: Path | None, *, only: Sequence[str], seed: int, command: str
            ) -> list[InputError]:
    """A folder in `out` for each backdoored network, which lacks one: plots and their numbers. Prints a table.

    only: names of networks; none = all. Returns what was left out.
    """
    samples, problems = backdoored_samples(zoo)
    names = [sample.name for sample in samples]
    for name in only:
        expect(name in names, "--network", f"a backdoored network of {zoo}: {', '.join(names)}", name)
    samples = [sample for sample in samples if not only or sample.name in only]
    for sample in samples:
        expect(not (out / sample.name).exists(), out / sample.name, "a path where nothing lies yet", "a folder")
    rows, device = {}, chosen_device()
    with unit_progress() as bar:
        for done, sample in enumerate(samples):
            bar("observe", done, len(samples))
            try:
                with equal_sums(device):
                    victim = read_victim(sample, data, out / ".triggers", device=device)
                    rows[sample.name] = _observed(victim, out / sample.name, seed, command)
            except InputError as problem:
                problems.append(problem)
        bar("observe", len(samples), len(samples))
    _show(rows, out)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return problems


def _observed(victim: Victim, folder: Path, seed: int, command: str) -> dict[str, Any]:
    """Measure one network and write its folder, whole or not at all. Returns the numbers of the table."""
    start = time.perf_counter()
    measured = _measured(victim, seed)
    found = {"NWC, clean": coverage(joined(measured["NWC, clean"], measured["TAC"]), joined(measured["TAC"]), SHARES)}
    numbers = {"correlation": correlation(joined(measured["NWC, clean"]), joined(measured["NWC, poison"])),
               "coverage": dict(zip(map(str, SHARES), found["NWC, clean"].tolist(), strict=True)),
               "neurons": len(joined(measured["NWC, clean"])), "seconds": round(time.perf_counter() - start, 2)}
    with new_folder(folder) as scratch:
        save_png(weight_change_plot(measured["NWC, clean"], measured["NWC, poison"]), scratch / "weight_change.png")
        save_png(neurons_plot(measured["activeness"], "activeness"), scratch / "activeness.png")
        save_png(neurons_plot(measured["TAC"], "TAC"), scratch / "trigger_activation_change.png")
        save_png(coverage_plot(found, SHARES), scratch / "coverage.png")
        values = {kind: {name: part.tolist() for name, part in layers.items()} for kind, layers in measured.items()}
        write_json(scratch / RECORD, as_json({"command": command, "network": victim.name, "seed": seed, **numbers,
                                              "values": values, "environment": environment()}))
    return numbers


def _measured(victim: Victim, seed: int) -> dict[str, ByLayer]:
    """Every observation of one network, by what it is."""
    images, labels = clean_part(victim, CLEAN, seed)
    count = min(len(images), len(victim.triggered))
    plain, triggered = (normalise(part[:count], victim.scale) for part in (victim.test.images, victim.triggered))
    wanted = torch.full((count,), victim.record["target"], device=labels.device)
    model = victim.model.to(images.device)

    def drawn() -> torch.Generator:
        return torch.Generator().manual_seed(own_seed(victim, seed))

    def change(given: Tensor, classes: Tensor) -> ByLayer:
        return unlearning_change(model, given, classes, UNLEARNING, generator=drawn())

    return {"NWC, clean": change(images, labels), "NWC, poison": change(triggered, wanted),
            "activeness": unlearning_activeness(model, images, labels, UNLEARNING, generator=drawn()),
            "TAC": trigger_activation_change(model, plain, triggered)}


def _show(rows: dict[str, dict[str, Any]], out: Path) -> None:
    if not rows:
        return
    table = Table(title=f"Neurons of backdoored networks; plots and numbers in {out}")
    for name in ("network", "neurons", "NWC clean to poison, r", f"top {100 * SHOWN:g} % by TAC among those by NWC, %"):
        table.add_column(name, justify="left" if name == "network" else "right")
    for name, row in rows.items():
        covered = 100 * row["coverage"][str(SHOWN)]
        table.add_row(name, str(row["neurons"]), f"{row['correlation']:.2f}", f"{covered:.0f}")
    console().print(table)
