"""The scores against scikit-learn and against the organizers' way written out as plain loops."""
import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

from submit import pixel_curves, scoring
from submit.aupro import _thresholds_below, area_under, aupro, region_curves
from submit.pixel_curves import level_counts, ranking, ranking_metrics
from submit.scoring import (
    anomaly_metrics,
    backdoored,
    best_matches,
    detection_accuracy,
    measured_metrics,
    retrieval_accuracy,
)


def slow_aupro(masks, maps, steps=200, limit=0.3):
    """Every threshold, every map, every region."""
    low, high = maps.min(), maps.max()
    overlaps, rates = [], []
    for threshold in np.arange(low, high, (high - low) / steps):
        positive = maps > threshold
        shares = []
        for above, mask in zip(positive, masks, strict=True):
            labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
            shares += [above[labels == region].mean() for region in range(1, count + 1)]
        overlaps.append(np.mean(shares))
        rates.append(positive[masks == 0].sum() / (masks == 0).sum())
    overlaps, rates = np.array(overlaps), np.array(rates)
    kept = rates < limit
    x = (rates[kept] - rates[kept].min()) / (rates[kept].max() - rates[kept].min())
    return auc(x, overlaps[kept])


def slow_f1(truth, scores):
    precision, recall, _ = precision_recall_curve(truth, scores)
    with np.errstate(invalid="ignore"):
        f1 = 2 * precision * recall / (precision + recall)
    return f1[np.isfinite(f1)].max()


def category(seed, n=9, size=24, decimals=None):
    """Maps with a weak signal on blob-shaped masks; images 0.. are good."""
    rng = np.random.default_rng(seed)
    masks = ndimage.gaussian_filter(rng.normal(size=(n, size, size)), (0, 2, 2)) > 0.15
    masks[: n // 2] = False
    maps = ndimage.gaussian_filter(rng.normal(size=(n, size, size)), (0, 1, 1)) + 0.3 * masks
    maps = (maps - maps.min()) / (maps.max() - maps.min())
    if decimals is not None:
        maps = maps.round(decimals)
    return masks.any((1, 2)), maps.max((1, 2)), masks, maps


@pytest.mark.parametrize(("seed", "decimals"), [(0, None), (1, 4), (2, 4), (3, 1), (4, None)])
def test_seven_metrics_equal_the_organizers(seed, decimals):
    image_truth, image_scores, masks, maps = category(seed, decimals=decimals)
    found = anomaly_metrics(image_truth, image_scores, masks[:, None], maps[:, None])
    expected = {"pixel_aupro": slow_aupro(masks, maps)}
    for level, truth, scores in [("image", image_truth, image_scores), ("pixel", masks.ravel(), maps.ravel())]:
        expected[f"{level}_auroc"] = roc_auc_score(truth, scores)
        expected[f"{level}_ap"] = average_precision_score(truth, scores)
        expected[f"{level}_f1"] = slow_f1(truth, scores)
    weights = {"image_auroc": 1.2, "image_ap": 1.1, "image_f1": 1.1, "pixel_auroc": 1.0, "pixel_aupro": 1.4,
               "pixel_ap": 1.3, "pixel_f1": 1.3}
    expected["leaderboard_score"] = sum(weights[k] * expected[k] for k in weights) / sum(weights.values())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def sorted_way(truth, scores):
    return roc_auc_score(truth, scores), average_precision_score(truth, scores), slow_f1(truth, scores)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 18])
