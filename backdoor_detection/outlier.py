"""Does one class stand out from the others? A p-value of the largest margin from a null fitted to the others.

Exponential null: location = the others' smallest, scale = their mean above it (the maximum-likelihood fit of a
shifted exponential), a contest variant. Gamma null: the original, Mm-Bd (Wang et al., IEEE S&P 2024,
arXiv:2205.06900), with location, scale and shape by maximum likelihood.
Departs from them: without spread among the others, or without a fit, there is no test, and the answer is
p = 1, not NaN.
"""
from __future__ import annotations

import math
import warnings

import numpy as np
from torch import Tensor

from data.errors import expect


def outlier_p_value(margins: Tensor) -> float:
    """p of the largest of K >= 2 margins under the exponential null, in [0, 1]; small = one class stands out.

    p = 1 - (1 - exp(-(max - location) / scale)) ** K, as if it were the largest of K draws.
    """
    largest, others = _largest_and_others(margins)
    location = others[0]
    scale = math.fsum(others) / len(others) - location
    if scale <= 0:
        return 1.0
    return _p_of_largest(math.exp(-(largest - location) / scale), len(margins))


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
