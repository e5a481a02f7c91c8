"""A category from files: groups, other judges, masks, memory, and what is refused."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from anomaly import category
from anomaly.backbone import Backbone, BackboneConfig, random_backbone
from anomaly.category import Nets, category_features, score_category, tiles_of
from anomaly.pipeline import Judges, MuscConfig, feature_scores

TINY = BackboneConfig("vit_tiny_patch16_224", (0, 1), (32, 48), (0.5,) * 3, (0.25,) * 3, arguments={
    "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "dynamic_img_size": True})
EXACT = MuscConfig(precision="float32", smoothing="none")


@pytest.fixture(scope="module")
def nets():
    return Nets(random_backbone(TINY, seed=0), random_backbone(replace(TINY, size=(32, 32)), seed=1))


@pytest.fixture
def files(tmp_path):
    """Nine noise images of different sizes."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{index:02d}.png" for index in range(9)]
    for index, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (30 + index, 40, 3), dtype=np.uint8)).save(path)
    return paths


def test_each_file_is_read_once_for_both_nets(nets, files, monkeypatch):
    read, real = [], category.read_rgb
    monkeypatch.setattr(category, "read_rgb", lambda path, **how: read.append(path) or real(path, **how))
    maps, images = category_features(files, nets, EXACT)
    assert sorted(read) == files
    assert maps.grid == (4, 6) and images.grid == (4, 4) and len(maps.layers[0]) == len(images.layers[0]) == 9


@pytest.mark.parametrize("subsets", [1, 2, 4])
def test_groups_score_themselves_and_come_back_in_order(nets, files, subsets):
    config, joined = replace(EXACT, subsets=subsets), []
    groups = category._groups(9, nets, config, 2)
    assert sorted(torch.cat(groups).tolist()) == list(range(9)) and len(groups) == subsets
    expected = torch.empty(9, 24)
    for group in groups:
        own = category_features([files[i] for i in group], nets, config)[0]
        expected[group] = feature_scores(own, config, tiles=tiles_of(nets.for_maps, config)).scores
    seen = category.category_scores

    def watched(for_maps, *rest, **more):
        joined.append(for_maps.scores)
        return seen(for_maps, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(category, "category_scores", watched)
        scores, maps = score_category(files, nets, config)
    torch.testing.assert_close(joined[0], expected)
    assert scores.isfinite().all() and maps.shape == (9, 1, 224, 224)


def test_little_memory_means_groups_and_a_warning(nets, files, monkeypatch, refuses):
    needed = category._bytes_an_image(nets, EXACT)
    monkeypatch.setattr(category, "free_bytes", lambda device: 2 * 5 * needed)
    with pytest.warns(UserWarning, match=r"^9 images are scored in 2 random groups: their features would take"):
        scores, _ = score_category(files, nets, EXACT)
    assert torch.equal(scores, score_category(files, nets, replace(EXACT, subsets=2))[0])
    monkeypatch.setattr(category, "free_bytes", lambda device: needed)
    with refuses(r"^images: expected memory for the features of 2 images at least, found \d+ MiB an image, \d+ MiB"):
        score_category(files, nets, EXACT)
    with refuses(r"^images: expected memory for the features of 2 images at least, found 5 groups of 9$"):
        score_category(files, nets, replace(EXACT, subsets=5))


def test_known_good_images_and_earlier_ones_judge(nets, files):
    both = Nets(nets.for_maps, nets.for_maps)
    earlier = category_features(files[5:], both, EXACT)
    found, _ = score_category(files[:3], both, EXACT, reference=files[3:5], earlier=earlier)
    layout = tiles_of(both.for_maps, EXACT)
    own, good = (category_features(part, both, EXACT)[0] for part in (files[:3], files[3:5]))
    patches = feature_scores(own, EXACT, tiles=layout, judges=Judges(good, earlier[0]))
    torch.testing.assert_close(found, category.category_scores(patches, patches, EXACT, alone=False)[0])
    scores, maps = score_category(files[:1], nets, EXACT, reference=files[1:2])  # one against one
    assert scores.shape == (1,) and scores > 0 and maps.isfinite().all()
    twin, _ = score_category(files[:1], nets, EXACT, reference=files[:1])
    assert twin == 0  # a score by itself says how much


@pytest.mark.parametrize("side", [2, 3])
def test_tiles_read_images_larger(nets, files, side):
    config = replace(EXACT, tiles=side)
    features = category_features(files[:2], nets, config)[0]
    assert len(features.layers[0]) == 2 * side ** 2
    assert tiles_of(nets.for_maps, config).canvas == ((4 * side - 3 * (side - 1)) * 8, (6 * side - 3 * (side - 1)) * 8)
    scores, maps = score_category(files[:4], nets, config)
    assert scores.isfinite().all() and maps.max() == 1


def test_masks_of_the_user_hide_pixels(nets, files):
    masks = torch.zeros(9, 50, 70, dtype=torch.bool)
    masks[:, :25] = True
    _, maps = score_category(files, nets, EXACT, masks=masks)
    assert (maps[:, :, :110] == 0).all() and maps[:, :, 115:].max() == 1


@pytest.mark.parametrize("setting", ["off", "on", "rule"])
def test_the_foreground_is_told_by_colour_where_the_config_says_so(nets, files, monkeypatch, setting):
    monkeypatch.setattr(category, "background", lambda images: torch.ones(len(images), 224, 224, dtype=torch.bool))
    _, maps = score_category(files, nets, replace(EXACT, foreground=setting))
    hidden = all(torch.equal(maps[0], other) for other in maps)  # nothing is left but what says nothing
    assert hidden == (setting == "on")  # the rule refuses to hide everything


@pytest.mark.parametrize("tiles", [1, 2])
def test_a_file_whose_features_are_not_finite_is_named(nets, files, monkeypatch, refuses, tiles):
    Image.new("RGB", (40, 30)).save(files[3])
    real = Backbone.normalised
    monkeypatch.setattr(Backbone, "normalised",  # a black image overflows
                        lambda self, images: real(self, images) / images.amax((1, 2, 3), keepdim=True).bool())
    config = replace(EXACT, tiles=tiles, subsets=2)
    with refuses(rf"^{files[3]} through vit_tiny_patch16_224: expected finite features, found NaN or infinity$"):
        score_category(files, nets, config)


def test_too_few_images_are_refused(nets, files, refuses):
    with refuses(r"^paths: expected >= 2 images of a category, found 1$"):
        score_category(files[:1], nets, EXACT)
    with refuses(r"^paths: expected >= 1 image of a category, found 0$"):
        score_category([], nets, EXACT, reference=files[:1])
    earlier = category_features(files[:2], nets, EXACT)
    with refuses(r"^earlier: expected features of 2 nets, found 1$"):
        score_category(files, nets, EXACT, earlier=earlier[:1])