@pytest.mark.parametrize("kind", ["distinct", "ties", "beyond", "grid", "float32", "few positives", "few negatives"])
def test_blocks_of_pixels_make_no_difference(monkeypatch, block, kind):
    monkeypatch.setattr(pixel_curves, "BLOCK", block)
    rng = np.random.default_rng(11)
    truth = rng.random(400) < {"few positives": 0.01, "few negatives": 0.99}.get(kind, 0.3)
    scores = rng.normal(size=400) + truth
    if kind in ("ties", "beyond"):
        scores = scores.round(1) * (1 if kind == "ties" else 1e12)
    if kind == "grid":
        scores = (scores / 20 + 0.5).clip(0, 1).round(4)
    if kind == "float32":
        scores = scores.astype(np.float32)
    assert (pixel_curves.grid_counts(truth, scores) is not None) == (kind == "grid")
    expected = sorted_way(truth, scores)
    assert ranking(truth, scores) == pytest.approx(expected, abs=1e-12)
    assert ranking_metrics(*level_counts(truth, scores)) == pytest.approx(expected, abs=1e-12)


def test_one_score_off_the_grid_is_not_rounded_to_it(monkeypatch):
    monkeypatch.setattr(pixel_curves, "BLOCK", 16)
    scores = np.linspace(0, 1, 101).round(4)
    truth = scores == 0.5
    scores[90] = 0.5 + 1e-12  # a negative just above the positive, in a late block
    assert ranking(truth, scores) == pytest.approx(sorted_way(truth, scores), abs=1e-12)
    assert ranking(truth, scores)[1] == pytest.approx(1 / 51)


def test_negative_scores_and_scores_beyond_one():
    image_truth, image_scores, masks, maps = category(5)
    moved = anomaly_metrics(image_truth, image_scores * 7 - 3, masks, maps * 7 - 3)
    assert moved["pixel_aupro"] == pytest.approx(slow_aupro(masks, maps * 7 - 3), abs=1e-12)
    assert moved["pixel_ap"] == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-12)


def test_one_label_only_counts_as_zero_and_is_named():
    _, image_scores, masks, maps = category(6)
    good = np.zeros(len(maps), bool)
    assert set(anomaly_metrics(good, image_scores, masks * 0, maps).values()) == {0.0}
    measured = measured_metrics(good, image_scores, masks, maps)
    assert measured["image_auroc"] is None and measured["pixel_auroc"] is not None
    assert measured_metrics(masks.any((1, 2)), image_scores, None, None)["pixel_aupro"] is None


def test_constant_maps_have_no_aupro():
    image_truth, image_scores, masks, maps = category(7)
    measured = measured_metrics(image_truth, image_scores, masks, np.full_like(maps, 0.5))
    assert measured["pixel_aupro"] is None and measured["pixel_auroc"] == 0.5
    assert anomaly_metrics(image_truth, image_scores, masks, np.full_like(maps, 0.5))["pixel_aupro"] == 0


def test_the_organizers_way_ends_on_constant_maps():
    # a step of 0: numpy's arange has no length for it, and says so in one of two ways by its version
    with np.errstate(invalid="ignore"), pytest.raises((ZeroDivisionError, ValueError), match=r"zero|length"):
        slow_aupro(category(7)[2], np.full((9, 24, 24), 0.5))


@pytest.mark.parametrize("defect", [True, False])
def test_one_giant_outlier_leaves_aupro_undefined(defect):
    image_truth, _, masks, maps = category(8)
    maps[tuple(np.argwhere(masks == defect)[0])] = 1e6  # all thresholds but the lowest keep one false-positive rate
    assert aupro(masks, maps) is None
    measured = measured_metrics(image_truth, maps.max((1, 2)), masks, maps)
    assert measured["pixel_aupro"] is None and measured["pixel_ap"] > 0
    with pytest.raises(RuntimeWarning, match="invalid value encountered in divide"):  # 0 / 0
        slow_aupro(masks, maps)


@pytest.mark.parametrize("width", [1.5e-321, 1e-310, 1e-300])
def test_aupro_of_the_tiniest_ranges(width):
    _, _, masks, maps = category(12)
    assert aupro(masks, maps * width) == pytest.approx(slow_aupro(masks, maps * width), abs=1e-12)


def test_a_range_beyond_float64_has_no_aupro():
    _, _, masks, maps = category(12)
    assert aupro(masks, (maps - 0.5) * 3.4e308) is None


