"""Does one class stand out from the others? A p-value from an exponential null.

The largest margin is compared with the others: location = their smallest, scale = their mean above it
(the maximum-likelihood fit of a shifted exponential). Contest variant of Mm-Bd (Wang et al., IEEE S&P 2024,
arXiv:2205.06900), which fits a gamma instead.
Departs from it: without spread among the others there is no test, and the answer is p = 1, not NaN.
"""
from __future__ import annotations

import math

from torch import Tensor

from data.errors import expect


def outlier_p_value(margins: Tensor) -> float:
    """p of the largest of K >= 2 margins, in [0, 1]; small = one class stands out.

    p = 1 - (1 - exp(-(max - location) / scale)) ** K, as if it were the largest of K draws.
    """
    expect(margins.ndim == 1 and len(margins) >= 2, "margins", "(K,) of at least two classes", tuple(margins.shape))
    expect(margins.isfinite().all(), "margins", "finite numbers", margins.tolist())
    ordered = margins.double().sort().values.tolist()
    largest, others = ordered[-1], ordered[:-1]
    location = others[0]
    scale = math.fsum(others) / len(others) - location
    if scale <= 0:
        return 1.0
    beyond = math.exp(-(largest - location) / scale)
    return 1.0 if beyond == 1 else -math.expm1(len(ordered) * math.log1p(-beyond))
