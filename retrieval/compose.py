"""Embedding arithmetic: the query image plus what is asked for, minus what is to go.

v = q + sum t(added) - sum t(removed), all raw (their lengths are weights); then unit length. Nearest by cosine.
Departs from the reference solution: each distinct object is encoded once, all of them in batches.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from data.errors import expect

PROMPT = "a photo of a {}."


def compose(queries: Tensor, added: Sequence[Sequence[str]], removed: Sequence[Sequence[str]],
            encode_texts: Callable[[list[str]], Tensor]) -> Tensor:
    """Where the target of each query should lie: (Q, D), unit length.

    queries: (Q, D) raw image embeddings. added, removed: for each query the names of its objects, any number.
    encode_texts: prompts -> raw (N, D) on the queries' device; called once, with distinct prompts, if there are any.
    """
    for where, names in (("added", added), ("removed", removed)):
        expect(len(names) == len(queries), where, f"{len(queries)} tuples of names, one a query", len(names))
    signed = [(row, name, sign) for side, sign in ((added, 1.0), (removed, -1.0))
              for row, names in enumerate(side) for name in names]
    if not signed:
        return normalize(queries, dim=-1)
    distinct = {name: i for i, name in enumerate(dict.fromkeys(name for _, name, _ in signed))}
    texts = encode_texts([PROMPT.format(name) for name in distinct])
    rows = torch.tensor([row for row, _, _ in signed], device=queries.device)
    which = torch.tensor([distinct[name] for _, name, _ in signed], device=queries.device)
    signs = torch.tensor([sign for _, _, sign in signed], device=queries.device, dtype=queries.dtype)
    return normalize(queries.index_add(0, rows, texts[which] * signs[:, None]), dim=-1)