@pytest.mark.parametrize("seed", range(20))
def test_threshold_counts_equal_searchsorted_on_the_thresholds_themselves(seed):
    rng = np.random.default_rng(seed)
    low, width = rng.normal() * 10.0 ** rng.integers(-3, 4), rng.random() * 10.0 ** rng.integers(-4, 4)
    thresholds = np.arange(low, low + width, width / 200)
    near = np.concatenate([thresholds, np.nextafter(thresholds, np.inf), np.nextafter(thresholds, -np.inf)])
    scores = np.concatenate([near.clip(low, low + width), low + width * rng.random(500), [low + width]])
    np.testing.assert_array_equal(_thresholds_below(scores, thresholds, width / 200),
                                  np.searchsorted(thresholds, scores, side="left"))


@pytest.mark.parametrize(("low", "width"), [(1e6, 1e-7), (0.5, 1e-13), (-3e8, 1e-5)])
def test_threshold_counts_in_a_range_near_rounding(low, width):
    scores = low + width * np.random.default_rng(0).random(5000)
    thresholds = np.arange(scores.min(), scores.max(), np.ptp(scores) / 200)
    np.testing.assert_array_equal(_thresholds_below(scores, thresholds, np.ptp(scores) / 200),
                                  np.searchsorted(thresholds, scores, side="left"))


def test_region_weights_equal_repeated_images():
    _, _, masks, maps = category(8)
    weights = np.array([0, 2, 1, 0, 3, 1, 1, 0, 2])
    repeated = np.repeat(np.arange(9), weights)
    maps[0] = np.linspace(maps.min(), maps.max(), maps[0].size).reshape(maps[0].shape)
    maps[repeated[0], 0, 0], maps[repeated[0], 0, 1] = maps.min(), maps.max()  # same thresholds in both
    expected = slow_aupro(masks[repeated], maps[repeated])
    assert area_under(region_curves(masks, maps), weights[None])[0] == pytest.approx(expected, abs=1e-9)


def test_retrieval_accuracy_by_hand(refuses):
    database = np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [3.0, 0.0]])  # rows 0 and 3 tie: the first wins
    queries = np.array([[5.0, 1.0], [0.1, 9.0], [-1.0, 0.2], [0.0, -1.0]])
    assert best_matches(queries, database).tolist() == [0, 1, 2, 0]  # the last is orthogonal to 0, 2 and 3
    assert retrieval_accuracy(queries, database, [3, 1, 2, 0]) == 75.0
    with refuses(r"query embeddings: expected width 2, as the database has, found 3"):
        best_matches(np.ones((1, 3)), database)
    assert best_matches(queries * 1e-200, database * 1e300).tolist() == [0, 1, 2, 0]
    with refuses(r"query embeddings: expected real numbers, found <U1"):
        best_matches(np.array([["a"]]), database)
    with refuses(r"query embeddings: expected finite values, found NaN or infinity"):
        best_matches(np.full((1, 2), np.nan), database)
    with refuses(r"database embeddings: expected shape \(rows, width\), rows > 0, found \(0, 2\)"):
        best_matches(queries, np.zeros((0, 2)))
    with refuses(r"query embeddings: expected no row of zeros"):
        best_matches(np.zeros((1, 2)), database)
    with refuses(r"targets: expected 4, one a query, found 1"):
        retrieval_accuracy(queries, database, [0])


def test_best_matches_in_blocks_equals_the_full_matrix():
    rng = np.random.default_rng(0)
    queries, database = rng.normal(size=(2500, 6)), rng.normal(size=(70, 6))
    full = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (
        database / np.linalg.norm(database, axis=1)[:, None]).T
    np.testing.assert_array_equal(best_matches(queries, database), full.argmax(1))


