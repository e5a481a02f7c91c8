"""The stages of the pipeline on given features, each against its plain form."""
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import interpolate, normalize

import anomaly.pipeline as pipeline
from anomaly.backbone import Features
from anomaly.image_score import highest_of_map, two_highest
from anomaly.lnamd import neighbourhood_features
from anomaly.mutual_scoring import Window, mutual_scores
from anomaly.pipeline import Judges, MuscConfig, PatchScores, category_scores, feature_scores, unit_range
from anomaly.presets import PRESETS
from anomaly.snamd import similarity_weighted_features
from anomaly.tiles import Tiles

GRID = (3, 4)
EXACT = MuscConfig(precision="float32")


def some_features(n=6, layers=2, grid=GRID, width=16, seed=0, classes=True):
    generator = torch.Generator().manual_seed(seed)
    layers = tuple(torch.randn(n, grid[0] * grid[1], width, generator=generator) for _ in range(layers))
    return Features(layers, grid, normalize(torch.randn(n, 8, generator=generator), dim=-1) if classes else None)


def by_passes(features, passes):
    """Mean of the mutual scores of the given features."""
    return torch.stack([mutual_scores(z) for z in passes]).mean(0)


def test_scores_are_the_mean_over_layers_and_degrees():
    features = some_features()
    passes = [neighbourhood_features(layer, GRID, degree) for layer in features.layers for degree in (1, 3)]
    found = feature_scores(features, EXACT)
    torch.testing.assert_close(found.scores, by_passes(features, passes))
    torch.testing.assert_close(found.alike, features.classes)
    assert found.grid == GRID


def test_weighted_neighbourhoods_join_the_degrees():
    features = some_features()
    passes = [similarity_weighted_features(layer, GRID, (1, 3)) for layer in features.layers]
    found = feature_scores(features, replace(EXACT, aggregation="snamd"))
    torch.testing.assert_close(found.scores, by_passes(features, passes))


def test_good_and_earlier_images_judge_in_every_pass():
    features, good, earlier = some_features(), some_features(2, seed=1), some_features(3, seed=2)
    found = feature_scores(features, EXACT, judges=Judges(good, earlier))
    z = [[neighbourhood_features(layer, GRID, d) for layer in f.layers for d in (1, 3)]
         for f in (features, good, earlier)]
    expected = [mutual_scores(own, reference=g, earlier=e) for own, g, e in zip(*z, strict=True)]
    torch.testing.assert_close(found.scores, torch.stack(expected).mean(0))
    one = feature_scores(some_features(1, seed=3), EXACT, judges=Judges(good))
    assert one.scores.shape == (1, 12) and one.scores.isfinite().all()


@pytest.mark.parametrize("radius", [None, 1])
def test_tiles_are_one_pool_or_one_a_place(radius):
    tiles = Tiles(2, (4, 4), (2, 2))
    features = some_features(5 * 4, layers=1, grid=(4, 4))
    config = replace(EXACT, degrees=(3,), radius=radius)
    z = neighbourhood_features(features.layers[0], (4, 4), 3).view(5, 4, 16, 16)
    if radius is None:
        expected = mutual_scores(z.reshape(5, 64, 16)).view(5, 4, 16)
    else:
        expected = torch.stack([mutual_scores(z[:, t], window=Window((4, 4), 1)) for t in range(4)], 1)
    found = feature_scores(features, config, tiles=tiles)
    assert found.grid == (5, 5) and found.size == (10, 10)
    torch.testing.assert_close(found.scores, tiles.stitched(expected))
    torch.testing.assert_close(found.alike, normalize(features.classes.view(5, 4, 8).mean(1), dim=-1))


