"""Task 2 on the page: image, map and mask side by side, the worst first, with the curves of each category."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anomaly.score_files import read_scores
from data.anomaly_tree import Category, check_category, read_mask, read_tree
from data.errors import InputError
from submit.pixel_curves import grid_counts, level_counts
from submit.report_parts.charts import Chart, Line, line, precision_recall, roc
from submit.report_parts.pictures import Album, heat, mask
from submit.report_parts.run_records import Run, data_folder, predictions_folder
from submit.scoring import IMAGE_METRICS, PIXEL_METRICS
from submit.task_anomaly import SCORES

TEMPLATE = "anomaly.html.jinja"
ITEMS = 500  # images shown of all categories
SIDE = 112   # pixels of a picture
METRICS = (*IMAGE_METRICS, *PIXEL_METRICS)


@dataclass(frozen=True)
class Item:
    """One image. error: share of the images of the other kind that its score stands on the wrong side of."""

    name: str
    kind: str
    score: float
    error: float | None  # in [0, 1]; None where all images are of one kind
    image: str | None
    map: str | None
    mask: str | None  # None also for good images and without masks


@dataclass(frozen=True)
class Gallery:
    name: str
    part: Mapping[str, Any]  # the category in the record
    items: tuple[Item, ...]  # highest error first
    left_out: int
    charts: tuple[Chart, ...]


@dataclass(frozen=True)
class AnomalySection:
    galleries: tuple[Gallery, ...]
    notes: tuple[str, ...]
    metrics: tuple[str, ...] = METRICS
    template: str = TEMPLATE


def section(run: Run, result: Mapping[str, Any], limit: int) -> AnomalySection:
    """What the page shows of one scored run, its pictures within `limit` bytes."""
    notes: list[str] = []
    parts = result["parts"]
    album = Album(limit, SIDE)
    data, scores = data_folder(result, notes), predictions_folder(run, result, notes)
    categories = _categories(data, parts, notes) if data and scores else {}
    root = scores / SCORES if scores and (scores / SCORES).is_dir() else scores
    room = ITEMS // max(len(categories), 1)
    galleries = tuple(_gallery(part, categories.get(part["category"]), root, room, album, notes) for part in parts)
    return AnomalySection(galleries, tuple(notes + album.notes()))


def _categories(data: Path, parts: list[dict], notes: list[str]) -> dict[str, Category]:
    """The categories of the record as they lie in `data` now, without images that cannot be read."""
    try:
        found = {category.name: category for category in read_tree(data).categories}
    except InputError as problem:
        notes.append(str(problem))
        return {}
    kept = {}
    for part in parts:
        category = check_category(found[part["category"]])[0] if part["category"] in found else None
        if category is None:
            notes.append(f"{data}: expected the category {part['category']}, found none; its images are not shown")
        else:
            kept[category.name] = category
    return kept


def _gallery(part: Mapping[str, Any], category: Category | None, root: Path | None, room: int, album: Album,
             notes: list[str]) -> Gallery:
    name = part["category"]
    if category is None:
        return Gallery(name, part, (), part["images"], ())
    try:
        scores, maps = read_scores(root, category)
    except InputError as problem:
        notes.append(str(problem))
        return Gallery(name, part, (), part["images"], ())
    maps = maps[:, 0]
    truth = np.array([image.is_anomaly for image in category.images])
    masks = _masks(category)
    errors = rank_errors(truth, scores)
    order = np.lexsort((-scores, -np.nan_to_num(errors)))[:room]
    items = tuple(_item(category, i, scores, maps, masks, errors, album) for i in order)
    return Gallery(name, part, items, len(truth) - len(items), _charts(part, truth, scores, masks, maps))


def _masks(category: Category) -> np.ndarray | None:
    """(N, 224, 224) bool, or None for a category without masks."""
    if not category.has_masks:
        return None
    nothing = np.zeros((224, 224), dtype=bool)
    return np.stack([nothing if image.mask is None else read_mask(image.mask).numpy()[0]
                     for image in category.images])


def rank_errors(truth: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(N,) in [0, 1]: for a defect the share of good images that score higher, for a good image of defects that score
    lower, equals half. Their mean over either kind is 1 - AUROC. NaN where there is one kind only."""
    good, defects = np.sort(scores[~truth]), np.sort(scores[truth])
    if not len(good) or not len(defects):
        return np.full(len(scores), np.nan)
    below = [(np.searchsorted(rest, scores, "left") + np.searchsorted(rest, scores, "right")) / 2 / len(rest)
             for rest in (good, defects)]
    return np.where(truth, 1 - below[0], below[1])


def _item(category: Category, i: int, scores: np.ndarray, maps: np.ndarray, masks: np.ndarray | None,
          errors: np.ndarray, album: Album) -> Item:
    image = category.images[i]
    shown = image.mask is not None and masks is not None
    return Item(image.path.name, image.kind, float(scores[i]), None if np.isnan(errors[i]) else float(errors[i]),
                album.file(image.path), album.image(heat(maps[i])), album.image(mask(masks[i])) if shown else None)


def _charts(part: Mapping[str, Any], truth: np.ndarray, scores: np.ndarray, masks: np.ndarray | None,
            maps: np.ndarray) -> tuple[Chart, ...]:
    """ROC and precision over recall, of images and of pixels, where both kinds are there."""
    rocs: list[Line] = []
    precisions: list[Line] = []
    levels = [("image", 0, truth, scores)] + ([("pixel", 1, masks, maps)] if masks is not None else [])
    for level, style, kinds, values in levels:
        if kinds.any() and not kinds.all():
            kinds, values = kinds.ravel(), values.ravel()
            counts = grid_counts(kinds, values) or level_counts(kinds, values)
            rocs.append(line(f"{level}s, AUROC {part[f'{level}_auroc']:.1f} %", *roc(*counts), style))
            precisions.append(line(f"{level}s, AP {part[f'{level}_ap']:.1f} %", *precision_recall(*counts), style))
    if not rocs:
        return ()
    return (Chart("ROC", "false positive rate", "true positive rate", tuple(rocs), diagonal=True),
            Chart("Precision over recall", "recall", "precision", tuple(precisions)))
