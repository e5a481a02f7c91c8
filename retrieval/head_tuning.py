"""Fine-tuning of the image head alone: the trunk and all texts stay as they are.

v = W f(query) + sum t(added) - sum t(removed) must find W f(target) among the targets of its batch, and the other way
round; f are features of the frozen trunk, so an epoch is a few matrix products (retrieval.trunk_features). The
arithmetic is the one that will be used: a `ComposerConfig` may ask for unit lengths and weights (`Pairs.unit`).
Recipe: the reference solution's. Departs from it: the trunk runs in eval mode (there its stochastic depth stays on);
no target stands twice in a batch, also not across passes; images of a held-out row are in no training row.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn.functional import normalize

from data.errors import expect
from retrieval.compose import PUBLISHED, ComposerConfig, Names, side_sums
from retrieval.gallery import nearest
from retrieval.info_nce import both_ways
from retrieval.prompts import EncodeTexts, object_embeddings

Features = Callable[[Tensor], Tensor]  # numbers of images (B,) -> their features (B, F) on the device of the head


@dataclass(frozen=True)
class HeadConfig:
    epochs: int = 5
    batch: int = 256             # most rows of a batch
    rate: float = 1e-4           # AdamW, cosine with warm restarts, stepped once an epoch
    weight_decay: float = 0.01
    restart: int = 5             # epochs to the first restart; then twice as many each time
    temperature: float = 0.07
    clip: float = 1.0            # largest gradient norm

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "restart"):
            expect(getattr(self, name) >= 1, f"HeadConfig.{name}", ">= 1", getattr(self, name))
        for name in ("rate", "temperature", "clip"):
            expect(getattr(self, name) > 0, f"HeadConfig.{name}", "> 0", getattr(self, name))
        expect(self.weight_decay >= 0, "HeadConfig.weight_decay", ">= 0", self.weight_decay)


@dataclass(frozen=True)
class Pairs:
    """Rows of a training set: image numbers (N,) int64 and what the words change (N, D)."""
    query: Tensor
    target: Tensor
    change: Tensor
    unit: bool = False  # the query image is brought to unit length before the change is added

    def __len__(self) -> int:
        return len(self.query)

    def __getitem__(self, rows: Tensor) -> Pairs:
        return Pairs(self.query[rows], self.target[rows], self.change[rows], self.unit)


@dataclass(frozen=True)
class Epoch:
    """What one epoch left: the loss of each step, the rate, and the head (D, F)."""
    number: int
    rate: float
    losses: tuple[float, ...]
    weight: Tensor


def changes(added: Names, removed: Names, encode_texts: EncodeTexts, composer: ComposerConfig = PUBLISHED) -> Tensor:
    """What the words of each row add to its query image: (N, D). `composer`: prompts, unit lengths and weights only."""
    plain = replace(composer, prompts=PUBLISHED.prompts, unit=False, add_weight=1.0, remove_weight=1.0)
    expect(plain == PUBLISHED, "composer", "prompts, unit and weights alone (the rest depends on the head)", composer)
    distinct = list(dict.fromkeys(name for side in (added, removed) for names in side for name in names))
    row = {name: i for i, name in enumerate(distinct)}
    texts = object_embeddings(distinct, encode_texts, composer.prompts)
    texts = normalize(texts, dim=-1) if composer.unit else texts
    return (composer.add_weight * side_sums(texts, added, row)
            - composer.remove_weight * side_sums(texts, removed, row))


def tune_head(weight: Tensor, features: Features, pairs: Pairs, config: HeadConfig, *, generator: torch.Generator
              ) -> Iterator[Epoch]:
    """Train a head that starts as `weight` (D, F), one `Epoch` after the other; `weight` itself stays.

    Everything runs where `weight` lies; `pairs` may lie on the CPU. generator: on the CPU; decides the batches.
    """
    expect(len(pairs) >= 2, "pairs", "at least two rows", len(pairs))
    head = weight.detach().clone().float().requires_grad_()
    optimiser = torch.optim.AdamW([head], lr=config.rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimiser, config.restart, T_mult=2)
    for number in range(1, config.epochs + 1):
        rate, losses = optimiser.param_groups[0]["lr"], []
        for rows in unique_target_batches(pairs.target, config.batch, generator=generator):
            loss = pair_loss(head, features, pairs[rows], config.temperature)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([head], config.clip)
            optimiser.step()
            losses.append(loss.detach())
        schedule.step()
        yield Epoch(number, rate, tuple(torch.stack(losses).tolist()), head.detach().clone())


def pair_loss(head: Tensor, features: Features, pairs: Pairs, temperature: float) -> Tensor:
    """InfoNCE of composed queries and targets under a head (D, F), mean of both directions."""
    return both_ways(_composed(head, features, pairs), features(pairs.target) @ head.T, 1 / temperature)


def _composed(head: Tensor, features: Features, pairs: Pairs) -> Tensor:
    images = features(pairs.query) @ head.T
    return (normalize(images, dim=-1) if pairs.unit else images) + pairs.change.to(head.device)


def unique_target_batches(targets: Tensor, size: int, *, generator: torch.Generator) -> list[Tensor]:
    """Every row once, in batches of at most `size` rows and of about the same size; no target twice in a batch.

    targets: (N,) int64. As few batches as that allows: with one target in many rows they get smaller. Rows of one
    target stand together in a random order and are dealt out in turn, so they all fall into different batches.
    """
    if not len(targets):
        return []
    shuffled = torch.randperm(len(targets), generator=generator)
    which, counts = targets[shuffled].unique(return_inverse=True, return_counts=True)[1:]
    order = shuffled[torch.randperm(len(counts), generator=generator)[which].argsort(stable=True)]
    batches = max(-(-len(targets) // size), int(counts.max()))
    return [order[i::batches] for i in torch.randperm(batches, generator=generator).tolist()]


def held_out_rows(query: Tensor, target: Tensor, share: float, *, generator: torch.Generator) -> Tensor:
    """Which rows (N,) bool are held out: at most `share` of them, but some; no image stands on both sides.

    Rows that share an image, directly or through others, stay together (images of one base scene). Errors: no rows,
    or all of them hang together.
    """
    expect(0 < share < 1, "share", "in (0, 1)", share)
    expect(len(query) > 0, "pairs", "at least one row", "none")
    images = int(torch.cat([query, target]).max()) + 1
    links = coo_matrix((np.ones(len(query)), (query.numpy(), target.numpy())), (images, images))
    of_image = torch.from_numpy(connected_components(links, directed=False)[1]).long()
    groups, of_row = of_image[query].unique(return_inverse=True)
    expect(len(groups) >= 2, "pairs", "rows in two groups or more that share no image", "one group")
    sizes, room, held = of_row.bincount().tolist(), share * len(query), []
    for group in torch.randperm(len(groups), generator=generator).tolist():
        if sizes[group] <= room:
            held.append(group)
            room -= sizes[group]
    return torch.isin(of_row, torch.tensor(held or [min(range(len(sizes)), key=sizes.__getitem__)]))


def top1(weight: Tensor, features: Features, pairs: Pairs) -> float:
    """Share in [0, 1] of the rows whose composed query is nearest to their target among all targets of the rows."""
    gallery, truth = pairs.target.unique(return_inverse=True)
    found = nearest(_composed(weight, features, pairs), features(gallery) @ weight.T)
    return (found.cpu() == truth).double().mean().item()
