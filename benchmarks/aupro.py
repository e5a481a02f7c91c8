"""AUPRO in one pass against the loop over thresholds, maps and regions: `python -m benchmarks.aupro`."""
import statistics
import time
from pathlib import Path

import numpy as np
from scipy import ndimage

from data.files import write_json
from submit.aupro import aupro
from submit.records import environment
from tests.test_scoring import slow_aupro

MAPS, SIZE, RUNS = 48, 224, 5


def example_category(maps: int = MAPS, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Masks of blobs on half of the maps, and noisy scores with four decimals that follow them."""
    rng = np.random.default_rng(0)
    masks = ndimage.gaussian_filter(rng.normal(size=(maps, size, size)), (0, 9, 9)) > 0.06
    masks[: maps // 2] = False
    scores = ndimage.gaussian_filter(rng.normal(size=masks.shape), (0, 4, 4)) * 8 + 0.5 * masks
    return masks, ((scores - scores.min()) / np.ptp(scores)).round(4)


def seconds(function, *arguments) -> tuple[float, float]:
    start = time.perf_counter()
    value = function(*arguments)
    return time.perf_counter() - start, value


def main() -> None:
    masks, scores = example_category()
    fast = [seconds(aupro, masks, scores) for _ in range(RUNS)]
    slow_seconds, slow_value = seconds(slow_aupro, masks, scores)
    fast_seconds = statistics.median(t for t, _ in fast)
    result = {
        "command": "python -m benchmarks.aupro", "maps": MAPS, "size": SIZE,
        "regions": int(sum(ndimage.label(m, np.ones((3, 3)))[1] for m in masks)),
        "one_pass_seconds_median_of_5": fast_seconds, "loop_seconds": slow_seconds,
        "times_faster": slow_seconds / fast_seconds, "difference": abs(fast[0][1] - slow_value),
        "environment": environment(),
    }
    write_json(Path(__file__).parent / "records" / "aupro.json", result)
    print(f"loop {slow_seconds:.2f} s, one pass {fast_seconds:.3f} s: {result['times_faster']:.0f} times faster, "
          f"difference {result['difference']:.1e}")


if __name__ == "__main__":
    main()
