"""Task 1 on the page: every query with its image, what was read in its text, its target and the five best."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError, expect
from data.retrieval_set import RetrievalSet, read_retrieval_set
from submit.report_parts.charts import Chart, line
from submit.report_parts.pictures import Album
from submit.report_parts.run_records import Run, data_folder, predictions_folder
from submit.scoring import ranked_matches
from submit.task_retrieval import SIDES, read_embeddings

TEMPLATE = "retrieval.html.jinja"
BEST = 5
ITEMS = 500   # queries shown, missed ones first
SIDE = 80     # pixels of a picture: seven stand beside each other


@dataclass(frozen=True)
class Shot:
    """One image of the database beside a query."""

    name: str
    picture: str | None
    similarity: float | None  # cosine
    right: bool


@dataclass(frozen=True)
class Query:
    row: int  # of the CSV file
    text: str
    added: tuple[str, ...] | None  # objects read in the text; None = not recorded
    removed: tuple[str, ...] | None
    picture: str | None
    target: Shot
    best: tuple[Shot, ...]  # most similar first
    rank: int | None  # of the target, from 1
    correct: bool


@dataclass(frozen=True)
class RetrievalSection:
    queries: tuple[Query, ...]  # missed ones first, each kind by its row
    missed: int
    left_out: int
    recall: tuple[tuple[int, float], ...]  # k, percent of the targets among the k best
    chart: Chart | None
    notes: tuple[str, ...]
    template: str = TEMPLATE


@dataclass(frozen=True)
class Found:
    """What a query found: names of images and cosines, best first, and the rank of its target, from 1."""

    best: tuple[tuple[str, float], ...]
    rank: int


def section(run: Run, result: Mapping[str, Any], limit: int) -> RetrievalSection:
    """What the page shows of one scored run, its pictures within `limit` bytes."""
    notes: list[str] = []
    album, parts = Album(limit, SIDE), result["parts"]
    data = _data(result, parts, notes)
    found = _recorded(parts) or _computed(run, result, data, notes)
    order = sorted(range(len(parts)), key=lambda i: (parts[i]["correct"], i))[:ITEMS]
    shown = _Pictures(data, album)
    queries = tuple(_query(parts[i], i, found[i] if found else None, shown) for i in order)
    ranks = np.array([one.rank for one in found]) if found else None
    return RetrievalSection(queries, sum(not part["correct"] for part in parts), len(parts) - len(order),
                            _recall(ranks), _chart(ranks), tuple(notes + album.notes()))


def _data(result: Mapping[str, Any], parts: list[dict], notes: list[str]) -> RetrievalSet | None:
    folder = data_folder(result, notes)
    if folder is None:
        return None
    try:
        found = read_retrieval_set(folder)
    except InputError as problem:
        notes.append(str(problem))
        return None
    same = [(part["row"], part["query"]) for part in parts] == list(
        zip(found.queries.index, found.queries["query_text"], strict=True))
    if not same:
        notes.append(f"{folder}: expected the {len(parts)} queries that were scored, found others; none are shown")
    return found if same else None


def _recorded(parts: list[dict]) -> list[Found] | None:
    """What `score --explain` left in the record, if it did."""
    if not all("rank" in part and "best" in part for part in parts):
        return None
    return [Found(tuple((best["image"], best["cosine"]) for best in part["best"]), int(part["rank"])) for part in parts]


def _computed(run: Run, result: Mapping[str, Any], data: RetrievalSet | None, notes: list[str]) -> list[Found] | None:
    """The same from the embeddings of the run."""
    folder = predictions_folder(run, result, notes)
    if folder is None or data is None:
        return None
    try:
        queries, database = (read_embeddings(folder, side) for side in SIDES)
        expect(len(queries) == len(data.queries) and len(database) == len(data.database), folder,
               f"{len(data.queries)} and {len(data.database)} embeddings", f"{len(queries)} and {len(database)}")
        cosines, best, ranks = ranked_matches(queries, database, np.array(data.targets), BEST)
    except InputError as problem:
        notes.append(str(problem))
        return None
    names = [Path(path).name for path in data.database["target_image"]]
    return [Found(tuple((names[at], float(cosine)) for at, cosine in zip(row, values, strict=True)), int(rank))
            for row, values, rank in zip(best, cosines, ranks, strict=True)]


class _Pictures:
    """Pictures of the queries and of the database by name; none without data."""

    def __init__(self, data: RetrievalSet | None, album: Album) -> None:
        self.album = album
        self.queries = [] if data is None else list(data.queries["query_image"])
        paths = [] if data is None else data.database["target_image"]
        self.database = {Path(path).name: path for path in paths}

    def of_query(self, i: int) -> str | None:
        return self.album.file(Path(self.queries[i])) if self.queries else None

    def named(self, name: str) -> str | None:
        return self.album.file(Path(self.database[name])) if name in self.database else None


def _query(part: Mapping[str, Any], i: int, found: Found | None, shown: _Pictures) -> Query:
    wanted, best = part["target"], found.best if found else ()
    if not found and not part["correct"]:
        best = ((part["found"], None),)
    picture, target = shown.of_query(i), Shot(wanted, shown.named(wanted), None, True)
    shots = tuple(Shot(name, shown.named(name), cosine, name == wanted) for name, cosine in best)
    return Query(part["row"], part["query"], _objects(part, "added"), _objects(part, "removed"), picture, target, shots,
                 found.rank if found else None, bool(part["correct"]))


def _objects(part: Mapping[str, Any], side: str) -> tuple[str, ...] | None:
    """What `score --explain` records of the text, if it did."""
    return tuple(str(name) for name in part[side]) if side in part else None


def _recall(ranks: np.ndarray | None) -> tuple[tuple[int, float], ...]:
    return () if ranks is None else tuple((k, 100 * float((ranks <= k).mean())) for k in (1, 5, 10, 50))


def _chart(ranks: np.ndarray | None) -> Chart | None:
    """Targets found among the k best, over k on a scale of powers."""
    last = 1 if ranks is None else int(ranks.max())
    if last < 2:
        return None
    ks = np.unique(np.geomspace(1, last, 60).round())
    return Chart("Target among the k best", "k, in equal ratios", "share of queries",
                 (line("targets found", np.log(ks) / np.log(last), [(ranks <= k).mean() for k in ks]),),
                 across_ends=("1", str(last)))
