"""Prompts to token ids: open_clip's byte-pair tokenizer, with a cut table for small models.

A small model keeps the 512 byte pieces and the few pieces its training prompts use; any other piece is spelled
by its bytes, so every name can be encoded. The last two ids are start and end: open_clip reads the
text embedding where the highest id stands.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from data.errors import expect

BYTE_PIECES = 512  # the first ids of the BPE table: each byte inside a word, then each byte at its end
_WORD_END = "</w>"


@lru_cache(maxsize=1)
def _full_table() -> SimpleTokenizer:
    return SimpleTokenizer()  # reading the table takes most of a second


class Vocabulary:
    """kept: ids of the full table that have an id of their own here, in order; None keeps all of it."""

    def __init__(self, kept: Sequence[int] | None, *, context_length: int) -> None:
        self.bpe = _full_table()
        ends = [self.bpe.sot_token_id, self.bpe.eot_token_id]
        self.kept = list(range(len(self.bpe.encoder))) if kept is None else list(kept)
        expect(self.kept[-2:] == ends and self.kept[:BYTE_PIECES] == list(range(BYTE_PIECES)), "vocabulary",
               "the byte pieces first, start and end last", f"{self.kept[:2]} ... {self.kept[-2:]}")
        self.id_of = {full: here for here, full in enumerate(self.kept)}
        self.context_length = context_length

    def __len__(self) -> int:
        return len(self.kept)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """(N, context_length) int64: start, pieces, end, zeros; a long text loses its last pieces."""
        rows = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            pieces = [here for full in self.bpe.encode(text) for here in self._ids(full)]
            ids = [len(self) - 2, *pieces[:self.context_length - 2], len(self) - 1]
            row[:len(ids)] = torch.tensor(ids)
        return rows

    def _ids(self, full: int) -> list[int]:
        if full in self.id_of:
            return [self.id_of[full]]
        piece = self.bpe.decoder[full]
        letters = list(piece.removesuffix(_WORD_END))
        if piece.endswith(_WORD_END):
            letters[-1] += _WORD_END
        return [self.bpe.encoder[letter] for letter in letters]  # byte pieces keep their ids


def pieces_used(texts: Iterable[str]) -> list[int]:
    """The `kept` list for a model trained on `texts`."""
    bpe = _full_table()
    used = {full for text in texts for full in bpe.encode(text)}
    return [*range(BYTE_PIECES), *sorted(used - set(range(BYTE_PIECES))), bpe.sot_token_id, bpe.eot_token_id]