def test_images_alike_by_their_worst_patch():
    features = some_features(layers=3)
    found = feature_scores(features, replace(EXACT, smoothing="rscon"))
    z = neighbourhood_features(features.layers[1], GRID, 1)
    for image, scores in enumerate(found.scores):
        torch.testing.assert_close(found.alike[image], z[image, scores.argmax()])
    assert feature_scores(features, replace(EXACT, smoothing="none")).alike is None
    assert feature_scores(some_features(classes=False), EXACT).alike is None


def test_images_of_other_judges_are_weighed_alike():
    """SNAMD measures distances in those of the scored images: a twin among the judges has the same features."""
    own, wide = some_features(1), some_features(3, seed=1)
    layers = [torch.cat([mine, 5 * other]) for mine, other in zip(own.layers, wide.layers, strict=True)]
    good = Features(tuple(layers), GRID, None)
    config = replace(EXACT, aggregation="snamd", degrees=(1, 3), smoothing="none")
    assert feature_scores(own, config, judges=Judges(good)).scores.max() < 1e-5
    flat = Features(tuple(torch.ones_like(layer) for layer in some_features().layers), GRID, None)
    assert (feature_scores(flat, config).scores == 0).all()


def test_repeated_defects_are_left_out_where_asked(monkeypatch, refuses):
    features, seen = some_features(), []

    def all_of_image_two(distances, keep):
        seen.append(distances.shape)
        out = torch.zeros(distances.shape, dtype=torch.bool)
        out[:, 2] = True
        return out

    monkeypatch.setattr(pipeline, "shared_defects", all_of_image_two)
    found = feature_scores(features, replace(EXACT, consistent=True, keep=1.0, degrees=(1,)))
    for i in (0, 5):
        others = [j for j in range(6) if j not in (i, 2)]
        expected = []
        for layer in features.layers:
            z = neighbourhood_features(layer, GRID, 1)
            expected.append(torch.stack([torch.cdist(z[i], z[j]).amin(1) for j in others]).mean(0))
        torch.testing.assert_close(found.scores[i], torch.stack(expected).mean(0))
    assert seen == [(6, 6, 12)] * 2
    feature_scores(features, EXACT)
    assert len(seen) == 2
    with refuses("MuscConfig.consistent: expected False where reference or earlier images judge too, found True"):
        feature_scores(features, replace(EXACT, consistent=True), judges=Judges(some_features(2, seed=1)))


def given(n=6, seed=0, grid=GRID, alike=None):
    generator = torch.Generator().manual_seed(seed)
    return PatchScores(torch.rand(n, grid[0] * grid[1], generator=generator), grid, (21, 28), alike)


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_gives_constant_maps(name):
    """They would end the organizers' evaluation."""
    zero = PatchScores(torch.zeros(4, 12), GRID, (21, 28), None)
    images, maps = category_scores(zero, zero, PRESETS[name].scoring)
    assert (images == 0).all() and len(maps.unique()) > 100
    assert all(torch.equal(maps[0], other) for other in maps)


def test_image_scores_beside_other_judges_stay_as_they_are():
    found = given()
    images, maps = category_scores(found, found, MuscConfig(), alone=False)
    torch.testing.assert_close(images, two_highest(found.scores))
    assert torch.equal(maps, category_scores(found, found, MuscConfig())[1])


def test_image_scores_follow_the_rule_and_are_smoothed():
    found = given(alike=torch.eye(6))  # no image is like another: smoothing changes nothing
    for rule, expected in (("two_highest", two_highest(found.scores)),
                           ("highest", highest_of_map(found.scores, GRID, (21, 28)))):
        images, _ = category_scores(found, found, MuscConfig(image_score=rule, windows=(1, 3)))
        torch.testing.assert_close(images, unit_range(expected))
    alike = given(alike=torch.ones(6, 1))
    images, _ = category_scores(alike, alike, MuscConfig(windows=(6,)))
    assert images.std() < 1e-6  # all are alike: all get the mean
    maps = interpolate(found.scores.view(6, 1, 3, 4), (21, 28), mode="bilinear", align_corners=True)
    torch.testing.assert_close(highest_of_map(found.scores, GRID, (21, 28)), maps.amax((1, 2, 3)))


