from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.unlearnable import make_unlearnable
from defense import predict, purification
from defense.dvae import NOT_FINITE, DVAEConfig, purify
from defense.dvae_network import NetworkConfig
from defense.dvae_stage import StageConfig
from defense.purification import png_names, purify_folder, read_equal, shipped_config, tree_images
from tests.test_dvae import a_set, ticking

QUICK = StageConfig(epochs=1, batch=8, network=NetworkConfig(width=4, latent=6))
CONFIG = DVAEConfig(first=QUICK, second=QUICK)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("KIT_DEVICE", "cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def a_tree(root, names=("cat/b.png", "cat/a.png", "cat/deep/c.jpg", "dog/a.png", "dog/z.bmp"), size=(8, 8)):
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / name)
    return root


def tree_of(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_names_and_classes_are_kept_and_files_hold_what_purify_gives(tmp_path):
    train, out = a_tree(tmp_path / "train"), tmp_path / "out"
    before = {p: p.read_bytes() for p in train.rglob("*") if p.is_file()}
    lines = []
    found = purify_folder(train, out, generator=generator(), config=CONFIG, report=lines.append)
    assert tree_of(out) == ["cat/a.png", "cat/b.png", "cat/deep/c.png", "dog/a.png", "dog/z.png"]
    assert {p: p.read_bytes() for p in before} == before
    files, labels = tree_images(train)
    assert [f.name for f in files] == ["a.png", "b.png", "c.jpg", "a.png", "z.bmp"]
    assert labels.tolist() == [0, 0, 0, 1, 1]
    alone = purify(read_equal(files), labels, CONFIG, generator=generator())
    written = read_equal(sorted(out.rglob("*.png")))
    assert torch.equal(written, alone.images) and torch.equal(found.images, alone.images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "train"]  # nothing is left beside them
    assert [line.split(":")[0] for line in lines] == ["stage 1, epoch 1/1", "stage 2, epoch 1/1"]


def test_a_set_that_a_gpu_cannot_hold_stays_on_the_cpu_and_gives_the_same(tmp_path, monkeypatch):
    train, given = a_tree(tmp_path / "train"), []
    images = read_equal(tree_images(train)[0])
    elsewhere = torch.device("meta")  # stands for a GPU
    for free, place in ((6 * images.numel(), "meta"), (6 * images.numel() - 1, "cpu")):
        monkeypatch.setattr(purification, "free_bytes", lambda device, free=free: free)
        assert purification.placed(images, elsewhere).device.type == place
    monkeypatch.setattr(purification, "purify", lambda images, labels, config, **more:
                        given.append((images.device, more["device"])) or purify(images, labels, config, **more))
    found = purify_folder(train, tmp_path / "out", generator=generator(), config=CONFIG)
    assert given == [(torch.device("cpu"),) * 2]
    monkeypatch.setattr(purification, "free_bytes", lambda device: 1 << 40)
    whole = purify_folder(train, tmp_path / "other", generator=generator(), config=CONFIG)
    assert torch.equal(found.images, whole.images)


def test_a_call_that_was_stopped_goes_on(tmp_path, monkeypatch):
    train, out = a_tree(tmp_path / "train"), tmp_path / "out"
    whole = purify_folder(train, tmp_path / "other", generator=generator(), config=CONFIG)

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(purification, "_write_tree", stopped)
        with pytest.raises(KeyboardInterrupt):
            purify_folder(train, out, generator=generator(), config=CONFIG)
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr("defense.dvae.train_stage", stopped)  # nothing is trained again
        again = purify_folder(train, out, generator=generator(), config=CONFIG)
    assert torch.equal(again.images, whole.images) and len(tree_of(out)) == 5
    assert not (tmp_path / ".out.partial").exists()


def test_nothing_is_overwritten(tmp_path, refuses):
    train = a_tree(tmp_path / "train")
    (tmp_path / "out").mkdir()
    with refuses("out: expected a path where nothing lies yet, found an existing file or folder"):
        purify_folder(train, tmp_path / "out", generator=generator(), config=CONFIG)


def test_a_path_that_cannot_become_the_result_is_refused_before_training(tmp_path, monkeypatch, refuses):
    monkeypatch.setattr(purification, "purify", lambda *_, **__: pytest.fail("trained"))
    train = a_tree(tmp_path / "train")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "other").symlink_to(train)
    for out, message in (("train/out", "a path outside .*train, which stays as it is, found one inside"),
                         ("train/cat/out", "a path outside .*train"), ("other/out", "a path outside .*train"),
                         ("link", "a path where nothing lies yet"), ("train", "a path where nothing lies yet"),
                         ("new/..", "a new folder's name at the end"),
                         ("file/out", "a path where a folder can be made")):
        with refuses(message):
            purify_folder(train, tmp_path / out, generator=generator(), config=CONFIG)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "other", "train"] and len(tree_of(train)) == 5


