import math

import numpy as np
import pytest
import torch
from scipy.stats import expon

from backdoor_detection.outlier import outlier_p_value


def by_scipy(margins):
    """The same test through scipy's fit of a shifted exponential."""
    others = np.delete(margins, np.argmax(margins))
    location, scale = expon.fit(others)
    return 1 - expon.cdf(np.max(margins), location, scale) ** len(margins)


@pytest.mark.parametrize("classes", [3, 10, 43, 200])
@pytest.mark.parametrize("shift", [-50.0, 0.0, 3.0])
def test_agrees_with_scipy(classes, shift):
    margins = torch.randn(classes, generator=torch.Generator().manual_seed(classes)) * 4 + shift
    assert outlier_p_value(margins) == pytest.approx(by_scipy(margins.double().numpy()), abs=1e-9)


def test_by_hand():
    # others 1, 2, 3: location 1, scale 1; largest 5: p = 1 - (1 - exp(-4))^4
    assert outlier_p_value(torch.tensor([5.0, 2.0, 1.0, 3.0])) == pytest.approx(1 - (1 - math.exp(-4)) ** 4)


@pytest.mark.parametrize("classes, border", [(10, 4.79), (43, 6.25), (50, 6.40), (100, 7.09), (200, 7.78)])
def test_an_eight_percent_alarm_lies_at_these_distances(classes, border):
    """Others alternate 0 and 2: location 0; scale about 1 (exactly 1 for an even number of others)."""
    others = torch.arange(classes - 1).remainder(2).double() * 2
    scale = others.mean()

    def p(t):
        return outlier_p_value(torch.cat([others, (t * scale).view(1)]))

    assert p(border - 0.01) > 0.08 > p(border + 0.01)


def test_far_outliers_do_not_round_to_zero():
    assert 0 < outlier_p_value(torch.tensor([0.0, 1.0, 2.0, 60.0])) < 1e-20


def test_order_does_not_matter_and_ties_remove_one():
    assert outlier_p_value(torch.tensor([1.0, 4.0, 4.0])) == outlier_p_value(torch.tensor([4.0, 1.0, 4.0]))
    # one 4 stays among the others: location 1, scale 1.5, distance 2
    expected = 1 - (1 - math.exp(-2)) ** 3
    assert outlier_p_value(torch.tensor([1.0, 4.0, 4.0])) == pytest.approx(expected)


@pytest.mark.parametrize("margins", [[2.0, 2.0, 2.0], [1.0, 9.0], [3.0, 3.0, 8.0]])
def test_without_spread_there_is_no_alarm(margins):
    assert outlier_p_value(torch.tensor(margins)) == 1.0


def test_bad_margins_are_named(refuses):
    with refuses(r"margins: expected finite numbers, found \[1\.0, nan\]"):
        outlier_p_value(torch.tensor([1.0, float("nan")]))
    with refuses(r"margins: expected \(K,\) of at least two classes, found \(1,\)"):
        outlier_p_value(torch.tensor([1.0]))
