"""Task 2 from the organizers' tree to their seven metrics. Predictions are their `output_scores/`."""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from anomaly.score_files import read_scores, write_scores
from data.anomaly_tree import Category, check_category, pixel_truth, read_tree
from data.errors import InputError, expect
from submit.intervals import percentile_interval, resampled_metrics
from submit.results import Result, Split
from submit.scoring import IMAGE_METRICS, PIXEL_METRICS, measured_metrics, weighted_score

SCORES = "output_scores"


def read(folder: Path) -> Split:
    """The categories in `folder` without the images that cannot be scored, which become problems."""
    tree = read_tree(folder)
    with ThreadPoolExecutor() as pool:
        checked = list(pool.map(check_category, tree.categories))
    categories = [category for category, _ in checked if category is not None]
    problems = tree.problems + tuple(problem for _, found in checked for problem in found)
    expect(categories, folder, "at least one category that can be scored", problems[0] if problems else "none")
    return Split(None, {category.name: category for category in categories}, problems)


def predict(name: str, category: Category, folder: Path) -> None:
    """Score one category's images against each other with the function that is shipped."""
    from anomaly.predict import predict_category

    image_scores, maps = predict_category([image.path for image in category.images])
    write_scores(folder / SCORES, name, category.images, image_scores, maps)


def evaluate(split: Split, folder: Path, seed: int) -> Result:
    """Score every category whose score files stand in `folder` (or in its `output_scores/`)."""
    root = folder / SCORES if (folder / SCORES).is_dir() else folder
    parts, draws, problems = [], [], []
    for category in split.units.values():
        try:
            part, resampled = _evaluate_category(category, root, seed)
        except InputError as problem:
            problems.append(problem)
            continue
        parts.append(part)
        draws.append(resampled)
        if "pixel_aupro" in part["undefined"] and "pixel_auroc" not in part["undefined"]:
            problems.append(InputError(f"{root / category.name} maps: expected different scores among the highest 30 % "
                                       "of the normal pixels, without which the organizers' evaluation has no result, "
                                       "found none"))
    expect(parts, root, "scores of at least one category", problems[0] if problems else "none")
    return _combine(parts, draws, tuple(problems))


def _evaluate_category(category: Category, root: Path, seed: int) -> tuple[dict, dict[str, np.ndarray]]:
    image_scores, maps = read_scores(root, category)
    maps = maps[:, 0] if category.has_masks else None
    image_truth = np.array([image.is_anomaly for image in category.images])
    truth = pixel_truth(category).numpy()[:, 0] if category.has_masks else None
    measured = measured_metrics(image_truth, image_scores, truth, maps)
    values = {name: value or 0.0 for name, value in measured.items()}
    names = IMAGE_METRICS + PIXEL_METRICS if category.has_masks else IMAGE_METRICS
    resampled = resampled_metrics(image_truth, image_scores, truth, maps, seed)
    zeros = np.zeros_like(next(iter(resampled.values()), np.zeros(1)))
    draws = {name: resampled.get(name, zeros) for name in names}
    intervals = {name: [100 * bound for bound in percentile_interval(draws[name])] for name in names}
    part = {"category": category.name, "images": len(image_truth), "defective": int(image_truth.sum()),
            **{name: 100 * values[name] for name in names},
            "leaderboard_score": 100 * weighted_score(values, names),
            "intervals": intervals, "images_only": not category.has_masks,
            "undefined": [name for name in names if measured[name] is None]}
    return part, {"leaderboard_score": 100 * weighted_score(draws, names)}


def _combine(parts: list[dict], draws: list[dict], problems: tuple[InputError, ...]) -> Result:
    """The plain mean over categories with masks; over the others only where no category has masks."""
    full = [i for i, part in enumerate(parts) if not part["images_only"]] or range(len(parts))
    value = float(np.mean([parts[i]["leaderboard_score"] for i in full]))
    spread = np.mean(np.broadcast_arrays(*(draws[i]["leaderboard_score"] for i in full)), axis=0)
    notes = [f"{p['category']}: undefined, counted as 0: {', '.join(p['undefined'])}"
             for p in parts if p["undefined"]]
    alone = [p["category"] for p in parts if p["images_only"]]
    if alone:
        notes.append(f"no masks, so scored on image metrics alone: {', '.join(alone)}"
                     + ("" if len(alone) == len(parts) else " (left out of the mean)"))
    images = sum(parts[i]["images"] for i in full)
    return Result(value, percentile_interval(spread), images, "images", parts, tuple(notes), problems)