def test_two_calls_at_once_do_not_disturb_each_other_and_the_second_result_is_not_lost(tmp_path, monkeypatch, refuses):
    train, out, write = a_tree(tmp_path / "train"), tmp_path / "out", purification._write_tree

    def meanwhile(*given):
        monkeypatch.setattr(purification, "_write_tree", write)
        write(*given)
        purify_folder(train, out, generator=generator(), config=CONFIG)  # another call, done while this one writes

    monkeypatch.setattr(purification, "_write_tree", meanwhile)
    with refuses(r"out: expected nothing there still; the purified images lie in .*/images-\w+, found a file"):
        purify_folder(train, out, generator=generator(), config=CONFIG)
    (kept,) = (tmp_path / ".out.partial").iterdir()
    assert tree_of(kept) == tree_of(out)
    assert len(tree_of(out)) == 5 and out.stat().st_mode & 0o777 == 0o755


def test_a_call_outlives_that_another_one_clears_away(tmp_path, monkeypatch):
    train, whole = a_tree(tmp_path / "train"), purification.purify

    def meanwhile(*given, **more):
        found = whole(*given, **more)
        purification._clear(more["kept"].parent)  # as another call does when it ends
        return found

    monkeypatch.setattr(purification, "purify", meanwhile)
    purify_folder(train, tmp_path / "out", generator=generator(), config=CONFIG)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "train"] and len(tree_of(tmp_path / "out")) == 5


def test_a_link_to_an_image_is_one_and_a_broken_one_is_named(tmp_path, refuses):
    train = a_tree(tmp_path / "train")
    (train / "cat/l.png").symlink_to(train / "dog/a.png")
    assert [f.name for f in tree_images(train)[0]] == ["a.png", "b.png", "c.jpg", "l.png", "a.png", "z.bmp"]
    (train / "dog/m.png").symlink_to(train / "nothing.png")
    with refuses("dog/m.png: expected an image, found no such file"):
        purify_folder(train, tmp_path / "out", generator=generator(), config=CONFIG)


def test_training_that_meets_nan_is_told_from_a_short_limit(tmp_path, monkeypatch, refuses):
    train = a_tree(tmp_path / "train")
    wild = StageConfig(epochs=1, batch=8, weight=1e38, rate_limit=1e38, network=NetworkConfig(width=4, latent=6))
    with refuses("train: expected images that give finite numbers in training, found stage 1: no finite epoch"):
        purify_folder(train, tmp_path / "out", generator=generator(), config=DVAEConfig(first=wild, second=QUICK))
    whole = purification.purify
    monkeypatch.setattr(purification, "purify", lambda *given, **more: replace(
        whole(*given, **more), complete=False, details={NOT_FINITE: [2]}))
    with pytest.warns(UserWarning, match="train: NaN or infinity in stage 2 cut the training short: 1 epochs of"):
        purify_folder(train, tmp_path / "out", generator=generator(), config=CONFIG)


def test_names_that_would_coincide_keep_their_ending(tmp_path):
    train = a_tree(tmp_path / "train", ("a/x.png", "a/x.bmp", "a/y.bmp"))
    purify_folder(train, tmp_path / "out", generator=generator(), config=CONFIG)
    assert tree_of(tmp_path / "out") == ["a/x.bmp.png", "a/x.png.png", "a/y.png"]
    assert len(set(png_names([p.relative_to(train) for p in tree_images(train)[0]]))) == 3
    assert [str(name) for name in png_names([Path("x.png"), Path("x.bmp"), Path("x.bmp.gif"), Path("y.v1.gif")])] == [
        "x.png.png", "x.bmp.png", "x.bmp.gif.png", "y.v1.png"]  # the third one's shorter name is the second's


