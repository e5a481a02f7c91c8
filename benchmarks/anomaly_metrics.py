"""All seven metrics of 1,000 maps of 224 x 224: `python -m benchmarks.anomaly_metrics`.

Seconds and the largest resident size of the whole process, inputs and libraries included, for scores with four
decimals as score files hold them and for any scores. Against it, on fewer maps in the same process: scikit-learn's
three curves and the loop over thresholds, maps and regions. Writes benchmarks/records/anomaly_metrics.json.
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from data.files import write_json
from submit.records import environment, peak_memory_gib
from submit.scoring import measured_metrics
from tests.test_scoring import slow_aupro, slow_f1

MAPS, SIZE, RUNS = 1000, 224, 3
PLAIN_MAPS = 48  # of the plain way
CHUNK = 50       # maps made at a time, so that making them takes no memory to speak of
SCORES = ("four decimals", "any scores")


def example_category(maps: int, decimals: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Masks of blobs on every second map and noisy scores in [0, 1] that follow them: two (maps, SIZE, SIZE)."""
    masks, scores = np.zeros((maps, SIZE, SIZE), bool), np.empty((maps, SIZE, SIZE))
    for start in range(0, maps, CHUNK):
        rng, stop = np.random.default_rng(start), min(start + CHUNK, maps)
        shape = stop - start, SIZE, SIZE
        masks[start:stop] = ndimage.gaussian_filter(rng.normal(size=shape), (0, 9, 9)) > 0.06
        masks[start:stop:2] = False
        scores[start:stop] = ndimage.gaussian_filter(rng.normal(size=shape), (0, 4, 4)) * 8 + 0.5 * masks[start:stop]
    scores -= scores.min()
    scores /= scores.max()
    return masks, scores if decimals is None else scores.round(decimals, out=scores)


def plain_metrics(image_truth: np.ndarray, image_scores: np.ndarray, masks: np.ndarray,
                  maps: np.ndarray) -> dict[str, float]:
    values = {"pixel_aupro": slow_aupro(masks, maps)}
    for level, truth, scores in (("image", image_truth, image_scores), ("pixel", masks.ravel(), maps.ravel())):
        values[f"{level}_auroc"] = roc_auc_score(truth, scores)
        values[f"{level}_ap"] = average_precision_score(truth, scores)
        values[f"{level}_f1"] = slow_f1(truth, scores)
    return values


def timed(function: Callable[..., dict], *arguments: np.ndarray) -> tuple[float, float, dict]:
    """Seconds, seconds of the processor, and what came out."""
    start, busy = time.perf_counter(), time.process_time()
    values = function(*arguments)
    return time.perf_counter() - start, time.process_time() - busy, values


def measured(kind: str) -> dict:
    """One row of the record; in a fresh process, as its largest resident size is taken."""
    masks, maps = example_category(MAPS, 4 if kind == SCORES[0] else None)
    images = masks.any((1, 2)), maps.max((1, 2))
    before = peak_memory_gib()["host"]
    runs = [timed(measured_metrics, *images, masks, maps) for _ in range(RUNS)]
    row = {"scores": kind, "maps": MAPS, "size": SIZE, "defective_pixels": float(masks.mean()),
           "seconds_median_of_3": statistics.median(run[0] for run in runs),
           "processor_seconds_median_of_3": statistics.median(run[1] for run in runs),
           "peak_gib_before": before, "peak_gib": peak_memory_gib()["host"]}
    few = *(values[:PLAIN_MAPS] for values in images), masks[:PLAIN_MAPS], maps[:PLAIN_MAPS]
    ours = [timed(measured_metrics, *few) for _ in range(RUNS)]
    plain_seconds, _, plain = timed(plain_metrics, *few)
    ours_seconds = statistics.median(run[0] for run in ours)
    return row | {"plain_maps": PLAIN_MAPS, "plain_seconds": plain_seconds, "ours_seconds_on_these": ours_seconds,
                  "times_faster": plain_seconds / ours_seconds,
                  "largest_difference": max(abs(ours[0][2][name] - value) for name, value in plain.items())}


def main() -> None:
    rows = []
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for row in pool.map(measured, SCORES):
            rows.append(row)
            print(f"{row['scores']}: {MAPS} maps {row['seconds_median_of_3']:.1f} s, {row['peak_gib']:.2f} GiB; "
                  f"{PLAIN_MAPS} maps {row['times_faster']:.0f} times faster than the plain way, "
                  f"difference {row['largest_difference']:.0e}", flush=True)
    record = {"command": "python -m benchmarks.anomaly_metrics", "rows": rows, "environment": environment()}
    write_json(Path(__file__).parent / "records" / "anomaly_metrics.json", record)


if __name__ == "__main__":
    main()
