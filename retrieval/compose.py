"""Composition: where the target of a request should lie, given its query image and the names of its objects.

Published (`PUBLISHED`): v = q + sum t(added) - sum t(removed), all raw (their lengths are weights); then unit length,
nearest by cosine. It departs from the reference solution in one thing, which changes no result: each distinct object
is encoded once, all of them in batches. Every other setting of `ComposerConfig` changes one step of this:

prompts          t is a mean over several templates
unit             q and t at unit length before they are weighed (SIMAT, arXiv:2112.03162)
add_weight, remove_weight   v = q + a sum t(added) - r sum t(removed)
centre_texts     the mean text is taken from every t: unequal numbers of added and removed objects then no longer
                 move v along the gap between the modalities (arXiv:2203.02053)
centre_images    the mean image is taken from q and from the gallery
project          removed objects are projected out instead of subtracted: v = q - r P (q - mean image) + ..., P on the
                 span of the centred t(removed); an object that is not in the picture takes nothing away
hub_sharpness    images near many requests of a bank are pushed back (retrieval.hubness)
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from data.errors import expect
from retrieval.hubness import bank_bias, biased_gallery, biased_queries
from retrieval.prompts import PROMPT, EncodeTexts, object_embeddings

Names = Sequence[Sequence[str]]  # of each query its objects, any number


@dataclass(frozen=True)
class ComposerConfig:
    """One way of composing; the defaults are the published arithmetic."""
    prompts: tuple[str, ...] = (PROMPT,)  # each with one {} for the name
    unit: bool = False
    add_weight: float = 1.0
    remove_weight: float = 1.0
    centre_texts: bool = False
    centre_images: bool = False
    project: bool = False
    hub_sharpness: float | None = None    # s, about 5 to 100; None: no correction

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))  # a list, as JSON gives it, would not hash
        expect(self.prompts and all(p.count("{}") == 1 for p in self.prompts), "ComposerConfig.prompts",
               "templates with one {} each", self.prompts)
        for name in ("add_weight", "remove_weight"):
            expect(0 <= getattr(self, name) < float("inf"), f"ComposerConfig.{name}", "a finite number >= 0",
                   getattr(self, name))
        expect(self.hub_sharpness is None or 0 < self.hub_sharpness < float("inf"), "ComposerConfig.hub_sharpness",
               "a finite number > 0, or None", self.hub_sharpness)


PUBLISHED = ComposerConfig()


@dataclass(frozen=True)
class Statistics:
    """What a config needs to know of training data, in the form the config weighs (raw, or unit length)."""
    text_mean: Tensor | None = None   # (D,) of many objects' embeddings
    image_mean: Tensor | None = None  # (D,)
    bank: Tensor | None = None        # (U, D) composed training requests, unit length

    def need(self, name: str, why: str) -> Tensor:
        value = getattr(self, name)
        expect(value is not None, f"statistics of the composer, {why}", f"a {name} from training data", "none")
        return value


NO_STATISTICS = Statistics()


def compose(queries: Tensor, added: Names, removed: Names, encode_texts: EncodeTexts,
            config: ComposerConfig = PUBLISHED, statistics: Statistics = NO_STATISTICS) -> Tensor:
    """Where the target of each query should lie, to be compared with `gallery_vectors`: unit rows (Q, D or D + 2).

    queries: (Q, D) raw image embeddings. added, removed: for each query the names of its objects, any number.
    encode_texts: prompts -> raw (N, D) on the queries' device; called once, with distinct prompts, if there are any.
    """
    composed = composed_vectors(queries, added, removed, encode_texts, config, statistics)
    return composed if config.hub_sharpness is None else biased_queries(composed)


def gallery_vectors(images: Tensor, config: ComposerConfig = PUBLISHED, statistics: Statistics = NO_STATISTICS
                    ) -> Tensor:
    """Raw image embeddings (G, D) as unit rows (G, D or D + 2), to be compared with composed queries by cosine."""
    placed = normalize(_centred_images(_form(images, config), config, statistics), dim=-1)
    if config.hub_sharpness is None:
        return placed
    return biased_gallery(placed, bank_bias(placed, statistics.need("bank", "hub_sharpness"), config.hub_sharpness))


def composed_vectors(queries: Tensor, added: Names, removed: Names, encode_texts: EncodeTexts,
                     config: ComposerConfig, statistics: Statistics) -> Tensor:
    """`compose` without the correction for hubs: unit rows (Q, D)."""
    for where, names in (("added", added), ("removed", removed)):
        expect(len(names) == len(queries), where, f"{len(queries)} tuples of names, one a query", len(names))
    composed = _centred_images(_form(queries, config), config, statistics)
    distinct = list(dict.fromkeys(name for side in (added, removed) for names in side for name in names))
    if distinct:
        texts = _form(object_embeddings(distinct, encode_texts, config.prompts), config)
        row = {name: i for i, name in enumerate(distinct)}
        takes = _projected if config.project else _subtracted
        composed = (composed + config.add_weight * side_sums(_centred_texts(texts, config, statistics), added, row)
                    - config.remove_weight * takes(queries, texts, removed, row, config, statistics))
    return normalize(composed, dim=-1)


def _subtracted(queries: Tensor, texts: Tensor, removed: Names, row: dict[str, int], config: ComposerConfig,
                statistics: Statistics) -> Tensor:
    return side_sums(_centred_texts(texts, config, statistics), removed, row)


def _projected(queries: Tensor, texts: Tensor, removed: Names, row: dict[str, int], config: ComposerConfig,
               statistics: Statistics) -> Tensor:
    directions = texts - statistics.need("text_mean", "project")  # with the mean in it, all objects span much the same
    return onto_span(_form(queries, config) - statistics.need("image_mean", "project"),
                     stacked(directions, removed, row))


def side_sums(texts: Tensor, side: Names, row: dict[str, int]) -> Tensor:
    """Sum of the embeddings (N, D) of each query's names, as often as they are named: (Q, D)."""
    named = [(query, row[name]) for query, names in enumerate(side) for name in names]
    queries, which = torch.tensor(named, dtype=torch.long, device=texts.device).reshape(-1, 2).unbind(1)
    return texts.new_zeros(len(side), texts.shape[1]).index_add(0, queries, texts[which])