def test_hidden_files_and_other_kinds_are_left_out(tmp_path):
    train = a_tree(tmp_path / "train", ("a/x.png", "a/.y.png", ".b/z.png", "a/.t/z.png"))
    (train / "a" / "readme.txt").write_text("no image")
    assert [p.name for p in tree_images(train)[0]] == ["x.png"]


@pytest.mark.parametrize("spoil, message", [
    (lambda root: (root / "empty").mkdir(), "train/empty: expected at least one image, found none"),
    (lambda root: (root / "cat/a.png").write_bytes(b"no image"), "train/cat/a.png: expected a readable image"),
    (lambda root: Image.new("RGB", (9, 8)).save(root / "dog/a.png"),
     "train/dog/a.png: expected 8 x 8 pixels as a.png, all images of one size: resize them first, found 9 x 8")])
def test_bad_trees_are_refused(spoil, message, tmp_path, refuses):
    train = a_tree(tmp_path / "train")
    spoil(train)
    with refuses(message):
        purify_folder(train, tmp_path / "out", generator=generator(), config=CONFIG)
    assert not (tmp_path / "out").exists()


def test_missing_and_empty_folders_are_refused(tmp_path, refuses):
    with refuses("none: expected a folder of class folders, found no such folder"):
        purify_folder(tmp_path / "none", tmp_path / "out", generator=generator())
    (tmp_path / "void").mkdir()
    with refuses("void: expected at least one class folder, found none"):
        purify_folder(tmp_path / "void", tmp_path / "out", generator=generator())
    with refuses("limit_s: expected > 0 seconds, found 0"):
        purify_folder(tmp_path / "void", tmp_path / "out", generator=generator(), limit_s=0)


def test_a_limit_cuts_the_training_short_and_says_so(tmp_path):
    train = a_tree(tmp_path / "train")
    long = StageConfig(epochs=50, batch=8, network=NetworkConfig(width=4, latent=6))
    with pytest.warns(UserWarning, match=r"limit of 100 s cut the training short: \d+ epochs of stage 1, \d+ epochs"):
        found = purify_folder(train, tmp_path / "out", generator=generator(), config=DVAEConfig(long, long),
                              limit_s=100, clock=ticking(0.5))
    assert not found.complete and len(tree_of(tmp_path / "out")) == 5


def test_a_limit_that_leaves_no_time_writes_nothing(tmp_path, refuses):
    train = a_tree(tmp_path / "train")
    with refuses("train: expected time enough to purify within 1 s, found stage 1: no time for an epoch"):
        purify_folder(train, tmp_path / "out", generator=generator(), config=CONFIG, limit_s=1, clock=ticking(0.3))
    assert not (tmp_path / "out").exists()


def test_the_entry_point_ships_the_published_settings_by_size(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(purification, "purify", lambda images, labels, config, **more: asked.append((config, more)) or
                        purify(images, labels, CONFIG, **more))
    train = a_tree(tmp_path / "train")
    assert predict.purify_dataset(train, tmp_path / "out") is None
    config, more = asked[0]
    assert config == shipped_config(8, 8) == DVAEConfig(perturbations=False)
    assert (config.first.epochs, config.first.rate_limit, config.second.rate_limit) == (60, 1.0, 3.0)
    assert more["deadline"].end - more["deadline"].start == pytest.approx(0.95 * 3 * 3600, abs=60)
    assert shipped_config(60, 1000) == shipped_config(1000, 60) == shipped_config(224, 224)
    large = shipped_config(224, 224)
    assert (large.first.network.halvings, large.second.epochs, large.first.rate_limit) == (3, 20, 1.5)


def test_without_perturbations_the_images_are_the_same():
    bad = make_unlearnable("lsp", a_set(), {"patch": 4}, ratio=1.0, seed=0)
    with_them = purify(bad.images, bad.labels, CONFIG, generator=generator())
    without = purify(bad.images, bad.labels, DVAEConfig(QUICK, QUICK, perturbations=False), generator=generator())
    assert torch.equal(with_them.images, without.images) and without.perturbations is None
