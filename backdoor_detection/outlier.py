"""Does one class stand out from the others? A p-value of the largest margin from a null fitted to the others.

Normal null: the largest is one more draw beside the others, both mean and spread of which are only estimated, so
its distance has Student's t distribution (the deleted residual; Grubbs, Technometrics 1969), and with normal
margins a threshold on p raises false alarms at that rate whatever the number of classes.

Exponential null: location = the others' smallest, scale = their mean above it (the maximum-likelihood fit of a
shifted exponential), a contest variant. Gamma null: the original, Mm-Bd (Wang et al., IEEE S&P 2024,
arXiv:2205.06900), with location, scale and shape by maximum likelihood.
Departs from them: without spread among the others, or without a fit, there is no test, and the answer is
p = 1, not NaN.
"""
from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from scipy.special import gammaincc, stdtr
from torch import Tensor

from data.errors import expect


def deleted_residual_p_value(margins: Tensor, tried: int | None = None) -> float:
    """p of the largest of n >= 3 margins under the normal null, in [0, 1]; small = one class stands out.

    t = (max - mean of the others) / (their standard deviation * sqrt(1 + 1 / (n - 1))), with n - 2 degrees of
    freedom; p = 1 - (1 - P(T > t)) ** tried. tried: classes that it is the largest of, n unless given.
    """
    largest, others = _largest_and_others(margins)
    expect(len(others) >= 2, "margins", "at least three classes", len(margins))
    mean = math.fsum(others) / len(others)
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in others) / (len(others) - 1) * (1 + 1 / len(others)))
    if spread == 0:
        return 1.0
    return _p_of_largest(float(stdtr(len(others) - 1, -(largest - mean) / spread)), tried or len(margins))


def combined_p_value(p_values: Sequence[float]) -> float:
    """One p-value from several of the same question, however they depend on each other, in [0, 1].

    Cauchy combination (Liu and Xie, JASA 2020, Eq. 2 with equal weights): 1/2 - arctan(mean tan((1/2 - p) pi)) / pi.
    Departs from it: a p above 0.99 counts as 0.99, else a single p of 1 would outweigh all others.
    """
    expect(len(p_values) > 0 and all(0 <= p <= 1 for p in p_values), "p_values", "some in [0, 1]", list(p_values))
    if min(p_values) == 1:
        return 1.0
    inside = [min(max(p, 1e-15), 0.99) for p in p_values]
    return 0.5 - math.atan(math.fsum(math.tan((0.5 - p) * math.pi) for p in inside) / len(inside)) / math.pi


def fisher_p_value(p_values: Sequence[float]) -> float:
    """One p-value from several of the same question that do not depend on each other, in [0, 1].

    Fisher's method (Statistical Methods for Research Workers, 1932): -2 sum log p has a chi-square distribution with
    2n degrees of freedom.
    """
    expect(len(p_values) > 0 and all(0 <= p <= 1 for p in p_values), "p_values", "some in [0, 1]", list(p_values))
    half = -math.fsum(math.log(max(p, 1e-300)) for p in p_values)
    return float(gammaincc(len(p_values), half))


def outlier_p_value(margins: Tensor, tried: int | None = None) -> float:
    """p of the largest of K >= 2 margins under the exponential null, in [0, 1]; small = one class stands out.

    p = 1 - (1 - exp(-(max - location) / scale)) ** tried, as if it were the largest of so many draws, K unless given.
    """
    largest, others = _largest_and_others(margins)
    location = others[0]
    scale = math.fsum(others) / len(others) - location
    if scale <= 0:
        return 1.0
    return _p_of_largest(math.exp(-(largest - location) / scale), tried or len(margins))


def gamma_p_value(margins: Tensor) -> float:
    """p of the largest of K >= 2 margins under the gamma null, in [0, 1]; small = one class stands out.

    p = 1 - F(max) ** K, F the gamma distribution fitted to the others; 1 where no fit is found.
    """
    largest, others = _largest_and_others(margins)
    if others[0] == others[-1]:
        return 1.0
    from scipy.stats import gamma  # slow to import, and the exponential null does without

    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # the search passes through values where the likelihood is not defined
            beyond = float(gamma.sf(largest, *gamma.fit(others)))
    except (ValueError, ArithmeticError, RuntimeError):  # among them scipy's FitError
        return 1.0
    return _p_of_largest(beyond, len(margins)) if math.isfinite(beyond) else 1.0


def _largest_and_others(margins: Tensor) -> tuple[float, list[float]]:
    """The largest and the K - 1 others, ascending."""
    expect(margins.ndim == 1 and len(margins) >= 2, "margins", "(K,) of at least two classes", tuple(margins.shape))
    expect(margins.isfinite().all(), "margins", "finite numbers", margins.tolist())
    ordered = margins.double().sort().values.tolist()
    return ordered[-1], ordered[:-1]


def _p_of_largest(beyond: float, count: int) -> float:
    """1 - (1 - beyond) ** count without rounding: that the largest of `count` draws lies as far out."""
    return 1.0 if beyond == 1 else -math.expm1(count * math.log1p(-beyond))