def stacked(texts: Tensor, side: Names, row: dict[str, int]) -> Tensor:
    """The embeddings of each query's names below each other, zeros after the last: (Q, most names, D)."""
    most = max((len(names) for names in side), default=0)
    which = torch.tensor([[row[name] for name in names] + [len(texts)] * (most - len(names)) for names in side],
                         dtype=torch.long, device=texts.device).reshape(len(side), most)
    return torch.cat([texts, texts.new_zeros(1, texts.shape[1])])[which]


def onto_span(vectors: Tensor, spans: Tensor) -> Tensor:
    """Orthogonal projection of each vector (Q, D) on the span of its rows (Q, n, D); rows of zeros span nothing."""
    if not spans.numel():
        return torch.zeros_like(vectors)
    back = torch.linalg.pinv(spans, rtol=1e-3)  # names that mean the same span one direction, not a random second one
    return (back @ (spans @ vectors[..., None]))[..., 0]


def _form(rows: Tensor, config: ComposerConfig) -> Tensor:
    return normalize(rows, dim=-1) if config.unit else rows


def _centred_texts(texts: Tensor, config: ComposerConfig, statistics: Statistics) -> Tensor:
    return texts - statistics.need("text_mean", "centre_texts") if config.centre_texts else texts


def _centred_images(images: Tensor, config: ComposerConfig, statistics: Statistics) -> Tensor:
    return images - statistics.need("image_mean", "centre_images") if config.centre_images else images


def fit_statistics(config: ComposerConfig, images: Tensor, names: Sequence[str], added: Names, removed: Names,
                   encode_texts: EncodeTexts) -> Statistics:
    """What `config` needs, from training data alone.

    images (Q, D): raw embeddings of training queries, with the names they add and remove; names: objects whose mean
    embedding is the centre of the texts.
    """
    text_mean = _form(object_embeddings(list(names), encode_texts, config.prompts), config).mean(0)
    means = Statistics(text_mean, _form(images, config).mean(0))
    if config.hub_sharpness is None:
        return means
    bank = composed_vectors(images, added, removed, encode_texts, config, means)
    return Statistics(means.text_mean, means.image_mean, bank)
