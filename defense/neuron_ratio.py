"""How many neurons to re-initialise, told from clean images alone: the most that tuning can make good again.

The images are split; each ratio tried is tuned on the one part and judged on the other, against the same tuning
without any re-initialisation (against the given model, images it was trained on would count as lost accuracy).
The largest ratio that does not clearly lose more than the budget is taken; accuracy is taken to fall with the
ratio, so that halving finds it.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.errors import expect

FEWEST = 10  # images to judge by: with less, one image is more than ten points


@dataclass(frozen=True)
class RatioConfig:
    candidates: tuple[float, ...] = (0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9)  # released sweep
    budget: float = 0.015   # of accuracy that may be lost, beside what chance explains: `allowance`
    held_out: float = 0.2   # share of the images that judge; of few images half, up to 20
    fallback: float = 0.15  # where images or time do not allow a choice

    def __post_init__(self) -> None:
        rising = list(self.candidates) == sorted(set(self.candidates))
        expect(self.candidates and rising and self.candidates[0] > 0 and self.candidates[-1] <= 1,
               "RatioConfig.candidates", "rising numbers in (0, 1]", self.candidates)
        expect(0 <= self.budget < 1 and 0 < self.held_out < 1, "RatioConfig budget, held_out", "in [0, 1), in (0, 1)",
               (self.budget, self.held_out))
        expect(0 < self.fallback <= 1, "RatioConfig.fallback", "in (0, 1]", self.fallback)


def split_clean(labels: Tensor, config: RatioConfig, *, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
    """(tuned on, judged by): ascending CPU positions, each class in proportion, the first image of every class in the
    first part; None where too few are left to judge by."""
    count, labels = len(labels), labels.cpu()
    wanted = max(round(config.held_out * count), min(count // 2, 20))
    order = torch.randperm(count, generator=generator)
    place = torch.zeros(count)  # in the order drawn, within the class: 0 = its first, below 1
    for k in labels.unique().tolist():
        own = order[labels[order] == k]
        place[own] = torch.arange(len(own)) / len(own)
    judges = place.sort(descending=True, stable=True).indices[:min(wanted, int((place > 0).sum()))]
    if len(judges) < FEWEST:
        return None
    rest = torch.ones(count, dtype=torch.bool)
    rest[judges] = False
    return rest.nonzero()[:, 0], judges.sort().values


def largest_bearable(judge: Callable[[float], float | None], config: RatioConfig,
                     images: int) -> tuple[float, dict[float, float]]:
    """(ratio, accuracy of each ratio tried). judge: accuracy in [0, 1] on `images` held-out images after tuning;
    None = no time left, or nothing to judge. judge(0) sets the mark; the smallest candidate is taken where none keeps
    to it."""
    mark = judge(0.0)
    if mark is None:
        return config.fallback, {}
    tried, bearable = {0.0: mark}, mark - allowance(config.budget, images) - 1e-9
    low, high = -1, len(config.candidates)  # the largest known to be borne, the smallest known not to be
    while high - low > 1:
        middle = (low + high) // 2
        ratio = config.candidates[middle]
        found = judge(ratio)
        if found is None:
            return _best_known(tried, bearable, config), tried
        tried[ratio] = found
        low, high = (middle, high) if found >= bearable else (low, middle)
    return config.candidates[max(low, 0)], tried


def allowance(budget: float, images: int) -> float:
    """The loss of accuracy on so many images that is not clearly above the budget: the budget and two standard errors
    of a share of its size, at least of one image."""
    share = max(budget, 1 / images)
    return budget + 2 * math.sqrt(share * (1 - share) / images)


def _best_known(tried: dict[float, float], bearable: float, config: RatioConfig) -> float:
    """When time ran out: the largest ratio borne, else the fallback, but below every ratio not borne."""
    borne = [ratio for ratio, found in tried.items() if ratio > 0 and found >= bearable]
    refused = min((ratio for ratio, found in tried.items() if found < bearable), default=2.0)
    below = [c for c in config.candidates if c < refused] or [config.candidates[0]]
    return max(borne) if borne else min(config.fallback, below[-1])


def subset(values: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Each tensor at `index`, whatever its device."""
    return [value[index.to(value.device)] for value in values]
