import math

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.integrate import quad
from scipy.stats import expon

from backdoor_detection.detection import FREELY
from backdoor_detection.outlier import (
    combined_p_value,
    deleted_residual_p_value,
    fisher_p_value,
    gamma_p_value,
    outlier_p_value,
)


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


@pytest.mark.parametrize("p_value", [outlier_p_value, gamma_p_value, deleted_residual_p_value])
def test_bad_margins_are_named(refuses, p_value):
    with refuses(r"margins: expected finite numbers, found \[1\.0, nan\]"):
        p_value(torch.tensor([1.0, float("nan")]))
    with refuses(r"margins: expected \(K,\) of at least two classes, found \(1,\)"):
        p_value(torch.tensor([1.0]))


def gamma_drawn(classes, largest, seed=0):
    """margins: classes - 1 gamma draws (shape 4, scale 3, from 10 on) and a largest one."""
    drawn = np.random.default_rng(seed).gamma(4, 3, classes - 1) + 10
    return torch.from_numpy(np.append(drawn, largest))


@pytest.mark.parametrize("classes, largest", [(10, 45.0), (43, 50.0), (200, 60.0)])
def test_the_gamma_test_integrates_the_fitted_density(classes, largest):
    margins = gamma_drawn(classes, largest)
    shape, location, scale = scipy.stats.gamma.fit(margins[:-1].numpy())

    def density(x):
        y = (x - location) / scale
        return y ** (shape - 1) * math.exp(-y) / math.gamma(shape) / scale

    beyond = quad(density, largest, largest + 60 * scale)[0]
    assert gamma_p_value(margins) == pytest.approx(1 - (1 - beyond) ** classes, rel=1e-6)


def test_the_fitted_gamma_is_near_the_drawn_one():
    margins = gamma_drawn(4001, 60.0)
    truth = 1 - scipy.stats.gamma.cdf(50.0 / 3, 4) ** 4001
    assert gamma_p_value(margins) == pytest.approx(truth, abs=0.1) and 0.1 < truth < 0.3


def test_a_far_outlier_alarms_the_gamma_test_and_none_does_not():
    assert 0 < gamma_p_value(gamma_drawn(10, 300.0)) < 1e-6
    margins = gamma_drawn(40, 30.0)  # within the others' reach
    assert gamma_p_value(margins) > 0.2
    assert gamma_p_value(margins) == gamma_p_value(margins.flip(0))


@pytest.mark.parametrize("margins", [[2.0, 2.0, 2.0], [1.0, 9.0], [3.0, 3.0, 8.0]])
def test_without_spread_the_gamma_test_does_not_alarm(margins):
    assert gamma_p_value(torch.tensor(margins)) == 1.0


@pytest.mark.parametrize("fit", [
    lambda _: (math.nan, 0.0, 1.0), lambda _: (1.0, 0.0, -1.0),
    pytest.param(scipy.stats.FitError, id="FitError"), pytest.param(FloatingPointError, id="FloatingPointError")])
def test_without_a_fit_the_gamma_test_does_not_alarm(monkeypatch, fit):
    def failing(others):
        if isinstance(fit, type):
            raise fit("no fit")
        return fit(others)

    monkeypatch.setattr(scipy.stats.gamma, "fit", failing)
    assert gamma_p_value(gamma_drawn(10, 300.0)) == 1.0


@pytest.mark.parametrize("margins", [
    [0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 1e-30, 5.0], [-1e30, 0.0, 1.0, 2.0], [1e30, 2e30, 3e30, 9e30],
    [1.0, 1.0, 1.0, 1.0000001, 2.0], [0.0, 1e-6, 1e-6, 1e6, 1e6 + 1]])
def test_odd_margins_still_give_a_probability_without_a_warning(margins):
    assert 0 <= gamma_p_value(torch.tensor(margins, dtype=torch.float64)) <= 1


def by_student(margins, tried):
    """The same test through scipy's t distribution and NumPy's variance of the others."""
    others = np.sort(margins)[:-1]
    t = (margins.max() - others.mean()) / (others.std(ddof=1) * math.sqrt(1 + 1 / len(others)))
    return 1 - scipy.stats.t(df=len(others) - 1).cdf(t) ** tried


@pytest.mark.parametrize("classes", [3, 10, 43, 200])
@pytest.mark.parametrize("tried", [None, 1000])
def test_the_deleted_residual_agrees_with_student(classes, tried):
    margins = torch.randn(classes, generator=torch.Generator().manual_seed(classes), dtype=torch.float64) * 4 - 9
    expected = by_student(margins.numpy(), tried or classes)
    assert deleted_residual_p_value(margins, tried) == pytest.approx(expected, rel=1e-9)
    assert deleted_residual_p_value(margins * 7 - 300, tried) == pytest.approx(expected, rel=1e-6)  # scale and shift
    assert 0.01 < expected <= 1


