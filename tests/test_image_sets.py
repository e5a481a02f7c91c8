import struct

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from data.image_sets import ImageSet, read_digits, read_image_folder, read_mnist


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_image(path, value, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, value).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, 3 + 2 training and 1 + 1 test images; the red level names the image."""
    root = tmp_path / "signs"
    for i, name in enumerate(["cat/0", "cat/1", "cat/2", "dog/0", "dog/1"]):
        write_image(root / f"train/{name}.png", (i, 100, 200))
    write_image(root / "test/cat/0.png", (50, 0, 0))
    write_image(root / "test/dog/0.png", (60, 0, 0), size=(16, 12))
    return root


def test_digits_are_split_and_enlarged():
    train, test = read_digits()
    assert (len(train.images), len(test.images)) == (1438, 359)
    assert train.images.shape[1:] == (3, 16, 16) and train.images.is_contiguous()
    assert torch.equal(train.images[:, 0], train.images[:, 2])
    assert sorted(torch.cat([train.labels, test.labels]).tolist()) == sorted(load_digits().target.tolist())
    # averaging each 2x2 cell of the enlarged image nearly gives the small one back
    means = torch.cat([train.images, test.images])[:, 0].double().view(-1, 8, 2, 8, 2).mean((2, 4)).sum((1, 2))
    small = torch.from_numpy(load_digits().images).sum((1, 2)) * (255 / 16)
    torch.testing.assert_close(means.sort().values, small.sort().values, rtol=0.02, atol=20)


def test_the_digit_split_follows_its_seed():
    before = torch.get_rng_state()
    a, b, c = (read_digits(seed=seed, size=8)[1] for seed in (0, 0, 1))
    assert torch.equal(a.images, b.images) and not torch.equal(a.labels, c.labels)
    assert torch.equal(torch.get_rng_state(), before)


def test_mnist_is_padded(tmp_path, refuses):
    levels = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 256
    for half in ("train", "t10k"):
        write_idx(tmp_path / f"MNIST/raw/{half}-images-idx3-ubyte", levels)
        write_idx(tmp_path / f"MNIST/raw/{half}-labels-idx1-ubyte", np.array([7, 0, 9]))
    train, test = read_mnist(tmp_path)
    assert train.labels.tolist() == test.labels.tolist() == [7, 0, 9]
    assert train.images.shape == (3, 3, 32, 32)
    assert np.array_equal(train.images[:, 1, 2:30, 2:30].numpy(), levels)
    assert int(train.images.long().sum()) == 3 * int(levels.sum())  # nothing else is set
    small = read_mnist(tmp_path, size=16)[0].images
    assert small.shape == (3, 3, 16, 16) and small.is_contiguous()
    for whole, halved in zip(train.images[:, 0], small[:, 0], strict=True):
        expected = Image.fromarray(whole.numpy()).resize((16, 16), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(expected).astype(int) - halved.numpy().astype(int)).max() <= 1
    with refuses(r"elsewhere: expected MNIST/raw/\*-ubyte files, found"):
        read_mnist(tmp_path / "elsewhere")


def test_a_folder_is_read_in_order_into_one_tensor(folder):
    train, test = read_image_folder(folder, size=8)
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert train.labels.tolist() == [0, 0, 0, 1, 1] and test.labels.tolist() == [0, 1]
    assert train.images.shape == (5, 3, 8, 8) and train.images.is_contiguous()
    assert train.num_classes == 2 and train.name == "signs"
    assert test.images[1, 0].unique().tolist() == [60]  # resized from 16 x 12


def test_bad_folders_are_named(folder, refuses, tmp_path):
    with refuses(r"nowhere/train: expected a folder of class folders, found no such folder"):
        read_image_folder(tmp_path / "nowhere")
    (folder / "test/horse").mkdir()
    with refuses(r"test/horse: expected a class that .*train has, found horse"):
        read_image_folder(folder)
    (folder / "test/horse").rmdir()
    (folder / "train/horse").mkdir()
    with refuses(r"train/horse: expected at least one image, found none"):
        read_image_folder(folder)
    write_image(folder / "train/horse/0.png", 0)
    (folder / "train/cat/1.png").write_bytes(b"no image")
    with refuses(r"train/cat/1\.png: expected a readable image"):
        read_image_folder(folder)


def test_one_class_and_an_empty_half_are_named(tmp_path, refuses):
    write_image(tmp_path / "train/cat/0.png", 0)
    with refuses(r"train: expected at least two class folders, found 1"):
        read_image_folder(tmp_path)
    write_image(tmp_path / "train/dog/0.png", 0)
    (tmp_path / "test").mkdir()
    with refuses(r"test: expected at least one image, found none"):
        read_image_folder(tmp_path)


@pytest.mark.parametrize("images, labels, message", [
    (torch.zeros(2, 3, 4, 4), [0, 1], r"x images: expected \(N, C, H, W\) uint8, found \(2, 3, 4, 4\) torch.float32"),
    (torch.zeros(2, 4, 4, dtype=torch.uint8), [0, 1], r"x images: expected \(N, C, H, W\) uint8"),
    (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), [0], r"x labels: expected one for each of 2 images"),
    (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), [0, 5], r"x labels: expected in \[0, 2\), found 0 to 5"),
    (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), [], r"x images: expected at least one, found 0"),
])
def test_a_wrong_set_is_named(refuses, images, labels, message):
    with refuses(message):
        ImageSet(images, torch.tensor(labels, dtype=torch.long), 2, "x")
