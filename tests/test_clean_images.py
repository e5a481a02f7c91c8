import copy
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
from PIL import Image

from backdoor_detection.clean_images import (
    draw_balanced,
    draw_images,
    fit_channels,
    label_of,
    pixel_scale,
    read_clean_images,
    with_size,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)
RESIZED = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
PLAIN = transforms.Compose([transforms.ToTensor()])
GREY = transforms.Compose([transforms.Grayscale(), transforms.ToTensor(), transforms.Normalize((0.5,), (0.25,))])


def write(folder, names, size=(8, 8), seed=0):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    for name in names:
        Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / name)
    return folder


def read(folder, transformation=RESIZED, size=None, channels=3, seed=0, **options):
    return read_clean_images(folder, transformation, size=size, channels=channels,
                             generator=torch.Generator().manual_seed(seed), **options)


def pixels_of(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255


def test_images_come_by_name_with_labels_and_pixel_space(tmp_path):
    folder = write(tmp_path / "a", ["10_2.png", "9_0.png", "100_1.png"])
    found = read(folder)
    assert found.pixels.shape == (3, 3, 8, 8) and found.pixels.dtype == torch.float32
    assert found.labels.tolist() == [1, 2, 0] and found.labels.dtype == torch.int64
    expected = torch.stack([pixels_of(folder / name) for name in ("100_1.png", "10_2.png", "9_0.png")])
    torch.testing.assert_close(found.unit(), expected)
    torch.testing.assert_close(found.pixels, (expected - found.mean[:, None, None]) / found.std[:, None, None])
    torch.testing.assert_close(found.mean, torch.tensor(MEAN))
    torch.testing.assert_close(found.std, torch.tensor(STD))


def test_size_replaces_every_resize_and_the_transform_stays(tmp_path):
    folder = write(tmp_path / "a", ["0_0.png"])
    shown = str(RESIZED)
    assert read(folder, size=12).pixels.shape == (1, 3, 12, 12)
    assert read(folder, PLAIN, size=12).pixels.shape == (1, 3, 8, 8)
    assert str(RESIZED) == shown


@pytest.mark.parametrize("name, label", [
    ("12_3.jpg", 3), ("0_0.png", 0), ("7_042.png", 42), ("12.jpg", -1), ("img_3.jpg", -1), ("1_2_3.jpg", -1),
    ("cat.png", -1), ("1_-3.jpg", -1), ("5_99999999999999999999.jpg", -1)])
def test_labels_stand_in_the_names(name, label):
    assert label_of(Path(name)) == label


def test_names_without_labels_do(tmp_path):
    assert read(write(tmp_path / "a", ["cat.png", "1_4.png", "dog_1.png"])).labels.tolist() == [4, -1, -1]


def test_a_large_folder_is_drawn_from_evenly_over_the_labels(tmp_path):
    labels = [0] * 12 + [1] * 4 + [2]
    folder = write(tmp_path / "a", [f"{i}_{label}.png" for i, label in enumerate(labels)])
    found, other = read(folder, limit=7), read(folder, limit=7, seed=1)
    assert Counter(found.labels.tolist()) == Counter(other.labels.tolist()) == {0: 3, 1: 3, 2: 1}
    assert not torch.equal(found.pixels, other.pixels)
    assert torch.equal(found.pixels, read(folder, limit=7).pixels)


@pytest.mark.parametrize("labels, limit", [([3] * 5 + [-1] * 4 + [0], 5), ([-1] * 9, 4), ([1, 2], 5), ([0, 1], 2)])
def test_a_draw_is_as_balanced_as_can_be(labels, limit):
    drawn = draw_balanced(labels, limit, generator=torch.Generator().manual_seed(0))
    assert drawn == sorted(set(drawn)) and len(drawn) == min(limit, len(labels))
    taken, there = Counter(labels[i] for i in drawn), Counter(labels)
    fewest = min((taken[k] for k in there if taken[k] < there[k]), default=limit)  # of those not exhausted
    assert max(taken.values()) <= fewest + 1


def test_unlabelled_images_are_all_as_likely():
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(i for _ in range(600) for i in draw_balanced([-1] * 6, 2, generator=generator))
    assert all(150 < drawn[i] < 250 for i in range(6))  # 200 expected, standard deviation 12


@pytest.mark.parametrize("available, count, distinct", [(30, 30, 30), (50, 30, 30), (1, 30, 1)])
def test_draws_repeat_only_where_images_are_few(available, count, distinct):
    drawn = draw_images(available, count, generator=torch.Generator().manual_seed(0))
    assert len(drawn) == count and drawn.min() >= 0 and drawn.max() < available
    assert len(drawn.unique()) == distinct


def test_every_resize_is_set_and_nothing_else():
    bicubic = transforms.InterpolationMode.BICUBIC
    inner = transforms.Compose([transforms.Resize(224, bicubic), transforms.ToTensor()])
    found = with_size(transforms.Compose([inner, transforms.Resize((9, 7))]), 128)
    first, second = found.transforms[0].transforms[0], found.transforms[1]
    assert first.size == second.size == (128, 128) and first.interpolation == bicubic
    assert inner.transforms[0].size == 224
    assert with_size(inner.transforms[1], 128) is inner.transforms[1]


def test_one_channel_is_repeated_and_three_are_averaged(tmp_path):
    folder = write(tmp_path / "a", ["0_0.png"])
    one, three = read(folder, GREY, channels=1), read(folder, GREY, channels=3)
    assert one.pixels.shape == (1, 1, 8, 8) and one.mean.tolist() == [0.5]
    assert torch.equal(three.pixels, one.pixels.expand(1, 3, 8, 8)) and three.std.tolist() == [0.25] * 3
    torch.testing.assert_close(three.unit(), one.unit().expand(1, 3, 8, 8))
    averaged = read(folder, channels=1)
    torch.testing.assert_close(averaged.pixels, read(folder).pixels.mean(1, keepdim=True))


def test_pixel_space_holds_for_averaged_channels(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(grey).save(folder / "0_0.png")
    averaged = read(folder, channels=1)
    torch.testing.assert_close(averaged.unit()[0, 0], torch.from_numpy(grey) / 255)
    white = fit_channels((torch.ones(3, 1, 1) - torch.tensor(MEAN)[:, None, None])
                         / torch.tensor(STD)[:, None, None], 1, "white")
    torch.testing.assert_close(white[0, 0, 0] * averaged.std[0] + averaged.mean[0], torch.tensor(1.0))


def test_the_last_normalize_counts():
    first, last = transforms.Normalize(MEAN, STD), transforms.Normalize(0.5, (0.1, 0.2, 0.3))
    mean, std = pixel_scale(transforms.Compose([first, transforms.Compose([last, transforms.CenterCrop(4)])]), 3)
    assert mean.tolist() == [0.5] * 3
    torch.testing.assert_close(std, torch.tensor((0.1, 0.2, 0.3)))
    assert [part.tolist() for part in pixel_scale(PLAIN, 2)] == [[0, 0], [1, 1]]
    assert [part.tolist() for part in pixel_scale(lambda image: image, 1)] == [[0], [1]]


def test_greyscale_files_and_a_single_image_do(tmp_path):
    Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7)).save(tmp_path / "0_1.png")
    found = read(tmp_path, PLAIN)
    assert found.pixels.shape == (1, 3, 5, 7) and torch.equal(found.pixels[0, 0], found.pixels[0, 2])