def test_the_deleted_residual_by_hand():
    # others 0, 2: mean 1, deviation sqrt(2), times sqrt(1.5) = sqrt(3); t = (4 - 1) / sqrt(3) = sqrt(3), one degree
    # of freedom: P(T > sqrt(3)) = 1/2 - atan(sqrt(3)) / pi = 1/6; p = 1 - (5/6)^3
    assert deleted_residual_p_value(torch.tensor([0.0, 4.0, 2.0])) == pytest.approx(1 - (5 / 6) ** 3)
    # others 1, 2, 3: mean 2, deviation 1, times sqrt(4/3); t = (8 - 2) / sqrt(4/3) = sqrt(27), two degrees of freedom:
    # P(T > t) = (1 - t / sqrt(2 + t^2)) / 2
    beyond = (1 - math.sqrt(27 / 29)) / 2
    assert deleted_residual_p_value(torch.tensor([3.0, 1.0, 8.0, 2.0])) == pytest.approx(1 - (1 - beyond) ** 4)


@pytest.mark.parametrize("classes", [5, 10, 43, 100])
def test_normal_margins_raise_false_alarms_at_the_level_named(classes):
    drawn = torch.randn(2000, classes, generator=torch.Generator().manual_seed(classes)) * 3 + 5
    p_values = np.array([deleted_residual_p_value(margins) for margins in drawn])
    assert np.mean(p_values < 0.05) == pytest.approx(0.05, abs=0.015)  # three standard errors


def test_a_class_that_stands_out_has_a_small_deleted_residual_p():
    others = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    far = [deleted_residual_p_value(torch.cat([others, torch.tensor([m])])) for m in (3.0, 6.0, 12.0, 1e6)]
    assert far == sorted(far, reverse=True) and far[1] < 0.05 and 0 < far[3] < 1e-30
    low = torch.cat([others, torch.tensor([-50.0])])  # standing out below is no alarm
    assert deleted_residual_p_value(low) > 0.05


@pytest.mark.parametrize("margins", [[2.0, 2.0, 2.0], [3.0, 3.0, 8.0], [1.0, 1.0, 1.0, 1.0]])
def test_without_spread_the_deleted_residual_does_not_alarm(margins):
    assert deleted_residual_p_value(torch.tensor(margins)) == 1.0


def test_the_deleted_residual_needs_three_classes(refuses):
    with refuses("margins: expected at least three classes, found 2"):
        deleted_residual_p_value(torch.tensor([1.0, 9.0]))


def test_combined_p_value_by_hand():
    """tan(0.4 pi) = 3.0777 and tan(0.25 pi) = 1: mean 2.0388, arctan 1.1148, p = 0.5 - 0.35485."""
    assert combined_p_value([0.1, 0.25]) == pytest.approx(0.145149, abs=1e-6)
    assert combined_p_value([0.3]) == pytest.approx(0.3) and combined_p_value([0.04] * 5) == pytest.approx(0.04)
    assert combined_p_value([1.0, 1.0]) == 1.0 and combined_p_value([1e-6, 1.0]) < 1e-5


def test_combined_p_values_keep_their_rate_whether_independent_or_not():
    generator = torch.Generator().manual_seed(0)
    own, shared = torch.randn(4000, 3, generator=generator), torch.randn(4000, 1, generator=generator)
    for weight in (0.0, 0.7, 1.0):
        draws = weight * shared + (1 - weight ** 2) ** 0.5 * own
        rate = sum(combined_p_value((0.5 * torch.erfc(row / 2 ** 0.5)).tolist()) < 0.05 for row in draws) / len(draws)
        assert 0.035 < rate < 0.065


@pytest.mark.parametrize("wrong", [[], [1.5], [-0.1], [float("nan")]])
def test_combined_p_value_refuses_what_is_none(refuses, wrong):
    with refuses(r"p_values: expected some in \[0, 1\], found"):
        combined_p_value(wrong)


@pytest.mark.parametrize("p_values", [[0.03], [0.2, 0.01], [1.0, 1.0], [1.0, 0.05], [0.5, 0.4, 1e-8], [1e-200, 0.9]])
def test_fishers_method_agrees_with_scipy(p_values):
    assert fisher_p_value(p_values) == pytest.approx(scipy.stats.combine_pvalues(p_values, "fisher").pvalue, rel=1e-9)


@pytest.mark.parametrize("classes", [FREELY, 10, 43])
def test_what_is_shipped_keeps_its_rate_for_normal_margins(classes):
    """Changes by the normal null, free features by the exponential one, from as many classes as they are judged."""
    both = torch.randn(800, 2, classes, generator=torch.Generator().manual_seed(classes))
    found = [fisher_p_value([deleted_residual_p_value(one), outlier_p_value(other)]) for one, other in both]
    assert sum(p < 0.05 for p in found) / len(found) < 0.06


def test_fishers_method_by_hand_and_at_its_ends(refuses):
    # half the statistic is s = -log(0.01 * 0.2); the tail is exp(-s) (1 + s)
    assert fisher_p_value([0.01, 0.2]) == pytest.approx(0.002 * (1 - math.log(0.002)))
    assert 0 < fisher_p_value([0.0, 0.5]) < 1e-200
    with refuses(r"p_values: expected some in \[0, 1\], found \[\]"):
        fisher_p_value([])
    with refuses(r"p_values: expected some in \[0, 1\], found \[1.5\]"):
        fisher_p_value([1.5])


def test_an_exponential_null_of_some_stands_for_all_that_were_tried():
    margins = torch.tensor([5.0, 2.0, 1.0, 3.0])
    assert outlier_p_value(margins, 40) == pytest.approx(1 - (1 - math.exp(-4)) ** 40)
