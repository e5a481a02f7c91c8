"""Writing and reading the score files of 50 images against the plain ways: `python -m benchmarks.score_files`.

Plain writing rounds value by value, hands the nested lists to json.dumps and writes the text; plain reading is
json.loads and numpy, as the organizers read. Both on the same folder in one process, taking turns, medians.
Writes benchmarks/records/score_files.json.
"""
from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from anomaly.score_files import IMAGE, PIXELS, read_scores, score_file, write_scores
from data.anomaly_tree import SIDE, AnomalyImage, Category
from data.files import write_json
from submit.records import environment

IMAGES, RUNS = 50, 5


def plain_write(paths: list[Path], image_scores: np.ndarray, maps: np.ndarray) -> None:
    for path, score, pixels in zip(paths, image_scores, maps, strict=True):
        nested = [[[round(float(value), 4) for value in row] for row in channel] for channel in pixels]
        text = json.dumps({IMAGE: {"__ndarray__": round(float(score), 4), "dtype": "float64", "shape": []},
                           PIXELS: {"__ndarray__": nested, "dtype": "float64", "shape": [1, SIDE, SIDE]}})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def plain_read(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    records = [json.loads(path.read_text()) for path in paths]
    return tuple(np.array([np.array(r[key]["__ndarray__"], dtype=r[key]["dtype"]) for r in records])
                 for key in (IMAGE, PIXELS))


def seconds(function: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def medians(ways: dict[str, tuple]) -> dict[str, float]:
    """Median seconds of each way; they take turns, so that a busy machine slows all alike."""
    runs = [{name: seconds(*call) for name, call in ways.items()} for _ in range(RUNS)]
    return {name: statistics.median(run[name] for run in runs) for name in ways}


def measured(root: Path) -> dict:
    rng = np.random.default_rng(0)
    image_scores, maps = rng.random(IMAGES), rng.random((IMAGES, 1, SIDE, SIDE))
    images = tuple(AnomalyImage(Path(f"{i:03}.png"), "good", None) for i in range(IMAGES))
    ours, plain = root / "ours", root / "plain"
    paths, plain_paths = ([score_file(folder, "part", image) for image in images] for folder in (ours, plain))
    category = Category("part", images, True)
    writing = medians({"ours": (write_scores, ours, "part", images, image_scores, maps),
                       "plain": (plain_write, plain_paths, image_scores, maps)})
    reading = medians({"ours": (read_scores, ours, category), "plain": (plain_read, paths),
                       "ours_on_files_of_another_writer": (read_scores, plain, category)})
    found, expected = read_scores(ours, category), plain_read(plain_paths)
    return {"images": IMAGES, "bytes_a_file": paths[0].stat().st_size,
            "bytes_a_plain_file": plain_paths[0].stat().st_size,
            "write_seconds_median_of_5": writing, "write_times_faster": writing["plain"] / writing["ours"],
            "read_seconds_median_of_5": reading, "read_times_faster": reading["plain"] / reading["ours"],
            "same_values": all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = measured(Path(folder))
    write_json(Path(__file__).parent / "records" / "score_files.json",
               {"command": "python -m benchmarks.score_files", **result, "environment": environment()})
    for what in ("write", "read"):
        times = result[f"{what}_seconds_median_of_5"]
        print(f"{what}: plain {1e3 * times['plain'] / IMAGES:.1f} ms an image, ours "
              f"{1e3 * times['ours'] / IMAGES:.2f}: {result[f'{what}_times_faster']:.0f} times faster")


if __name__ == "__main__":
    main()
