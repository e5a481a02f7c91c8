"""The generated anomaly set: same seed same bytes, valid layout, masks that lie where the images changed."""
import numpy as np
import pytest
import torch

from data.anomaly_tree import check_category, pixel_truth, read_tree
from data.defects import CATEGORIES, write_anomaly_split
from data.images import read_rgb


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("defects") / "split"
    write_anomaly_split(folder, seed=3, good=2, defective=8)
    return folder


def test_the_layout_is_the_organizers(root):
    tree = read_tree(root)
    assert tree.problems == () and [c.name for c in tree.categories] == sorted(CATEGORIES)
    for category in tree.categories:
        assert category.has_masks and check_category(category) == (category, ())
        kinds = [i.kind for i in category.images]
        assert len(kinds) == 10 and kinds.count("good") == 2 and len(set(kinds)) == 5  # four kinds of defect, two each


def test_every_defect_has_a_mask_of_sensible_size(root):
    for category in read_tree(root).categories:
        share = pixel_truth(category).flatten(1).float().mean(1)
        for image, found in zip(category.images, share.tolist(), strict=True):
            assert (0.0002 < found < 0.25) if image.is_anomaly else found == 0, image.path


def test_one_category_is_not_square_and_images_differ(root):
    sizes = {c.name: read_rgb(c.images[0].path).size for c in read_tree(root).categories}
    assert any(w != h for w, h in sizes.values())
    assert all(224 <= w <= 256 for w, _ in sizes.values())
    for category in read_tree(root).categories:
        assert len({i.path.read_bytes() for i in category.images}) == len(category.images)


@pytest.mark.parametrize("name", sorted(CATEGORIES))
def test_outside_the_mask_the_defect_changes_nothing(name, monkeypatch):
    """Without the camera: pixels of opacity 0 stay to the bit, those of full opacity are seen to change."""
    monkeypatch.setattr("data.defects._photographed", lambda rng, image: image)
    blended = []
    monkeypatch.setattr("data.defects._blend", lambda image, alpha, other: blended.append((image.copy(), alpha)) or (
        image + alpha[..., None] * (other - image)))
    render, kinds = CATEGORIES[name]
    for kind in kinds:
        blended.clear()
        image, alpha = render(np.random.default_rng(1), kind)
        for before in [image for image, used in blended if used is alpha]:  # not the cap put on its table
            assert np.array_equal(before[alpha == 0], image[alpha == 0])
            assert np.abs(before - image)[alpha >= 0.9].mean() > 0.01
        assert alpha.shape == image.shape[:2] and alpha.max() > 0.3 and alpha.min() >= 0 and alpha.max() <= 1


def test_the_seed_decides(tmp_path):
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_anomaly_split(tmp_path / name, seed=seed, good=1, defective=1)
    read = {n: {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.png")} for n in "abc"}
    assert read["a"] == read["b"] and read["a"].keys() == read["c"].keys()
    assert all(read["a"][p] != read["c"][p] for p in read["a"] if "test" in p.parts)
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()


def test_bad_calls_are_refused_and_leave_nothing(tmp_path, refuses):
    with refuses(r"^good: expected >= 1, found 0$"):
        write_anomaly_split(tmp_path / "x", seed=0, good=0)
    with refuses(r"^defective: expected >= 0, found -1$"):
        write_anomaly_split(tmp_path / "x", seed=0, defective=-1)
    assert list(tmp_path.iterdir()) == []
    with refuses("expected a path where nothing lies yet"):
        write_anomaly_split(tmp_path, seed=0)
