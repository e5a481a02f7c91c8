"""The gallery in a FAISS index: in memory, with approximate kinds where exact search takes too long.

Paper: Johnson et al., Billion-scale similarity search with GPUs, arXiv:1702.08734. Needs `requirements-extras.txt`.
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from retrieval.gallery import MAX_BYTES, blocks, checked_queries, checked_vectors, extra, unit_rows

SAMPLE_ROWS = 100_000  # of the gallery, evenly spaced, for kinds of index that are trained
CPU = torch.device("cpu")


class FaissGallery:
    """An inner-product index of unit rows. Equal images come in any order."""

    def __init__(self, vectors: Tensor | np.ndarray, *, kind: str = "Flat", probes: int | None = None) -> None:
        """vectors: (G, D) as `ExactGallery` takes them; they are copied into the index.

        kind: in the words of FAISS's index factory; "Flat" compares with every image, "IVF4096,Flat" only with the
        `probes` groups of images nearest to the query. Errors: as `ExactGallery`; FAISS is not installed.
        """
        checked_vectors(vectors)
        faiss = extra("faiss", "faiss-cpu")
        self.width = vectors.shape[1]
        self.index = faiss.index_factory(self.width, kind, faiss.METRIC_INNER_PRODUCT)
        if probes is not None:
            faiss.ParameterSpace().set_index_parameter(self.index, "nprobe", probes)
        if not self.index.is_trained:
            sample = vectors[::-(-len(vectors) // SAMPLE_ROWS)]
            self.index.train(np.concatenate([rows for _, rows in _unit_blocks(sample)]))
        for _, rows in _unit_blocks(vectors):
            self.index.add(rows)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `Gallery.search`, on the CPU. Where an approximate kind finds fewer than k: row -1, score -inf."""
        checked_queries(queries, k, self.width)
        k = min(k, self.index.ntotal)
        scores, rows = self.index.search(unit_rows(queries.cpu(), "queries").numpy(), k)
        scores, rows = torch.from_numpy(scores), torch.from_numpy(rows)
        return scores.masked_fill(rows < 0, -torch.inf), rows


def _unit_blocks(vectors: Tensor | np.ndarray):
    size = max(1, MAX_BYTES // (16 * vectors.shape[1]))
    for start, block in blocks(vectors, size, CPU):
        yield start, unit_rows(block, "gallery", start).numpy()
