"""The organizers' score files: `ROOT/<category>/test/<kind>/<stem>_scores.json`, one an image.

Each holds `img_level_score` (a single number) and `pix_level_score` (1, 224, 224), both in [0, 1] with four decimals,
as {"__ndarray__": nested list, "dtype": "float64", "shape": [...]}. We write every number in six bytes ("0.5000"), so a
file is put together by table from whole arrays, and one of ours is recognised and read without a JSON parser.
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
NUMBER = 8      # bytes of a number, "d.dddd", and of the ", " that follows it
ROW = 1 + SIDE * NUMBER + 1  # "[", the numbers with the last ", " made "],", and " "
HEAD = f'{{"{IMAGE}": {{"__ndarray__": '.encode()
BETWEEN = f', "dtype": "float64", "shape": []}}, "{PIXELS}": {{"__ndarray__": [['.encode()
TAIL = f', "dtype": "float64", "shape": [1, {SIDE}, {SIDE}]}}}}'.encode()
SCORE_END = len(HEAD) + len("d.dddd")
MAP_START = SCORE_END + len(BETWEEN)
FILE_SIZE = MAP_START + SIDE * ROW + len(TAIL)


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
        write_atomic(path, _file_bytes(_levels(np.asarray(score)), _levels(np.asarray(pixels)[0])))


def _check_range(path: Path, key: str, values: np.ndarray) -> None:
    low, high = float(values.min()), float(values.max())
    inside = low >= 0 and high <= 1  # never so with a NaN among them
    expect(inside or np.isfinite(values).all(), f"{path} {key}", "finite numbers", "NaN or infinity")
    expect(inside, f"{path} {key}", "numbers in [0, 1]", f"{low:g} to {high:g}")


def _levels(values: np.ndarray) -> np.ndarray:
    """Numbers of [0, 1] in steps of four decimals, as integers 0..10000 of the same shape."""
    return np.rint(values.astype(np.float64) * STEPS).astype(np.int64)


@cache
def _number_bytes() -> np.ndarray:
    """The eight bytes "d.dddd, " of each level, as one word each: (10001,) uint64."""
    return np.frombuffer("".join(f"{level / STEPS:.4f}, " for level in range(STEPS + 1)).encode(), dtype=np.uint64)


def _file_bytes(score: np.ndarray, levels: np.ndarray) -> bytes:
    """A whole score file from the levels of the image score, (), and of the map, (224, 224)."""
    rows = np.empty((SIDE, ROW), dtype=np.uint8)
    rows[:, 0] = ord("[")
    rows[:, 1:-1] = _number_bytes()[levels].view(np.uint8)
    rows[:, -3:] = np.frombuffer(b"], ", dtype=np.uint8)
    rows[-1, -3:] = ord("]")  # ends the row and both lists around it
    number = _number_bytes()[score].tobytes()[:SCORE_END - len(HEAD)]
    return b"".join([HEAD, number, BETWEEN, rows.tobytes(), TAIL])


def read_scores(root: Path, category: Category) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N,) and maps (N, 1, 224, 224), float64, in the order of the category's images.

    A missing, malformed or wrongly shaped file is named.
    """
    image_scores = np.empty(len(category.images))
    maps = np.empty((len(category.images), 1, SIDE, SIDE))
    for index, image in enumerate(category.images):
        path = score_file(root, category.name, image)
        content = _content(path)
        levels = _own_levels(content)
        if levels is not None:
            image_scores[index], maps[index, 0] = levels[0] / STEPS, levels[1] / STEPS
            continue
        record = _record(path, content)
        image_scores[index] = _array(path, record, IMAGE, ())
        maps[index] = _array(path, record, PIXELS, (1, SIDE, SIDE))
    return image_scores, maps


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected a score file, found {error.strerror}") from None


def _own_levels(content: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """Levels of the image score, (), and of the map, (224, 224); None unless we wrote exactly these bytes.

    The digits are read off their places without a look at what stands there. Writing the levels anew is the check:
    every byte has to come out as it was.
    """
    if len(content) != FILE_SIZE:
        return None
    raw = np.frombuffer(content, dtype=np.uint8)
    score = _digits(raw[len(HEAD):len(HEAD) + NUMBER])
    rows = raw[MAP_START:-len(TAIL)].reshape(SIDE, ROW)
    levels = _digits(rows[:, 1:-1].reshape(SIDE, SIDE, NUMBER))
    if min(score, levels.min()) < 0 or max(score, levels.max()) > STEPS:
        return None
    return (score, levels) if _file_bytes(score, levels) == content else None


def _digits(numbers: np.ndarray) -> np.ndarray:
    """Levels (...) of eight bytes "d.dddd, " each: (..., 8)."""
    places = np.array([10_000, 0, 1000, 100, 10, 1, 0, 0], dtype=np.float32)  # every sum stays below 2^24: exact
    return (numbers.astype(np.float32) @ places - ord("0") * places.sum()).astype(np.int64)


def _record(path: Path, content: bytes) -> dict:
    try:
        record = json.loads(content.decode("utf-8"))
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
