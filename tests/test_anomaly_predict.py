"""The contest's function: shapes, range, order, small and bad sets; and that it finds defects."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import anomaly.predict as predict
from anomaly.backbone import BackboneConfig, extract, random_backbone
from anomaly.image_score import image_scores
from anomaly.lnamd import neighbourhood_features
from anomaly.pipeline import MuscConfig, PatchScores, category_scores, patch_scores, unit_range
from data.anomaly_tree import image_truth, pixel_truth, read_tree
from data.defects import write_anomaly_split

TINY = BackboneConfig("vit_tiny_patch16_224", (0, 1), (32, 48), (0.5,) * 3, (0.25,) * 3, arguments={
    "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "dynamic_img_size": True})


@pytest.fixture
def tiny(monkeypatch):
    """A small random net in place of the embedded one, on the CPU."""
    backbone = random_backbone(TINY, seed=0)
    monkeypatch.setenv("KIT_DEVICE", "cpu")
    monkeypatch.setattr(predict, "_backbones", lambda device: (backbone, backbone))
    return backbone


@pytest.fixture
def files(tmp_path):
    """Twelve noise images of different sizes."""
    rng = np.random.default_rng(0)
    paths = []
    for index in range(12):
        pixels = rng.integers(0, 256, (30 + index, 40, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{index:02d}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def by_hand(pictures, backbone, config):
    """Image by image with torch.cdist."""
    features, total = extract(backbone, pictures), 0
    for layer in features.layers:
        for degree in config.degrees:
            z = neighbourhood_features(layer, features.grid, degree)
            rows = []
            for i in range(len(z)):
                near = torch.stack([torch.cdist(z[i], z[j]).amin(1) for j in range(len(z)) if j != i])
                rows.append(near.sort(0).values[:max(1, int(config.keep * len(near)))].mean(0))
            total = total + torch.stack(rows)
    return total / (len(features.layers) * len(config.degrees))


def test_patch_scores_are_the_mean_over_layers_and_degrees(tiny):
    pictures = torch.randint(0, 256, (5, 3, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    exact = MuscConfig(precision="float32")
    found = patch_scores(pictures, tiny, exact)
    assert found.grid == (4, 6) and found.classes.shape == (5, 16)
    torch.testing.assert_close(found.scores, by_hand(pictures, tiny, exact), rtol=0, atol=1e-4)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 12])
def test_shapes_types_and_range_at_any_number_of_images(tiny, files, n):
    scores, maps = predict.predict_category(files[:n])
    assert scores.shape == (n,) and scores.dtype == np.float64
    assert maps.shape == (n, 1, 224, 224) and maps.dtype == np.float32
    for values in (scores, maps):
        assert np.isfinite(values).all() and values.min() == 0 and values.max() == 1


def test_the_order_of_paths_permutes_the_result(tiny, files):
    order = np.random.default_rng(1).permutation(len(files))
    scores, maps = predict.predict_category(files)
    moved, moved_maps = predict.predict_category([str(files[i]) for i in order])
    np.testing.assert_allclose(moved, scores[order], atol=1e-4)
    np.testing.assert_allclose(moved_maps, maps[order], atol=1e-4)


@pytest.mark.parametrize("constant", [True, False])
def test_images_all_alike_score_zero(tiny, tmp_path, constant):
    picture = Image.new("RGB", (40, 40), (9, 99, 199)) if constant else Image.effect_noise((40, 40), 90)
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path in paths:
        picture.save(path)
    scores, maps = predict.predict_category(paths)
    assert (scores == 0).all() and (maps == 0).all()


def test_a_second_backbone_makes_the_image_scores(tiny, files, monkeypatch):
    other = random_backbone(TINY, seed=5)
    alone, maps = predict.predict_category(files)
    monkeypatch.setattr(predict, "_backbones", lambda device: (tiny, other))
    scores, same_maps = predict.predict_category(files)
    assert np.array_equal(maps, same_maps) and not np.allclose(alone, scores)
    monkeypatch.setattr(predict, "_backbones", lambda device: (other, other))
    np.testing.assert_allclose(scores, predict.predict_category(files)[0], atol=1e-6)


def test_the_background_is_hidden_where_the_config_says_so(tiny, files, monkeypatch):
    monkeypatch.setattr(predict, "CONFIG", MuscConfig(foreground="on"))
    monkeypatch.setattr("anomaly.pipeline.background",
                        lambda images: torch.ones(len(images), 224, 224, dtype=torch.bool))
    scores, maps = predict.predict_category(files)
    assert (maps == 0).all() and scores.max() == 1


def test_fewer_than_two_images_are_refused(tiny, files, refuses):
    for paths in ([], files[:1]):
        with refuses(rf"^paths: expected >= 2 images of a category, found {len(paths)}$"):
            predict.predict_category(paths)


def test_an_unreadable_image_is_named(tiny, files, refuses):
    files[3].write_bytes(b"no image")
    with refuses(r"03.png: expected a readable image, found "):
        predict.predict_category(files)
    files[3].unlink()
    with refuses(r"03.png: expected an image, found no such file$"):
        predict.predict_category(files)


def test_image_scores_are_smoothed_and_scaled_over_the_category():
    scores = torch.rand(6, 12, generator=torch.Generator().manual_seed(0))
    given = PatchScores(scores, (3, 4), torch.eye(6))  # no image is like another
    found, maps = category_scores(given, given, MuscConfig(windows=(1, 3)))
    torch.testing.assert_close(found, unit_range(image_scores(scores)))
    torch.testing.assert_close(maps[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]], unit_range_of(scores, maps))


def test_an_untrained_class_token_smooths_nothing(tiny):
    pictures = torch.randint(0, 256, (5, 3, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    untrained = random_backbone(replace(TINY, class_features=False), seed=0)
    found = patch_scores(pictures, untrained, MuscConfig())
    assert found.classes is None and torch.equal(found.scores, patch_scores(pictures, tiny, MuscConfig()).scores)
    torch.testing.assert_close(category_scores(found, found, MuscConfig())[0], unit_range(image_scores(found.scores)))


def unit_range_of(scores, maps):
    """Corner patches under the scale of the maps."""
    whole = torch.nn.functional.interpolate(scores.view(6, 1, 3, 4), (224, 224), mode="bilinear", align_corners=True)
    return (scores.view(6, 3, 4)[:, [0, 0, -1, -1], [0, -1, 0, -1]] - whole.min()) / (whole.max() - whole.min())


def test_settings_that_cannot_work_are_refused(refuses):
    for changes, message in (({"degrees": (2,)}, "degrees: expected odd numbers from 1"),
                             ({"keep": 0}, "keep: expected a share"),
                             ({"windows": ()}, "windows: expected numbers of images from 1")):
        with refuses(f"^MuscConfig.{message}"):
            MuscConfig(**changes)


def test_the_embedded_backbone_finds_generated_defects(tmp_path, monkeypatch):
    """Well above chance on a set of another seed than the dev split; a smoke test, no figure to quote."""
    monkeypatch.setenv("KIT_DEVICE", "cpu")
    write_anomaly_split(tmp_path / "split", seed=12345, good=6, defective=4)
    found = []
    for category in read_tree(tmp_path / "split").categories:
        _, maps = predict.predict_category([image.path for image in category.images])
        found.append(roc_auc_score(pixel_truth(category).flatten().numpy(), maps.ravel()))
        assert image_truth(category).sum() == 4
    assert np.mean(found) > 0.7
