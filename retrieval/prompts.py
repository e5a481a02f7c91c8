"""Names of objects to text embeddings: prompt templates, their mean, and a memory of what was encoded before."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from data.errors import expect

EncodeTexts = Callable[[list[str]], Tensor]

PROMPT = "a photo of a {}."
ENSEMBLE = (PROMPT, "a photo of the {}.", "a photo of {}.", "a 3d render of a {}.", "a close-up photo of a {}.",
            "a small {} on a grey ground.", "an image with a {}.")


def object_embeddings(names: Sequence[str], encode_texts: EncodeTexts, templates: Sequence[str] = (PROMPT,)) -> Tensor:
    """One embedding a name: (N, D). encode_texts: prompts -> raw (P, D); called once, if there are names.

    Mean of the unit embeddings of all templates, at the mean of their raw lengths, so that the raw scale stays; with
    one template its raw embedding itself.
    """
    prompts = [template.format(name) for template in templates for name in names]
    if len(templates) == 1 or not names:
        return encode_texts(prompts)
    raw = encode_texts(prompts).unflatten(0, (len(templates), len(names)))   # (templates, N, D)
    direction = normalize(normalize(raw, dim=-1).mean(0), dim=-1)
    return direction * raw.norm(dim=-1).mean(0)[:, None]


class TextCache:
    """A text encoder that remembers: each prompt is encoded once, all new ones of a call together.

    It belongs to one encoder and to its weights as they are; another encoder needs a cache of its own. The `limit`
    prompts asked for last are kept, on the encoder's device.
    """

    def __init__(self, encode_texts: EncodeTexts, *, limit: int = 20_000) -> None:
        expect(limit >= 0, "TextCache.limit", ">= 0", limit)
        self._encode, self._limit = encode_texts, limit
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Raw text embeddings (N, D), as the encoder gives them."""
        if not prompts:
            return self._encode([])
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        if new:
            rows = self._encode(new)
            self._rows.update(zip(new, (row.clone() for row in rows), strict=True))  # a view would keep its whole batch
        found = torch.stack([self._rows[prompt] for prompt in prompts])
        for prompt in prompts:
            self._rows.move_to_end(prompt)
        while len(self._rows) > self._limit:
            self._rows.popitem(last=False)
        return found
