"""Defects that many images share: which images must not judge which patches.

Paper: CoDeGraph (arXiv:2510.10456). A defect that a third of the images have is invisible to mutual scoring, as its
nearest images have it too. Sorted over the images, the distances of a normal patch grow smoothly; those of a shared
defect jump once its siblings are used up. Patches that jump link their image to the ones before the jump; images that
are linked to each other, and to few others, form a community, and do not judge each other's defect.
Departs from it: a jump is measured against the mean growth of the set; patches are joined if the images before their
jumps are nearly the same, and communities are connected components of that (in place of Leiden on a graph of images);
what a patch owes to its community is compared with what patches of the other images owe to it. No labels are used.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from data.errors import expect

GROWTH = 8.0  # times its usual size: log growth of the distance times its rank, which is alike at every rank
JUMP = math.log(1.14)  # least growth in itself; this and GROWTH chosen on generated sets with and without a defect
RARE = 0.95  # share of all patches that score lower than a shared defect would, were its siblings away
ALIKE = 0.75  # intersection over union of two patches' near images, and of a community and its common near images
LEAST = 3  # images of a community
OWED = 0.99  # share of the other images' patches that owe a community less than a shared defect does
MOST = 4096  # patches that are compared, those of the largest growth: the comparison is quadratic in them


@torch.no_grad()
def shared_defects(distances: Tensor, keep: float = 0.3) -> Tensor:
    """(N, N, L) bool, True at [i, j, m] where image j must not judge patch m of image i.

    distances: (N, N, L) of patch m of image i to the nearest patch of image j, infinite at i = j.
    keep: share of the other images whose mean is the score. At least as many judges are left to every patch.
    Beyond the answer, memory is that of a few (N, L), and of two MOST x MOST at worst.
    """
    expect(distances.ndim == 3 and len(distances) == distances.shape[1], "distances.shape", "(N, N, L)",
           tuple(distances.shape))
    expect(0 < keep <= 1, "keep", "a share in (0, 1]", keep)
    left_out = torch.zeros(distances.shape, dtype=torch.bool, device=distances.device)
    judges = len(distances) - 1
    kept = max(1, int(keep * judges))
    free = torch.ones(len(distances), dtype=torch.bool, device=distances.device)
    for members in communities(distances, kept):
        members = members & free
        if LEAST <= members.sum() <= judges - kept:
            free &= ~members
            guilty = _owing(distances, members, kept)
            for member in members.nonzero().flatten().tolist():
                left_out[:, member] |= guilty
    left_out.diagonal(dim1=0, dim2=1).fill_(False)
    return left_out


def communities(distances: Tensor, kept: int) -> list[Tensor]:
    """Groups of images that share a defect, each (N,) bool, the best attested first."""
    images, near = _jumping(distances, kept)
    if len(images) == 0:
        return []
    sets = near.float()
    both = sets @ sets.T
    size = sets.sum(1)
    linked = both >= ALIKE * (size[:, None] + size - both)
    linked &= near[:, images] & near[:, images].T & (images[:, None] != images)
    found = []
    for patches in _components(linked):
        members = torch.zeros_like(near[0])
        members[images[patches]] = True
        common = sets[patches].mean(0) >= 0.5
        if members.sum() >= LEAST and (members & common).sum() >= ALIKE * (members | common).sum():
            found.append((int(patches.sum()), members))
    return [members for _, members in sorted(found, key=lambda pair: -pair[0])]


def _jumping(distances: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Patches whose distances jump: their images (P,) and the images before the jump, their own among them (P, N)."""
    judges = len(distances) - 1
    last = min(judges // 2, judges - kept)  # a larger group would be the rule, or leave too few judges
    if last < LEAST - 1:
        return distances.new_zeros(0, dtype=torch.long), distances.new_zeros((0, len(distances)), dtype=torch.bool)
    rank = torch.arange(1, last + 1, device=distances.device)[:, None]
    growth, radius, beyond, scores, means = [], [], [], [], []
    for own in distances:  # (N, L), one image at a time: sorting all would hold twice the distances
        ordered = own.sort(0).values[:-1].clamp_min(torch.finfo(own.dtype).tiny)
        step = (ordered[1:last + 1] / ordered[:last]).log()
        scaled = step * rank
        means.append(scaled[LEAST - 2:].mean())
        top, at = scaled.masked_fill((step < JUMP) | (rank < LEAST - 1), 0).max(0)
        growth.append(top)
        radius.append(ordered.gather(0, at[None])[0])
        beyond.append(ordered.gather(0, at[None] + 1)[0])
        scores.append(ordered[:kept].mean(0))
    growth = torch.stack(growth) / torch.stack(means).mean().clamp_min(torch.finfo(distances.dtype).tiny)
    rare = torch.stack(beyond) > _quantile(torch.stack(scores), RARE)
    growth = growth.where(rare & (growth > GROWTH), 0)
    chosen = growth.flatten().topk(min(MOST, int((growth > 0).sum()))).indices
    images, places = chosen // growth.shape[1], chosen % growth.shape[1]
    near = distances[images, :, places] <= torch.stack(radius)[images, places][:, None]  # (P, N)
    near[torch.arange(len(images)), images] = True
    return images, near


def _components(linked: Tensor) -> list[Tensor]:
    """Connected components of (P, P) bool links, each (P,) bool; every member takes the lowest number it can reach."""
    numbers = torch.arange(len(linked), device=linked.device)
    while True:
        lowest = torch.where(linked, numbers, len(linked)).amin(1).minimum(numbers)
        if torch.equal(lowest, numbers):
            return [numbers == number for number in numbers.unique()]
        numbers = lowest


def _owing(distances: Tensor, members: Tensor, kept: int) -> Tensor:
    """(N, L) bool: patches of the members whose score the members lower as they hardly lower those of other images."""
    ratio = torch.stack([_mean_of_nearest(own[~members], kept) / _mean_of_nearest(own, kept) for own in distances])
    ratio = ratio.nan_to_num(1.0, posinf=torch.inf)  # 0 / 0: twins beyond the community
    return members[:, None] & (ratio > _quantile(ratio[~members], OWED))


def _mean_of_nearest(distances: Tensor, kept: int) -> Tensor:
    return distances.topk(kept, dim=0, largest=False, sorted=False).values.mean(0)


def _quantile(values: Tensor, share: float) -> Tensor:
    """The value that `share` of all are at most; any number of values, unlike torch.quantile."""
    return values.flatten().kthvalue(max(1, math.ceil(share * values.numel()))).values