def test_the_label_is_turned_around_once(refuses):
    assert backdoored([0, 1, 1]).tolist() == [1, 0, 0]  # the contest's 0 is a backdoored model
    assert detection_accuracy([1, 0, 1, 0], [0, 1, 1, 0]) == 50.0
    assert detection_accuracy([1, 0], [0, 1]) == 100.0
    with refuses(r"ground_truth: expected 0 \(backdoored\) or 1 \(clean\), found \[2\]"):
        backdoored([0, 2])
    with refuses(r"predictions: expected 0 \(clean\) or 1 \(backdoored\), found \[3\]"):
        detection_accuracy([3], [0])
    with refuses(r"predictions: expected shape \(2,\), not empty, found \(1,\)"):
        detection_accuracy([1], [0, 1])


def test_wrong_shapes_and_nan_are_refused(refuses):
    image_truth, image_scores, masks, maps = category(9)
    with refuses(r"image scores: expected shape \(9,\), as the truth, found \(8,\)"):
        anomaly_metrics(image_truth, image_scores[:8], masks, maps)
    with refuses(r"image scores: expected finite values, found NaN or infinity in images \[2\] \(from 0\)"):
        anomaly_metrics(image_truth, np.where(np.arange(9) == 2, np.nan, image_scores), masks, maps)
    with refuses(r"image scores: expected real numbers, found <U1"):
        anomaly_metrics(image_truth, np.full(9, "a"), masks, maps)
    spoilt = maps.copy()
    spoilt[5, 3, 3], spoilt[7, 0, 0] = np.nan, np.inf
    with refuses(r"pixel scores: expected finite values, found NaN or infinity in images \[5, 7\] \(from 0\)"):
        anomaly_metrics(image_truth, image_scores, masks, spoilt)
    with refuses(r"pixel scores: expected shape \(9, 24, 24\), as the truth, found \(9, 24, 23\)"):
        anomaly_metrics(image_truth, image_scores, masks, maps[..., 1:])
    with refuses(r"pixel truth: expected 9 masks, one an image, found 8"):
        anomaly_metrics(image_truth, image_scores, masks[:8], maps[:8])
    with refuses(r"pixel arrays: expected truth and scores, or neither, found one"):
        anomaly_metrics(image_truth, image_scores, masks, None)
    with refuses(r"pixel arrays: expected shape \(N, H, W\) or \(N, 1, H, W\), found \(9, 2, 24, 24\)"):
        anomaly_metrics(image_truth, image_scores, np.stack([masks, masks], 1), maps)


@pytest.mark.parametrize("block", [1, 3, 100])
def test_ranked_matches_agree_with_sorting_every_cosine(monkeypatch, block):
    monkeypatch.setattr(scoring, "BLOCK", block)
    rng = np.random.default_rng(0)
    database = rng.integers(-1, 2, (12, 4)) + 0.0  # many equal directions
    database[~database.any(1)] = 1
    queries, targets = database[rng.integers(0, 12, 9)] - 0.4, rng.integers(0, 12, 9)
    scores, rows, ranks = scoring.ranked_matches(queries, database, targets, 5)
    cosines = np.concatenate([part for _, part in scoring._cosine_blocks(queries, database)])
    slow = np.array([sorted(range(12), key=lambda g, row=row: (-row[g], g)) for row in cosines])
    np.testing.assert_array_equal(rows, slow[:, :5])
    np.testing.assert_array_equal(scores, np.take_along_axis(cosines, slow, 1)[:, :5])
    assert ranks.tolist() == [list(row).index(target) + 1 for row, target in zip(slow, targets, strict=True)]
    np.testing.assert_array_equal(rows[:, 0], scoring.best_matches(queries, database))


def test_a_small_database_is_ranked_whole():
    scores, rows, ranks = scoring.ranked_matches(np.eye(2), np.eye(2), np.array([1, 1]), 5)
    assert rows.tolist() == [[0, 1], [1, 0]] and scores.tolist() == [[1, 0], [1, 0]] and ranks.tolist() == [2, 1]
