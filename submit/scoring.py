"""The three scores of the contest, as its organizers compute them."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data.errors import expect
from submit.aupro import aupro
from submit.pixel_curves import ranking
from submit.rules import rules

IMAGE_METRICS = ("image_auroc", "image_f1", "image_ap")
PIXEL_METRICS = ("pixel_auroc", "pixel_f1", "pixel_ap", "pixel_aupro")
BLOCK = 1024  # queries compared with the whole database at a time


def best_matches(queries: np.ndarray, database: np.ndarray) -> np.ndarray:
    """Index (Q,) of the database row of highest cosine similarity for each query; the first among equals."""
    return np.concatenate([cosines.argmax(1) for _, cosines in _cosine_blocks(queries, database)])


def ranked_matches(queries: np.ndarray, database: np.ndarray, targets: np.ndarray, n: int
                   ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The n best database rows of each query and where its target stands; `best_matches` are the first of each.

    queries (Q, D), database (G, D), targets (Q,) rows of the database. Returns cosines and rows, (Q, min(n, G)) each,
    best first, and ranks (Q,), from 1; among equals the first row stands first.
    """
    found = []
    for part, cosines in _cosine_blocks(queries, database):
        own = np.take_along_axis(cosines, targets[part, None], 1)  # of the targets: (B, 1)
        before = np.arange(len(database)) < targets[part, None]
        ranks = 1 + ((cosines > own) | ((cosines == own) & before)).sum(1)
        rows = np.empty((len(cosines), min(n, len(database))), np.int64)
        scores = np.empty(rows.shape)
        for place in range(rows.shape[1]):
            rows[:, place] = cosines.argmax(1)
            scores[:, place] = cosines.max(1)
            np.put_along_axis(cosines, rows[:, place, None], -np.inf, 1)
        found.append((scores, rows, ranks))
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))


