"""Calibrated maps: order, the spread by ranks, the organizers' AUPRO with an outlier and where it would crash."""
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from anomaly.calibration import SOFT, calibrated


def organizers_aupro(truth, scores):
    """Their definition, pass by pass; fails where theirs fails."""
    low, high = float(scores.min()), float(scores.max())
    regions = [(i, found == n + 1) for i, mask in enumerate(truth)
               for found, count in [ndimage.label(mask, np.ones((3, 3)))] for n in range(count)]
    rates, overlaps = [], []
    for threshold in np.arange(low, high, (high - low) / 200):
        above = scores > threshold
        overlaps.append(np.mean([above[i][region].mean() for i, region in regions]))
        rates.append(above[~truth].mean())
    rates, overlaps = np.array(rates), np.array(overlaps)
    kept = rates < 0.3
    x, y = rates[kept], overlaps[kept]
    with np.errstate(invalid="raise"):
        x = (x - x.min()) / (x.max() - x.min())
    return float(-(np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


def given(n=6, side=32, seed=0):
    """Maps with a defect of middling strength in every second image, and its masks."""
    generator = torch.Generator().manual_seed(seed)
    maps, truth = torch.rand(n, 1, side, side, generator=generator) ** 2, torch.zeros(n, side, side, dtype=torch.bool)
    truth[::2, 8:14, 10:20] = True
    maps[:, 0][truth] += 0.4
    return maps, truth.numpy()


def rounded(maps):
    return maps[:, 0].double().numpy().round(4)


def test_follows_the_logarithm_of_the_share_above():
    maps, _ = given()
    flat = maps.flatten()
    for index in range(0, len(flat), 997):
        share = float((flat > flat[index]).double().mean())
        wanted = math.log((1 + SOFT) / (share + SOFT)) / math.log((1 + SOFT) / SOFT)
        assert float(calibrated(maps).flatten()[index]) == pytest.approx(wanted, abs=2e-3)


def test_the_order_stays_and_the_range_is_0_to_1():
    maps, _ = given()
    maps[0, 0, :4] = maps[1, 0, :4]  # ties stay ties
    found = calibrated(maps)
    assert found.shape == maps.shape and found.dtype == torch.float32
    assert (found.min(), found.max()) == (0, 1)
    before, after = maps.flatten().sort().values, found.flatten()[maps.flatten().argsort()]
    assert ((after[1:] > after[:-1]) == (before[1:] > before[:-1])).all()
    assert torch.equal(found[0, 0, :4], found[1, 0, :4])


def test_no_monotone_change_of_the_scores_matters_much():
    maps, _ = given()
    torch.testing.assert_close(calibrated(3 * maps ** 4), calibrated(maps), rtol=0, atol=0.02)  # lines between knots


def test_one_giant_outlier_neither_lowers_nor_ends_the_organizers_aupro():
    maps, truth = given()
    maps[1, 0, 0, 0] = 1e6
    with pytest.raises(FloatingPointError):
        organizers_aupro(truth, rounded(maps / maps.max()))
    calm, _ = given()
    found = organizers_aupro(truth, rounded(calibrated(maps)))
    assert found == pytest.approx(organizers_aupro(truth, rounded(calibrated(calm))), abs=5e-3)
    assert found >= organizers_aupro(truth, rounded(calm / calm.max()))


@pytest.mark.parametrize("maps", [
    torch.full((6, 1, 32, 32), 0.3), torch.zeros(6, 1, 32, 32),
    (given()[0] > 0.9).float(),  # two scores: all thresholds at one rate
    given()[0].clamp(max=0.05)])  # most pixels share the highest score: no rate below 0.3
def test_maps_with_too_few_scores_get_an_aupro(maps):
    _, truth = given()
    with pytest.raises((ZeroDivisionError, FloatingPointError, ValueError)):
        organizers_aupro(truth, rounded(maps / maps.max().clamp_min(1)))
    found = calibrated(maps)
    assert math.isfinite(organizers_aupro(truth, rounded(found)))
    higher = maps.flatten()[:, None] > maps.flatten()[::61][None]
    assert (found.flatten()[:, None] > found.flatten()[::61][None])[higher].all()  # what differed keeps its order


def test_one_pixel_is_zero():
    assert calibrated(torch.ones(1, 1, 1, 1)).tolist() == [[[[0.0]]]]


def test_bad_input_is_refused(refuses):
    with refuses(r"^maps.shape: expected \(N, 1, H, W\), not empty, found \(2, 4, 4\)$"):
        calibrated(torch.zeros(2, 4, 4))
    with refuses(r"^maps.shape: expected \(N, 1, H, W\), not empty, found \(0, 1, 4, 4\)$"):
        calibrated(torch.zeros(0, 1, 4, 4))
    with refuses(r"^maps: expected finite scores, found NaN or infinity$"):
        calibrated(torch.tensor([[[[0.1, float("nan")]]]]))


def test_in_place_gives_the_same_in_the_same_memory():
    maps = torch.rand(3, 1, 20, 30, generator=torch.Generator().manual_seed(0))
    expected = calibrated(maps)
    found = calibrated(maps, in_place=True)
    assert torch.equal(found, expected) and found.data_ptr() == maps.data_ptr()