def test_unequal_sizes_become_the_commonest(tmp_path):
    write(tmp_path, ["0_0.png"], size=(6, 9))
    write(tmp_path, ["1_0.png", "2_0.png"], size=(5, 7))
    found = read(tmp_path, PLAIN)
    assert found.pixels.shape == (3, 3, 7, 5)
    assert torch.equal(found.pixels[2], pixels_of(tmp_path / "2_0.png"))
    torch.testing.assert_close(found.pixels[0].mean(), pixels_of(tmp_path / "0_0.png").mean(), atol=0.05, rtol=0)


def test_a_random_transform_follows_the_generator_and_leaves_the_global_ones(tmp_path):
    folder = write(tmp_path / "a", [f"{i}_0.png" for i in range(3)])
    wild = transforms.Compose([transforms.RandomOrder([transforms.RandomCrop(8, padding=4),
                                                       transforms.RandomVerticalFlip()]), transforms.ToTensor()])
    before = torch.get_rng_state(), random.getstate(), copy.deepcopy(np.random.get_state()[1]).tolist()
    a, b, c = (read(folder, wild, seed=seed).pixels for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


class Failing:
    def __call__(self, image):
        raise KeyError("no such thing")


@pytest.mark.parametrize("transformation, message", [
    (Failing(), r"0_0\.png: expected a transform that takes this image, found KeyError: 'no such thing'"),
    (transforms.Compose([]), r"0_0\.png: expected a transform that gives a \(C, H, W\) tensor, found Image"),
    (lambda image: torch.zeros(8, 8), r"gives a \(C, H, W\) tensor, found shape \(8, 8\)"),
    (lambda image: torch.zeros(3, 0, 8), r"gives a \(C, H, W\) tensor, found shape \(3, 0, 8\)"),
    (lambda image: torch.zeros(2, 8, 8), r"0_0\.png: expected 3 channels, as the model takes, found 2"),
    (lambda image: torch.full((3, 8, 8), float("nan")), "expected a transform that gives finite numbers, found NaN"),
    (transforms.PILToTensor(), r"tensor of floating point, found torch\.uint8"),
])
def test_a_transform_that_does_not_do_is_named(tmp_path, refuses, transformation, message):
    folder = write(tmp_path / "a", ["0_0.png"])
    state = random.getstate()
    with refuses(message):
        read(folder, transformation)
    assert random.getstate() == state


def test_bad_folders_and_limits_are_named(tmp_path, refuses):
    with refuses("nowhere: expected a folder of clean images, found no such folder"):
        read(tmp_path / "nowhere")
    with refuses("expected at least one image, found none"):
        read(tmp_path)
    with refuses("limit: expected >= 1 image, found 0"):
        read(tmp_path, limit=0)
    (tmp_path / "0_1.png").write_bytes(b"no image")
    with refuses(r"0_1\.png: expected a readable image"):
        read(tmp_path)