def _cosine_blocks(queries: np.ndarray, database: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Which queries, and their cosines with the whole database in float64: (B, G)."""
    _check_embeddings("query embeddings", queries)
    _check_embeddings("database embeddings", database)
    expect(queries.shape[1] == database.shape[1], "query embeddings", f"width {database.shape[1]}, as the "
           "database has", queries.shape[1])
    unit = _unit_rows(database).T
    for i in range(0, len(queries), BLOCK):
        part = slice(i, i + BLOCK)
        yield part, _unit_rows(queries[part]) @ unit


def _check_embeddings(where: str, rows: np.ndarray) -> None:
    expect(rows.dtype.kind in "fiu", where, "real numbers", rows.dtype)
    expect(rows.ndim == 2 and rows.size > 0, where, "shape (rows, width), rows > 0", rows.shape)
    expect(np.isfinite(rows).all(), where, "finite values", "NaN or infinity")
    expect(np.abs(rows).max(1).min() > 0, where, "no row of zeros (it has no direction)", "one")


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    rows = rows / np.abs(rows).max(1, keepdims=True)  # else squares of extreme values overflow or vanish
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def retrieval_accuracy(queries: np.ndarray, database: np.ndarray, targets: np.ndarray) -> float:
    """Top-1 accuracy in percent: queries (Q, D), database (G, D), targets (Q,) rows of the database."""
    expect(len(targets) == len(queries), "targets", f"{len(queries)}, one a query", len(targets))
    return 100 * float((best_matches(queries, database) == np.asarray(targets)).mean())


def anomaly_metrics(image_truth: np.ndarray, image_scores: np.ndarray,
                    pixel_truth: np.ndarray | None, pixel_scores: np.ndarray | None) -> dict[str, float]:
    """The seven metrics of one category and their weighted mean `leaderboard_score`, all in [0, 1].

    image_truth, image_scores: (N,); pixel_truth, pixel_scores: (N, H, W) or (N, 1, H, W); truth 1 = defect,
    a higher score is more anomalous. A metric without a value counts as 0, as in the contest; AUPRO of constant maps
    too, where the contest's own code ends with an error.
    """
    measured = measured_metrics(image_truth, image_scores, pixel_truth, pixel_scores)
    values = {name: value or 0.0 for name, value in measured.items()}
    return values | {"leaderboard_score": weighted_score(values)}


def measured_metrics(image_truth: np.ndarray, image_scores: np.ndarray, pixel_truth: np.ndarray | None,
                     pixel_scores: np.ndarray | None) -> dict[str, float | None]:
    """The seven metrics in [0, 1]; None where one is undefined: a single label, no defect, constant maps.

    Without pixel arrays (both None) the four pixel metrics are None. Scores are ranked as they are: any finite numbers,
    not only those of [0, 1].
    """
    image_truth, image_scores = np.asarray(image_truth).astype(bool), np.asarray(image_scores)
    _check_scores("image scores", image_truth, image_scores)
    values: dict[str, float | None] = dict.fromkeys(IMAGE_METRICS + PIXEL_METRICS)
    if _two_sided(image_truth):
        values |= _ranking("image", image_truth, image_scores)
    expect((pixel_truth is None) == (pixel_scores is None), "pixel arrays", "truth and scores, or neither", "one")
    if pixel_truth is not None:
        pixel_truth, pixel_scores = _maps(pixel_truth).astype(bool, copy=False), _maps(pixel_scores)
        expect(len(pixel_truth) == len(image_truth), "pixel truth", f"{len(image_truth)} masks, one an image",
               len(pixel_truth))
        _check_scores("pixel scores", pixel_truth, pixel_scores)
        if _two_sided(pixel_truth):
            values |= _ranking("pixel", pixel_truth, pixel_scores)
            values["pixel_aupro"] = aupro(pixel_truth, pixel_scores)
    return values


def _two_sided(truth: np.ndarray) -> bool:
    return bool(truth.any() and not truth.all())


def _ranking(level: str, truth: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    auroc, average_precision, f1 = ranking(truth, scores)
    return {f"{level}_auroc": auroc, f"{level}_f1": f1, f"{level}_ap": average_precision}


def _maps(values: np.ndarray) -> np.ndarray:
    """(N, H, W) from (N, H, W) or (N, 1, H, W)."""
    values = np.asarray(values)
    expect(values.ndim == 3 or (values.ndim == 4 and values.shape[1] == 1), "pixel arrays",
           "shape (N, H, W) or (N, 1, H, W)", values.shape)
    return values.reshape(len(values), *values.shape[-2:])


def _check_scores(where: str, truth: np.ndarray, scores: np.ndarray) -> None:
    expect(truth.shape == scores.shape, where, f"shape {truth.shape}, as the truth", scores.shape)
    expect(scores.dtype.kind in "fiub", where, "real numbers", scores.dtype)
    bad = np.flatnonzero(~np.isfinite(scores).all(axis=tuple(range(1, scores.ndim))))
    expect(not len(bad), where, "finite values", f"NaN or infinity in images {bad[:5].tolist()} (from 0)")


def weighted_score(values: dict[str, float], names: tuple[str, ...] = IMAGE_METRICS + PIXEL_METRICS) -> float:
    """The mean of the metrics `names` with the contest's weights."""
    weights = rules("anomaly").weights
    return sum(weights[name] * values[name] for name in names) / sum(weights[name] for name in names)


def backdoored(ground_truth: np.ndarray) -> np.ndarray:
    """1 = backdoored, 0 = clean, from the contest's `ground_truth`, where 0 = backdoored and 1 = clean.

    The only place where the contest's label is turned around.
    """
    ground_truth = np.asarray(ground_truth)
    expect(np.isin(ground_truth, (0, 1)).all(), "ground_truth", "0 (backdoored) or 1 (clean)",
           np.setdiff1d(ground_truth, (0, 1)).tolist())
    return 1 - ground_truth


def detection_accuracy(predictions: np.ndarray, ground_truth: np.ndarray) -> float:
    """Accuracy in percent of predictions, 1 = backdoored, against the contest's labels, 0 = backdoored."""
    predictions = np.asarray(predictions)
    expect(predictions.shape == np.shape(ground_truth) and predictions.size, "predictions",
           f"shape {np.shape(ground_truth)}, not empty", predictions.shape)
    expect(np.isin(predictions, (0, 1)).all(), "predictions", "0 (clean) or 1 (backdoored)",
           np.setdiff1d(predictions, (0, 1)).tolist())
    return 100 * float((predictions == backdoored(ground_truth)).mean())
