import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from submit.intervals import _resample_weights, percentile_interval, resampled_metrics, share_interval
from submit.scoring import measured_metrics
from tests.test_scoring import category


def test_share_interval_agrees_with_plain_resampling():
    correct = np.arange(200) % 5 > 0
    rng = np.random.default_rng(1)
    plain = [100 * rng.choice(correct, len(correct)).mean() for _ in range(4000)]
    np.testing.assert_allclose(share_interval(correct, 0), np.percentile(plain, (2.5, 97.5)), atol=1.0)
    assert share_interval(correct, 0) == share_interval(correct, 0) != share_interval(correct, 3)


def test_all_right_is_not_certainty():
    low, high = share_interval(np.ones(12, bool), 0)
    assert high == 100 and low == pytest.approx(73.54, abs=0.01)  # Clopper-Pearson for 12 of 12
    assert share_interval(np.zeros(12, bool), 0) == pytest.approx((0, 100 - 73.54), abs=0.01)


def test_resampled_metrics_equal_metrics_of_the_repeated_images():
    image_truth, image_scores, masks, maps = category(1, decimals=4)
    draws = resampled_metrics(image_truth, image_scores, masks, maps, seed=0)
    weights = _resample_weights(image_truth, np.random.default_rng(0)).astype(int)
    assert (weights.sum(1) == len(maps)).all() and (weights[:, image_truth].sum(1) == image_truth.sum()).all()
    for r in (0, 7, 199):
        chosen = np.repeat(np.arange(len(maps)), weights[r])
        truth, scores = image_truth[chosen], image_scores[chosen]
        assert draws["image_auroc"][r] == pytest.approx(roc_auc_score(truth, scores))
        truth, scores = masks[chosen].ravel(), maps[chosen].ravel()
        assert draws["pixel_auroc"][r] == pytest.approx(roc_auc_score(truth, scores))
        assert draws["pixel_ap"][r] == pytest.approx(average_precision_score(truth, scores))


def test_intervals_hold_the_point_estimate_and_leave_out_the_undefined():
    image_truth, image_scores, masks, maps = category(2, decimals=4)
    draws = resampled_metrics(image_truth, image_scores, masks, maps, seed=0)
    for name, value in measured_metrics(image_truth, image_scores, masks, maps).items():
        low, high = percentile_interval(draws[name])
        assert low <= value <= high, name
    assert set(resampled_metrics(image_truth, image_scores, None, None, seed=0)) == {
        "image_auroc", "image_f1", "image_ap"}
    assert resampled_metrics(image_truth * 0, image_scores, masks * 0, maps, seed=0) == {}
