"""Which images of a gallery lie nearest: one small interface, and exact search in blocks behind it.

The interface is `search(queries, k) -> (scores, rows)`; `retrieval.faiss_gallery` and `retrieval.qdrant_gallery` have
it too. Exact search finds candidates block by block, in float32 or, where that is faster, in bfloat16, and scores only
those in float64. What each product can be wrong by is allowed for, so the answer is the same for every precision, size
of block, order of sums and number of threads.
"""
from __future__ import annotations

import mmap
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.devices import half_is_faster
from data.errors import InputError, expect

MAX_BYTES = 2**28  # of one block and what is computed from it
QUERY_BLOCK = 256  # queries compared with a block at a time
MANY = 8  # times k candidates of a block: then images lie too close together for bfloat16, or are equal


class Gallery(Protocol):
    """Images as vectors of any length, in rows numbered from 0."""

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k images of highest cosine for each query, best first; all of them if there are fewer.

        queries: (Q, D), any length. Returns cosines (Q, k) float32 and rows of the gallery (Q, k) int64.
        """


class ExactGallery:
    """Compares with every image. Among equal scores the lowest row comes first.

    A score is the cosine in float64, rounded to float32, of the vectors as they are given; a vector of zeros has
    cosine 0 with everything.
    """

    def __init__(self, vectors: Tensor | np.ndarray, *, max_bytes: int = MAX_BYTES) -> None:
        """vectors: (G, D) floating-point, on any device or in a NumPy memory map, which is read block by block.

        max_bytes: bounds the memory of a search beside its queries and its answer. Errors: another shape or kind of
        numbers, no rows; and, in a search, a row that is not finite (numbered).
        """
        checked_vectors(vectors)
        self.vectors = vectors
        self.max_bytes = max_bytes

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `Gallery.search`; on the device of the queries. The gallery is read once, whatever Q is."""
        checked_queries(queries, k, self.vectors.shape[1])
        k = min(k, len(self.vectors))
        directions = unit_rows(queries, "queries")
        scores = directions.new_full((len(queries), k), -torch.inf)
        rows = torch.full_like(scores, -1, dtype=torch.long)
        coarse = queries.device.type == "cpu" and half_is_faster(queries.device)
        for start, block in blocks(self.vectors, self._block_rows(len(queries)), queries.device):
            unit, leading = unit_rows(block, "gallery", start), None
            for i in range(0, len(queries), QUERY_BLOCK):
                part = slice(i, i + QUERY_BLOCK)
                found = _candidates(directions[part], unit, scores[part, -1], k, coarse)
                if coarse and len(found[0]) > MANY * k * len(queries[part]):
                    coarse = False
                    found = _candidates(directions[part], unit, scores[part, -1], k, coarse)
                if len(found[0]) > MANY * k * len(queries[part]):
                    if leading is None:
                        leading = _first_twins(block, k)
                    found = tuple(pairs[leading[found[1]]] for pairs in found)
                exact = self._exact(queries[part], block, *found)
                scores[part], rows[part] = _merged(scores[part], rows[part], found[0], exact, found[1] + start)
        return scores, rows

    def _block_rows(self, queries: int) -> int:
        """Rows of a block: half the memory is for it, its float32 copies, cosines and mask; half for exact scores."""
        row_bytes = 16 * self.vectors.shape[1] + 12 * min(queries, QUERY_BLOCK)
        return max(1, self.max_bytes // (2 * row_bytes))

    def _exact(self, queries: Tensor, block: Tensor, query: Tensor, row: Tensor) -> Tensor:
        """Cosines of the pairs (query[i], row[i]), a few at a time: (C,) float32."""
        pairs = max(1, self.max_bytes // (2 * 32 * block.shape[1]))
        return torch.cat([_cosines(queries[q].double(), block[g].double())
                          for q, g in zip(query.split(pairs), row.split(pairs), strict=True)])


def nearest(queries: Tensor, vectors: Tensor) -> Tensor:
    """Row of the highest cosine for each query: (Q,) int64; among equals the lowest. queries (Q, D), vectors (G, D)."""
    return ExactGallery(vectors).search(queries, 1)[1][:, 0]


def checked_vectors(vectors: Tensor | np.ndarray) -> None:
    """Refuse what is not (G, D) of real numbers that torch can hold, or has no rows."""
    expect(vectors.ndim == 2 and min(vectors.shape) > 0, "gallery", "at least one image, shape (G, D)",
           tuple(vectors.shape))
    floating = (vectors.is_floating_point() if isinstance(vectors, Tensor)
                else vectors.dtype.kind == "f" and vectors.dtype.itemsize <= 8)
    expect(floating, "gallery", "floating-point numbers of 16 to 64 bits", vectors.dtype)


def checked_queries(queries: Tensor, k: int, width: int) -> None:
    """Refuse queries that do not fit a gallery of `width`, and a k below 1."""
    expect(queries.ndim == 2 and queries.shape[1] == width, "queries", f"shape (Q, {width}), as the gallery has",
           tuple(queries.shape))
    expect(queries.is_floating_point(), "queries", "floating-point numbers", queries.dtype)
    expect(k >= 1, "k", ">= 1", k)


def unit_rows(rows: Tensor, where: str, start: int = 0) -> Tensor:
    """A copy at unit length, float32; zeros stay zeros. A row that is not finite is named by its number from `start`.

    Lengths whose squares would leave float32 are taken in float64 (which for all rows would be the slowest step).
    """
    unit = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32, copy=True)
    length = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
    unusual = ~((length > 1e-15) & (length < 1e15))[:, 0]  # among them NaN
    if unusual.any():
        exact = torch.linalg.vector_norm(unit[unusual].double(), dim=1, keepdim=True)
        broken = unusual.nonzero()[~exact.isfinite()]
        expect(len(broken) == 0, f"{where} row {start + int(broken[0]) if len(broken) else 0}", "finite numbers",
               "NaN or infinity")
        unit[unusual] = (unit[unusual].double() / torch.where(exact > 0, exact, 1)).to(unit.dtype)
        length[unusual] = 1
    return unit.div_(length).float()


def blocks(vectors: Tensor | np.ndarray, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(first row, up to `size` rows on the device) through the whole gallery.

    Of a memory map the system is asked to read ahead, and to take back what was read: else its pages would count as
    memory of this process until the whole file is in it.
    """
    for start in range(0, len(vectors), size):
        rows = vectors[start:start + size]
        if isinstance(rows, np.ndarray):
            _advise(vectors[start + size:start + 2 * size], "MADV_WILLNEED")
            block = torch.from_numpy(np.array(rows, dtype=rows.dtype.newbyteorder("="), order="C"))
            _advise(vectors[:start + size], "MADV_DONTNEED")  # reading a page also brings in some before it
            rows = block
        yield start, rows.to(device)


def extra(module: str, package: str) -> ModuleType:
    """An optional module; where its package is not installed, the error says how to install it."""
    try:
        return import_module(module)
    except ImportError:
        raise InputError(f"{package}: expected to be installed (pip install -r requirements-extras.txt), found no such "
                         "package") from None


def _advise(rows: np.ndarray, advice: str) -> None:
    """Advise the system about the part of a memory map that `rows` shows. Nothing happens for other arrays."""
    owner = rows
    while isinstance(owner, np.ndarray):
        if isinstance(owner, np.memmap) and owner.mode == "c":  # its changes live in memory alone: keep them there
            return
        owner = owner.base
    if isinstance(owner, mmap.mmap) and rows.size and rows.flags.c_contiguous and hasattr(mmap, advice):
        first = rows.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
        page = first // mmap.PAGESIZE * mmap.PAGESIZE
        owner.madvise(getattr(mmap, advice), page, first + rows.nbytes - page)


def _candidates(queries: Tensor, block: Tensor, worst: Tensor, k: int, coarse: bool) -> tuple[Tensor, Tensor]:
    """Pairs (query, row of the block) that may be among the k best: (C,), (C,), ordered by query, then row.

    queries (q, D), block (B, D): unit rows. worst: (q,), the k-th best score so far. coarse: compare in bfloat16.
    """
    kind = torch.bfloat16 if coarse else torch.float32
    cosines = (queries.to(kind) @ block.to(kind).T).float()  # (q, B)
    slack = _slack(block.shape[1], coarse)
    hopeful = (cosines.amax(1) >= worst - slack).nonzero()[:, 0]  # most blocks hold nothing new for most queries
    cosines, floor = cosines[hopeful], worst[hopeful]
    if k <= cosines.shape[1]:
        floor = torch.maximum(floor, cosines.topk(k).values[:, -1])
    query, row = (cosines >= (floor - slack)[:, None]).nonzero(as_tuple=True)
    return hopeful[query], row


def _first_twins(block: Tensor, k: int) -> Tensor:
    """(B,) bool: the first k rows of those that are equal bit by bit. The others come after them for every query."""
    rows = block.contiguous().view(torch.uint8).cpu().numpy()
    _, kinds = np.unique(rows.view(np.dtype((np.void, rows.shape[1])))[:, 0], return_inverse=True)
    order = np.argsort(kinds, kind="stable")
    sorted_kinds = kinds[order]
    first = np.empty(len(rows), dtype=bool)
    first[order] = np.arange(len(rows)) - np.searchsorted(sorted_kinds, sorted_kinds) < k
    return torch.from_numpy(first).to(block.device)


def _slack(width: int, coarse: bool) -> float:
    """At least twice what a product of unit vectors of this width can be wrong by, in any order of its sums.

    In bfloat16 both factors and the result are rounded by up to 2^-9 of their value; sums are float32.
    """
    rounded = coarse or torch.get_float32_matmul_precision() != "highest"  # then float32 may be as coarse
    return (width + 2) * 2**-22 + (6.5 * 2**-9 if rounded else 0)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, (C, D) float64 each -> (C,) float32; 0 where one is zero."""
    lengths = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return ((a * b).sum(1) / torch.where(lengths > 0, lengths, 1)).float()


def _merged(scores: Tensor, rows: Tensor, query: Tensor, new_scores: Tensor, new_rows: Tensor
            ) -> tuple[Tensor, Tensor]:
    """The k best of what was held, (q, k) in order, and of what is new, (C,) by query and row: (q, k), (q, k).

    New rows come after all held ones in the gallery, so stable sorting alone puts the lowest of equals first.
    """
    n, k = scores.shape
    query = torch.cat([torch.arange(n, device=query.device).repeat_interleave(k), query])
    scores, rows = torch.cat([scores.flatten(), new_scores]), torch.cat([rows.flatten(), new_rows])
    order = scores.argsort(descending=True, stable=True)
    order = order[query[order].argsort(stable=True)]
    query = query[order]
    rank = torch.arange(len(query), device=query.device) - torch.searchsorted(query, query)
    kept = order[rank < k]
    return scores[kept].view(n, k), rows[kept].view(n, k)
