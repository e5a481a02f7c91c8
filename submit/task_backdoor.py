"""Task 3 from a folder of models to detection accuracy. Predictions are one small JSON file a model."""
from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from data.errors import InputError, expect
from data.files import write_json
from data.model_zoo import ZooModel, load_model, read_zoo
from submit.intervals import share_interval
from submit.pixel_curves import level_counts, ranking_metrics
from submit.results import Result, Split
from submit.scoring import backdoored, detection_accuracy


def read(folder: Path) -> Split:
    """The models in `folder` that can be loaded; the others become problems."""
    zoo = read_zoo(folder)
    expect(zoo.models, folder, "at least one model that can be scored", zoo.problems[0] if zoo.problems else "none")
    return Split(None, {model.name: model for model in zoo.models}, zoo.problems)


def predict(name: str, model: ZooModel, folder: Path) -> None:
    """Run the shipped detector on one model."""
    from backdoor_detection.detection import judge

    found = judge(load_model(model), model.num_classes, model.images_folder, model.transformation)
    expect(found.margins.isfinite().all(), model.folder, "a network with finite outputs", "NaN or infinity")
    write_json(folder / f"{name}.json", {
        "backdoored": int(found.backdoored), "p_value": float(found.p_value), "suspect": int(found.suspect),
        "margins": [round(float(margin), 4) for margin in found.margins],
        "kept": list(found.kept), "images": found.images, "side": found.side, "steps": found.steps,
        "steps_asked": found.steps_asked, "seconds": round(found.seconds, 3)})


def evaluate(split: Split, folder: Path, seed: int) -> Result:
    """Score every model whose verdict stands in `folder`."""
    parts, problems = [], []
    for model in split.units.values():
        try:
            parts.append(_verdict(model, folder / f"{model.name}.json"))
        except InputError as problem:
            problems.append(problem)
    expect(parts, folder, "a verdict on at least one model", problems[0] if problems else "none")
    correct = np.array([part["correct"] for part in parts])
    value = detection_accuracy(np.array([part["backdoored"] for part in parts]),
                               np.array([part["ground_truth"] for part in parts]))
    return Result(value, share_interval(correct, seed), len(parts), "models", parts, problems=tuple(problems),
                  extra={"auroc": _auroc(parts)})


def _verdict(model: ZooModel, file: Path) -> dict:
    expect(file.exists(), file, "a verdict on the model", "no such file")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: expected JSON, found {error}") from None
    answer = found.get("backdoored") if isinstance(found, dict) else None
    expect(type(answer) is int and answer in (0, 1), f"{file} 'backdoored'", "1 (backdoored) or 0 (clean)", answer)
    truth = int(backdoored(model.ground_truth))
    record = model.record or {}
    attack = str(record.get("attack") or ("unknown" if truth else "clean"))
    return {"model": model.name, "attack": attack, "ground_truth": int(model.ground_truth), "backdoored": answer,
            "correct": answer == truth, **_evidence(file, found)}


def _evidence(file: Path, found: dict) -> dict:
    """What a verdict may add: p_value (number), suspect (class) and margins (numbers), each checked."""
    values = {key: found[key] for key in ("p_value", "suspect", "margins") if key in found}
    for key, value in values.items():
        many = key == "margins"
        numbers = value if many else [value]
        expect(isinstance(numbers, list) and all(type(n) in (int, float) and math.isfinite(n) for n in numbers),
               f"{file} '{key}'", "finite numbers" if many else "a finite number", str(value)[:60])
    return values


def _auroc(parts: list[dict]) -> float | None:
    """AUROC in percent of 1 - p as a score for "backdoored"; None without p-values or with one kind of model."""
    truth = np.array([part["ground_truth"] == 0 for part in parts])
    if truth.all() or not truth.any() or any("p_value" not in part for part in parts):
        return None
    return 100 * float(ranking_metrics(*level_counts(truth, np.array([-part["p_value"] for part in parts])))[0])
