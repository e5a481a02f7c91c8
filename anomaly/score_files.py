"""The organizers' score files: `ROOT/<category>/test/<kind>/<stem>_scores.json`, one an image.

Each holds `img_level_score` (a single number) and `pix_level_score` (1, 224, 224), both in [0, 1] with four decimals,
as {"__ndarray__": nested list, "dtype": "float64", "shape": [...]}.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from data.anomaly_tree import SIDE, SPLIT, AnomalyImage, Category
from data.errors import InputError, expect
from data.files import write_atomic

IMAGE, PIXELS = "img_level_score", "pix_level_score"
STEPS = 10_000  # four decimals


def score_file(root: Path, category: str, image: AnomalyImage) -> Path:
    """Where the scores of an image lie."""
    return Path(root) / category / SPLIT / image.kind / f"{image.path.stem}_scores.json"


def write_scores(root: Path, category: str, images: Sequence[AnomalyImage], image_scores: np.ndarray,
                 maps: np.ndarray) -> None:
    """Write one file an image, each at once or not at all; files of the same names are replaced.

    image_scores: (N,), maps: (N, 1, 224, 224), finite and in [0, 1], in the order of the images.
    """
    expect(np.shape(image_scores) == (len(images),), f"{category} image scores", f"shape ({len(images)},)",
           np.shape(image_scores))
    shape = (len(images), 1, SIDE, SIDE)
    expect(np.shape(maps) == shape, f"{category} maps", f"shape {shape}", np.shape(maps))
    targets = [score_file(root, category, image) for image in images]
    expect(len(set(targets)) == len(targets), f"{category} images", "another stem for each of a kind", "two alike")
    for path, score, pixels in zip(targets, image_scores, maps, strict=True):
        _check_range(path, IMAGE, np.asarray(score))
        _check_range(path, PIXELS, pixels)
    for path, score, pixels in zip(targets, image_scores, maps, strict=True):
        write_atomic(path, _text(float(score), np.asarray(pixels)))


def _check_range(path: Path, key: str, values: np.ndarray) -> None:
    expect(np.isfinite(values).all(), f"{path} {key}", "finite numbers", "NaN or infinity")
    low, high = float(values.min()), float(values.max())
    expect(low >= 0 and high <= 1, f"{path} {key}", "numbers in [0, 1]", f"{low:g} to {high:g}")


@cache
def _decimals() -> np.ndarray:
    """The texts of all four-decimal numbers from 0 to 1: looking them up is faster than formatting."""
    return np.array([repr(step / STEPS) for step in range(STEPS + 1)], dtype=object)


def _text(score: float, pixels: np.ndarray) -> str:
    rows = _decimals()[np.rint(pixels[0].astype(np.float64) * STEPS).astype(np.int64)]  # (224, 224) of str
    nested = "], [".join(", ".join(row) for row in rows.tolist())
    return (f'{{"{IMAGE}": {{"__ndarray__": {round(score, 4)!r}, "dtype": "float64", "shape": []}}, '
            f'"{PIXELS}": {{"__ndarray__": [[[{nested}]]], "dtype": "float64", "shape": [1, {SIDE}, {SIDE}]}}}}')


def read_scores(root: Path, category: Category) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N,) and maps (N, 1, 224, 224), float64, in the order of the category's images.

    A missing, malformed or wrongly shaped file is named.
    """
    image_scores = np.empty(len(category.images))
    maps = np.empty((len(category.images), 1, SIDE, SIDE))
    for index, image in enumerate(category.images):
        path = score_file(root, category.name, image)
        record = _load(path)
        image_scores[index] = _array(path, record, IMAGE, ())
        maps[index] = _array(path, record, PIXELS, (1, SIDE, SIDE))
    return image_scores, maps


def _load(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: expected a score file, found {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise InputError(f"{path}: expected JSON, found {error}") from None
    expect(isinstance(record, dict), path, "a JSON object", type(record).__name__)
    return record


def _array(path: Path, record: dict, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """One array of the record, read as the organizers read it, checked for shape and range."""
    where = f"{path} {key}"
    value = record.get(key)
    expect(isinstance(value, dict) and value.keys() >= {"__ndarray__", "dtype", "shape"}, where,
           "an object with __ndarray__, dtype and shape", "none" if value is None else str(value)[:60])
    expect(value["dtype"] == "float64", f"{where} dtype", "float64", value["dtype"])
    expect(value["shape"] == list(shape), f"{where} shape", list(shape), value["shape"])
    try:
        array = np.array(value["__ndarray__"], dtype=value["dtype"]).reshape(value["shape"])
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{where}: expected numbers of shape {list(shape)}, found {error}") from None
    _check_range(path, key, array)
    return array
