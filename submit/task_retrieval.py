"""Task 1 from a folder with a CSV to top-1 accuracy. Predictions are two arrays of embeddings."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from data.errors import InputError, expect
from data.files import npy_bytes, write_atomic
from data.retrieval_set import RetrievalSet, read_retrieval_set
from submit.intervals import share_interval
from submit.results import Result, Split
from submit.scoring import best_matches, ranked_matches

SHARD = 256  # rows encoded between two savings
BEST = 5  # images that an explanation shows
SIDES = ("query_embeddings", "database_embeddings")


def read(folder: Path) -> Split:
    """The set in `folder`, cut into shards of queries and of database images."""
    found = read_retrieval_set(folder)
    units = {}
    for side, frame in zip(SIDES, (found.queries, found.database), strict=True):
        for start in range(0, len(frame), SHARD):
            units[f"{side}-{start:06d}"] = frame.iloc[start:start + SHARD]
    return Split(found, units, found.problems, indivisible=True)


def predict(name: str, frame: pd.DataFrame, folder: Path) -> None:
    """Encode one shard with the functions that are shipped."""
    from retrieval.predict import encode_database, encode_queries

    encode = encode_queries if name.startswith(SIDES[0]) else encode_database
    write_atomic(folder / f"{name}.npy", npy_bytes(encode(frame)))


def evaluate(split: Split, folder: Path, seed: int) -> Result:
    """Score `query_embeddings.npy` and `database_embeddings.npy` (or their shards) in `folder`."""
    found: RetrievalSet = split.data
    queries, database = _both_embeddings(folder, found)
    best = best_matches(queries, database)
    correct = best == np.array(found.targets)
    images = [Path(p).name for p in found.database["target_image"]]
    parts = [{"row": int(row), "query": text, "target": images[t], "found": images[b], "correct": bool(t == b)}
             for row, text, t, b in zip(found.queries.index, found.queries["query_text"], found.targets, best,
                                        strict=True)]
    extra = {"database": len(database), "embedding_width": int(queries.shape[1]),
             "missed_for_the_query_image": _query_wins(found, best, correct)}
    return Result(100 * float(correct.mean()), share_interval(correct, seed), len(correct), "queries", parts,
                  extra=extra)


def explained(result: Result, split: Split, folder: Path, *, own: bool) -> Result:
    """The result with, for each query, its best images and their cosines, the rank of its target, and, where the
    embeddings are our own, the objects that its text was read as."""
    from retrieval.nets import read_requests

    found: RetrievalSet = split.data
    queries, database = _both_embeddings(folder, found)
    cosines, best, ranks = ranked_matches(queries, database, np.array(found.targets), BEST)
    images = [Path(p).name for p in found.database["target_image"]]
    parts = [part | {"rank": int(rank), "best": [{"image": images[b], "cosine": round(float(c), 4)}
                                                 for b, c in zip(row, scores, strict=True)]}
             for part, rank, row, scores in zip(result.parts, ranks, best, cosines, strict=True)]
    if own:
        requests = read_requests(found.queries["query_text"])
        parts = [part | {"added": list(request.add), "removed": list(request.remove)}
                 for part, request in zip(parts, requests, strict=True)]
    among = {f"target_among_best_{BEST}": 100 * float((ranks <= BEST).mean())}
    return replace(result, parts=parts, extra=result.extra | among)


def _both_embeddings(folder: Path, found: RetrievalSet) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of queries and database, as many as there are rows."""
    queries, database = (read_embeddings(folder, side) for side in SIDES)
    for side, rows, frame in zip(SIDES, (queries, database), (found.queries, found.database), strict=True):
        expect(len(rows) == len(frame), folder / f"{side}.npy", f"{len(frame)} rows", len(rows))
    return queries, database


def _query_wins(found: RetrievalSet, best: np.ndarray, correct: np.ndarray) -> float:
    """Share in percent of all queries that wrongly find their own query image."""
    images = found.database["target_image"].to_numpy()[best]
    return 100 * float(((images == found.queries["query_image"].to_numpy()) & ~correct).mean())


def read_embeddings(folder: Path, side: str) -> np.ndarray:
    """One array, or its shards in order. Refused: Python objects, which could run code, and a header that declares more
    than the file holds (a mapped file cannot)."""
    whole = folder / f"{side}.npy"
    files = [whole] if whole.exists() else sorted(folder.glob(f"{side}-*.npy"))
    expect(files, whole, "an array of embeddings", "no such file")
    try:
        return np.concatenate([np.load(file, allow_pickle=False, mmap_mode="r") for file in files])
    except (ValueError, EOFError) as error:
        raise InputError(f"{files[0]}: expected a NumPy array of numbers, found {error}") from None