def test_maps_of_two_nets_are_averaged_in_deviations():
    first, second = given(), given(seed=1, grid=(2, 2))
    maps = [interpolate(part.scores.view(6, 1, *part.grid), (224, 224), mode="bilinear", align_corners=True)
            for part in (first, second)]
    expected = sum((m - m.mean()) / m.std() for m in maps)
    torch.testing.assert_close(category_scores(first, second, MuscConfig(maps="mean"))[1], unit_range(expected))
    torch.testing.assert_close(category_scores(first, second, MuscConfig())[1], unit_range(maps[0]))


def test_hidden_pixels_get_the_lowest_score(refuses):
    hidden = torch.zeros(6, 224, 224, dtype=torch.bool)
    hidden[1, :100] = True
    _, maps = category_scores(given(), given(), MuscConfig(), hidden)
    _, free = category_scores(given(), given(), MuscConfig())
    assert (maps[1, 0, :100] == 0).all() and torch.equal(maps[0], free[0])
    by_rule = MuscConfig(foreground="rule")
    assert torch.equal(category_scores(given(), given(), by_rule, hidden)[1], free)  # not the same in all images
    alike = torch.zeros(6, 224, 224, dtype=torch.bool)
    alike[:, :20] = alike[:, -20:] = alike[:, :, :20] = alike[:, :, -20:] = True
    inner = torch.zeros(6, 3, 4)
    inner[:, 1, 1:3] = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    middle = replace(given(), scores=inner.flatten(1))  # high scores lie where nothing is hidden
    assert (category_scores(middle, middle, by_rule, alike)[1][alike[:, None]] == 0).all()
    with refuses(r"^maps.shape: expected \(5, 1, H, W\) as the mask, found \(6, 1, 224, 224\)$"):
        category_scores(given(), given(), MuscConfig(), hidden[:5])


def test_calibration_keeps_range_and_order():
    _, maps = category_scores(given(), given(), MuscConfig(calibrated=True))
    _, plain = category_scores(given(), given(), MuscConfig())
    assert maps.shape == plain.shape and maps.min() >= 0 and maps.max() <= 1
    order = plain.flatten().argsort()
    assert (maps.flatten()[order].diff() >= 0).all()


def test_parts_of_a_category_are_joined_in_order():
    whole = given(alike=torch.eye(6))
    places = [torch.tensor([1, 4, 5]), torch.tensor([0, 2, 3])]
    parts = [replace(whole, scores=whole.scores[p], alike=whole.alike[p]) for p in places]
    found = PatchScores.joined(parts, places)
    assert torch.equal(found.scores, whole.scores) and torch.equal(found.alike, whole.alike)


def test_settings_that_cannot_work_are_refused(refuses):
    for changes, message in (({"degrees": (2,)}, "degrees: expected odd numbers from 1"),
                             ({"keep": 0}, "keep: expected a share"),
                             ({"radius": -1}, "radius: expected >= 0 patches or None, found -1"),
                             ({"subsets": -1}, "subsets: expected >= 0, found -1"),
                             ({"tiles": 0}, "tiles: expected >= 1, found 0"),
                             ({"precision": "double"}, "precision: expected one of auto, float32, half, found double"),
                             ({"windows": ()}, "windows: expected numbers of images from 1")):
        with refuses(f"^MuscConfig.{message}"):
            MuscConfig(**changes)


def test_features_kept_in_16_bits_are_compared_in_32():
    features = some_features()
    half = Features(tuple(layer.half() for layer in features.layers), GRID, features.classes)
    rounded = Features(tuple(layer.float() for layer in half.layers), GRID, features.classes)
    found = feature_scores(half, EXACT)
    assert found.scores.dtype == torch.float32
    assert torch.equal(found.scores, feature_scores(rounded, EXACT).scores)
