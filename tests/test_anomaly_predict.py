"""The contest's function: shapes, range, order, small and bad sets; and that it finds defects."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

import anomaly.predict as predict
from anomaly.backbone import BackboneConfig, random_backbone
from anomaly.category import Nets
from anomaly.presets import preset
from data.anomaly_tree import image_truth, pixel_truth, read_tree
from data.defects import write_anomaly_split

TINY = BackboneConfig("vit_tiny_patch16_224", (0, 1), (32, 48), (0.5,) * 3, (0.25,) * 3, arguments={
    "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "dynamic_img_size": True})


@pytest.fixture
def tiny(monkeypatch):
    """A small random net in place of the embedded one, on the CPU."""
    backbone = random_backbone(TINY, seed=0)
    monkeypatch.setenv("KIT_DEVICE", "cpu")
    monkeypatch.setattr(predict, "_nets", lambda *_: Nets(backbone, backbone))
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
def test_images_all_alike_score_zero_and_maps_are_not_constant(tiny, tmp_path, constant):
    picture = Image.new("RGB", (40, 40), (9, 99, 199)) if constant else Image.effect_noise((40, 40), 90)
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path in paths:
        picture.save(path)
    scores, maps = predict.predict_category(paths)
    assert (scores == 0).all() and maps.min() >= 0 and maps.max() <= 1
    assert (maps == maps[:1]).all() and len(np.unique(maps)) > 200  # a rule of the place alone


def test_a_second_backbone_makes_the_image_scores(tiny, files, monkeypatch):
    other = random_backbone(TINY, seed=5)
    alone, maps = predict.predict_category(files)
    monkeypatch.setattr(predict, "_nets", lambda *_: Nets(tiny, other))
    scores, same_maps = predict.predict_category(files)
    assert np.array_equal(maps, same_maps) and not np.allclose(alone, scores)
    monkeypatch.setattr(predict, "_nets", lambda *_: Nets(other, other))
    np.testing.assert_allclose(scores, predict.predict_category(files)[0], atol=1e-6)


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


def test_the_preset_of_the_environment_decides(files, monkeypatch, refuses):
    seen = []
    monkeypatch.setenv("KIT_DEVICE", "cpu")
    monkeypatch.setattr(predict, "load_nets", lambda chosen, weights, device: seen.append((chosen.name, weights)))
    monkeypatch.setattr(predict, "score_category", lambda paths, nets, config: (config.degrees, paths))
    monkeypatch.setattr(predict, "_nets", predict._nets.__wrapped__)
    monkeypatch.setattr(predict, "_arrays", lambda scores, maps: scores)
    monkeypatch.delenv(predict.PRESET, raising=False)
    monkeypatch.delenv(predict.WEIGHTS, raising=False)
    assert predict.predict_category(files) == preset("embedded").scoring.degrees
    monkeypatch.setenv(predict.PRESET, "musc")
    monkeypatch.setenv(predict.WEIGHTS, "somewhere")
    assert predict.predict_category(files) == (1, 3, 5)
    assert seen == [("embedded", None), ("musc", Path("somewhere"))]
    monkeypatch.setenv(predict.PRESET, "best")
    with refuses(r"^preset: expected one of embedded, musc, report, musc-v2, found best$"):
        predict.predict_category(files)
