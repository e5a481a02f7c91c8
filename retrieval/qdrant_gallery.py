"""The gallery in a collection of a Qdrant server, for galleries that outgrow one machine.

Only a server by its URL; the client's local mode is not for galleries. Needs `requirements-extras.txt`.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from data.errors import InputError, expect
from retrieval.gallery import blocks, checked_queries, checked_vectors, extra, unit_rows

UPLOAD_ROWS, QUERY_ROWS = 256, 64  # a request; servers refuse more than 32 MB
CPU = torch.device("cpu")


class QdrantGallery:
    """A collection whose point n is row n of the gallery. Among equal scores the lowest row comes first."""

    def __init__(self, url: str, collection: str, *, exact: bool = True, api_key: str | None = None,
                 timeout: int = 60) -> None:
        """url: of the server, with http:// or https://. exact: compare with every image, not by the server's graph.

        timeout: seconds for a request. Errors: the client is not installed; the server does not answer; it has no such
        collection, or one that does not compare cosines.
        """
        self.url, self.collection, self.exact = url, collection, exact
        self._client = _client(url, api_key, timeout)
        with _named(url, collection):
            self.rows = self._client.count(collection, exact=True).count
            vectors = self._client.get_collection(collection).config.params.vectors
        distance = getattr(vectors, "distance", None)
        expect(distance == "Cosine", f"{url} collection {collection}", "one vector a point, compared by cosine",
               distance or "several vectors a point")
        self.width = vectors.size

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `Gallery.search`, on the CPU. Where a search that is not exact finds fewer: row -1, score -inf."""
        checked_queries(queries, k, self.width)
        k = min(k, self.rows)
        scores = torch.full((len(queries), k), -torch.inf)
        rows = torch.full((len(queries), k), -1)
        for start in range(0, len(queries), QUERY_ROWS):
            part = unit_rows(queries[start:start + QUERY_ROWS].cpu(), "queries", start)
            for i, points in enumerate(self._asked(part.tolist(), k), start):
                best = sorted((-point.score, point.id) for point in points)
                scores[i, :len(best)] = torch.tensor([-score for score, _ in best])
                rows[i, :len(best)] = torch.tensor([row for _, row in best], dtype=torch.long)
        return scores, rows

    def _asked(self, queries: list[list[float]], k: int) -> list[list]:
        models = extra("qdrant_client.models", "qdrant-client")
        how = models.SearchParams(exact=self.exact)
        with _named(self.url, self.collection):
            found = self._client.query_batch_points(
                self.collection, [models.QueryRequest(query=query, limit=k, params=how) for query in queries])
        return [answer.points for answer in found]


def upload(url: str, collection: str, vectors: Tensor | np.ndarray, *, shards: int | None = None,
           on_disk: bool = False, api_key: str | None = None, timeout: int = 60) -> None:
    """Make a collection of the gallery, at unit length; an upload that was interrupted goes on where it stopped.

    shards: parts the server may spread over its machines. on_disk: vectors are not held in the server's memory.
    Errors: as `QdrantGallery` and `ExactGallery`; a collection of that name with other contents, which is left alone.
    """
    checked_vectors(vectors)
    models = extra("qdrant_client.models", "qdrant-client")
    client = _client(url, api_key, timeout)
    with _named(url, collection):
        if not client.collection_exists(collection):
            how = models.VectorParams(size=vectors.shape[1], distance=models.Distance.COSINE, on_disk=on_disk)
            client.create_collection(collection, vectors_config=how, shard_number=shards)
        done = _uploaded(client, url, collection, vectors)
        for start, block in blocks(vectors[done:], UPLOAD_ROWS, CPU):
            rows = unit_rows(block, "gallery", done + start)
            ids = list(range(done + start, done + start + len(rows)))
            client.upsert(collection, models.Batch(ids=ids, vectors=rows.tolist()), wait=True)


def _uploaded(client, url: str, collection: str, vectors: Tensor | np.ndarray) -> int:
    """How many of the first rows the collection holds already; other contents are refused by the last of them."""
    done = client.count(collection, exact=True).count
    if done == 0:
        return 0
    where = f"{url} collection {collection}"
    expect(done <= len(vectors), where, f"a new one, or the first of {len(vectors)} rows", f"{done} points")
    held = client.retrieve(collection, [done - 1], with_vectors=True)
    own = unit_rows(next(blocks(vectors[done - 1:done], 1, CPU))[1], "gallery", done - 1)[0]
    same = held and len(held[0].vector) == len(own) and np.allclose(held[0].vector, own.numpy(), atol=1e-5)
    expect(same, where, "a new one, or an unfinished upload of this gallery", f"another point {done - 1}")
    return done


def _client(url: str, api_key: str | None, timeout: int):
    expect(url.startswith(("http://", "https://")), "Qdrant server", "a URL with http:// or https://", url)
    return extra("qdrant_client", "qdrant-client").QdrantClient(
        url=url, api_key=api_key, timeout=timeout, check_compatibility=False)


@contextmanager
def _named(url: str, collection: str) -> Iterator[None]:
    """What the client raises, as one line that names the server."""
    errors = extra("qdrant_client.http.exceptions", "qdrant-client")
    try:
        yield
    except errors.ResponseHandlingException as error:
        raise InputError(f"{url}: expected a Qdrant server that answers, found {error.source}") from None
    except errors.UnexpectedResponse as error:
        reason = f"status {error.status_code} {error.reason_phrase}"
        raise InputError(f"{url} collection {collection}: expected it to be there and allowed, found {reason}"
                         ) from None
