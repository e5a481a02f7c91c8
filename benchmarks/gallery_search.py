"""Exact search in a large gallery on disk: `python -m benchmarks.gallery_search [--rows N]`.

Writes N x 768 float16 vectors to a temporary folder, drops them from the system's cache, and searches them through a
memory map: seconds, and the most memory the process held beyond what it had before. Then, at a size it can do, the
plain way for comparison: all vectors as float32 at unit length, the full matrix of cosines, argsort. Processor time
is compared, as other work on the machine does not count in it.
Vectors: one random block, its columns rolled by the number of the block.
Writes benchmarks/records/gallery_search_N.json.
"""
from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.errors import expect
from data.files import write_json
from retrieval.gallery import ExactGallery
from submit.records import environment

WIDTH, CHUNK = 768, 50_000
PROC = Path("/proc/self")


def written(file: Path, rows: int) -> np.memmap:
    """The gallery in its file, no longer in the system's cache."""
    expect(shutil.disk_usage(file.parent).free > 1.1 * rows * WIDTH * 2, file.parent,
           f"{rows * WIDTH * 2 / 2**30:.1f} GiB free", f"{shutil.disk_usage(file.parent).free / 2**30:.1f} GiB")
    first = np.random.default_rng(0).standard_normal((min(CHUNK, rows), WIDTH), dtype=np.float32).astype(np.float16)
    with file.open("wb") as out:
        for number, start in enumerate(range(0, rows, CHUNK)):
            np.roll(first[:rows - start], number, axis=1).tofile(out)
        out.flush()
        os.fsync(out.fileno())
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return np.memmap(file, np.float16, "r", shape=(rows, WIDTH))


def memory_mib(field: str) -> float:
    """VmRSS (held now) or VmHWM (the most since the last reset) of this process."""
    lines = (PROC / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def watched(function: Callable, *arguments: object) -> tuple[dict[str, float], tuple]:
    """What it took: seconds by the clock and of the processor, peak memory beyond the start in MiB; and the value."""
    (PROC / "clear_refs").write_text("5")  # resets the peak
    before, clock, processor = memory_mib("VmRSS"), time.perf_counter(), time.process_time()
    value = function(*arguments)
    return {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor,
            "peak_mib_beyond_start": memory_mib("VmHWM") - before}, value


def plain(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The full matrix, sorted."""
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, vectors.astype(np.float32))]
    cosines = units[0] @ units[1].T
    rows = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosines, rows, 1), rows


def measured(options: argparse.Namespace, folder: Path) -> dict:
    vectors = written(folder / "gallery", options.rows)
    queries = np.random.default_rng(1).standard_normal((options.queries, WIDTH), dtype=np.float32)
    own = torch.from_numpy(queries)
    ExactGallery(vectors[:2000]).search(own, options.k)  # libraries wake up
    large, _ = watched(ExactGallery(vectors).search, own, options.k)
    small = vectors[:min(options.plain_rows, options.rows)]
    slow, (plain_scores, plain_rows) = watched(plain, small, queries, options.k)
    ours, (scores, rows) = watched(ExactGallery(small).search, own, options.k)
    return {"rows": options.rows, "width": WIDTH, "bytes": vectors.nbytes, "queries": options.queries, "k": options.k,
            "threads": torch.get_num_threads(), **large,
            "against_the_plain_way": {
                "rows": len(small), "plain": slow, "ours": ours,
                "times_less_processor_time": slow["processor_seconds"] / ours["processor_seconds"],
                "same_rows": bool((rows.numpy() == plain_rows).all()),
                "largest_difference_of_scores": float(np.abs(scores.numpy() - plain_scores).max())}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="1,000,000 take 1.5 GB of disk, 10,000,000 15 GB")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--plain-rows", type=int, default=200_000, help="size of the comparison with the plain way")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measured(options, Path(folder))
    given = "".join(f" --{name.replace('_', '-')} {value}" for name, value in vars(options).items()
                    if name != "folder" and value != parser.get_default(name))
    write_json(Path(__file__).parent / "records" / f"gallery_search_{options.rows}.json",
               {"command": f"python -m benchmarks.gallery_search{given}", **result, "environment": environment()})
    versus = result["against_the_plain_way"]
    print(f"{options.rows:,} rows, {options.queries} queries: {result['seconds']:.1f} s, "
          f"{result['processor_seconds']:.1f} s of the processor, {result['peak_mib_beyond_start']:.0f} MiB; of "
          f"{versus['rows']:,} rows {versus['times_less_processor_time']:.1f} times less than the plain way")


if __name__ == "__main__":
    main()
