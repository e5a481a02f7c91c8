"""Mutual scoring against the published way: `python -m benchmarks.mutual_scoring`.

The published way takes every image as query: torch.cdist to all other images at once, nearest patch, two topk. Its
time is that of a few queries times the number of images. Ours is that of a whole set where that takes about as long,
else of its first rows, per pair of images. Both in one process, medians; memory in processes of their own.
Writes benchmarks/records/mutual_scoring.json. On a CUDA GPU: `--device cuda`. With `--minutes` sizes that would not end
in time are left for the same command.
"""
from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import normalize

from anomaly.mutual_scoring import _Pairs, mutual_scores
from benchmarks.kept_parts import measured_parts
from benchmarks.options import TIME_UP, add_device, add_minutes, add_out, device_of, record_file
from benchmarks.time_limit import TimeLimit
from data.files import write_json
from submit.calibration import synchronize
from submit.records import environment, peak_memory_gib

IMAGES, PATCHES, WIDTHS = (16, 64, 256), (256, 529, 1369), (384, 1024)
PRECISIONS = ("float32", "half")
QUERIES, RUNS = 2, 3    # of the published way; of a timing
WHOLE = {"cpu": 3e11, "cuda": 3e13}  # multiplications: larger sets are timed by their first rows
MEMORY_AT = (64, 529, 384)


def published(patches: Tensor, queries: range, keep: float = 0.3) -> Tensor:
    """(q, L) scores of some images: distances to all patches of all others, nearest patch, k smallest."""
    result = []
    for i in queries:
        others = torch.cat([patches[:i], patches[i + 1:]])
        nearest = torch.cdist(patches[i].expand(len(others), -1, -1), others).amin(2)  # (N - 1, L)
        largest = nearest.topk(max(1, int(keep * len(others))), dim=0, largest=False).values
        result.append(largest.topk(len(largest), dim=0, largest=False).values.mean(0))  # from 0 to 30 %: two topk
    return torch.stack(result)


def likely_features(n: int, length: int, width: int, device: str) -> Tensor:
    """Unit vectors with a common part and a few strong directions, as the features of nets have them."""
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(16, width, generator=generator)
    mixed = torch.randn(n, length, 16, generator=generator).exp() @ strong
    return normalize(mixed + 0.5 * torch.randn(n, length, width, generator=generator), dim=-1).to(device)


def seconds(function: Callable[[], object], device: str, runs: int = RUNS) -> float:
    """Median of the runs."""
    times = []
    synchronize(torch.device(device))
    for _ in range(runs):
        start = time.perf_counter()
        function()
        synchronize(torch.device(device))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def our_seconds(patches: Tensor, precision: str, device: str) -> tuple[float, float, bool]:
    """Seconds of the whole set, milliseconds a pair of images, and whether the whole set was timed."""
    n, length, width = patches.shape
    pairs = n * (n + 1) / 2
    most = WHOLE[torch.device(device).type]
    if pairs * length ** 2 * width <= most:
        whole = seconds(lambda: mutual_scores(patches, precision=precision), device)
        return whole, 1e3 * whole / pairs, True
    operands = _Pairs(patches, None, precision, None)
    rows = min(n, max(operands.side, int(most / (n * length ** 2 * width)) // operands.side * operands.side))
    some = seconds(lambda: operands.nearest(range(rows)), device)
    a_pair = some / (rows * (n - rows) + rows * (rows + 1) / 2)
    return a_pair * pairs, 1e3 * a_pair, False


def compared(n: int, length: int, width: int, device: str) -> dict:
    patches = likely_features(n, length, width, device)
    queries = range(QUERIES)
    published(patches, range(1))  # warms up
    slow = n * seconds(lambda: published(patches, queries), device, runs=1 + 2 * (n < 200)) / QUERIES
    row = {"images": n, "patches": length, "width": width, "published_seconds": slow}
    expected = published(patches, queries) if n < 200 else None
    for precision in PRECISIONS:
        ours, a_pair, whole = our_seconds(patches, precision, device)
        row[precision] = {"seconds": ours, "times_faster": slow / ours, "ms_a_pair": a_pair, "whole_set": whole}
        if whole and expected is not None:
            found = mutual_scores(patches, precision=precision)[:QUERIES]
            row[precision]["largest_difference"] = float((found - expected).abs().max())
            row[precision]["rank_correlation"] = float(spearmanr(found.cpu().flatten(), expected.cpu().flatten())[0])
    return row


def memory(way: str, at: tuple[int, int, int], device: str) -> float:
    """MiB beyond the features that one way takes, on a GPU of its memory; in a fresh process."""
    patches = likely_features(*at, device)
    on_gpu = torch.device(device).type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    published(patches, range(1)) if way == "published" else mutual_scores(patches, precision=way)
    after = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (after - before) / 2**20


def memories(at: tuple[int, int, int], device: str) -> dict[str, float]:
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        used = {way: round(pool.submit(memory, way, at, device).result()) for way in ("published", *PRECISIONS)}
    print("MiB beyond the features,", used, flush=True)
    return used


def shown(row: dict) -> dict:
    """The row, printed."""
    ratios = ", ".join(f"{p} {row[p]['times_faster']:.1f} times ({row[p]['ms_a_pair']:.2f} ms a pair)"
                       for p in PRECISIONS)
    print(f"N {row['images']:3} L {row['patches']:4} D {row['width']:4}: published {row['published_seconds']:.1f} s; "
          f"{ratios}", flush=True)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES)
    parser.add_argument("--patches", type=int, nargs="+", default=PATCHES)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    add_minutes(parser)
    add_device(parser, "cpu")
    add_out(parser, "mutual_scoring")
    options = parser.parse_args(arguments)
    if min(*options.images, 3, *options.patches, *options.widths) < 3:
        parser.error("--images, --patches, --widths: expected >= 3, found less")
    device, limit = device_of(options, parser), TimeLimit(options.minutes)
    sizes = list(product(options.images, options.patches, options.widths))
    at = MEMORY_AT if len(sizes) > 1 else sizes[0]
    parts = {f"memory {at}": lambda: memories(at, str(device))}
    parts |= {f"size {size}": lambda size=size: shown(compared(*size, str(device))) for size in sizes}
    found, left = measured_parts("mutual_scoring", device, parts, limit)
    rows, used = [row for row in found.values() if "images" in row], found.get(f"memory {at}", {})
    record = {"command": f"python -m benchmarks.mutual_scoring --device {device}", "queries": QUERIES, "rows": rows,
              "memory_mib": {"at": at, **used}, "threads": torch.get_num_threads(), "left": left,
              "median_times_faster": {p: statistics.median(row[p]["times_faster"] for row in rows)
                                      for p in PRECISIONS if rows},
              "least_times_faster": {p: min(row[p]["times_faster"] for row in rows) for p in PRECISIONS if rows},
              "peak_memory_gib": peak_memory_gib(), "environment": environment()}
    write_json(record_file("mutual_scoring", device, options.out), record)
    print("median", record["median_times_faster"], "least", record["least_times_faster"])
    return TIME_UP if left else 0


if __name__ == "__main__":
    sys.exit(main())
