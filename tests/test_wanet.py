"""WaNet: its field, its decoys."""
import itertools
import math

import pytest
import torch

from data import wanet
from data.image_sets import ImageSet


def a_set(count=50, channels=3, size=32, classes=5):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % classes, classes, "noise")


def sampled(image, grid):
    """Bilinear sampling of one (C, H, W) image at (H, W, 2) places in [-1, 1], pixel by pixel, zeros outside."""
    channels, height, width = image.shape
    found = torch.zeros(channels, height, width)
    for row, column in itertools.product(range(height), range(width)):
        x = (grid[row, column, 0].item() + 1) / 2 * (width - 1)
        y = (grid[row, column, 1].item() + 1) / 2 * (height - 1)
        for j, i in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
            share = (1 - abs(y - j)) * (1 - abs(x - i))
            if 0 <= j < height and 0 <= i < width:
                found[:, row, column] += share * image[:, j, i].float()
    return found


def test_wanet_warps_along_its_field():
    images = a_set(count=2, size=11).images
    config = wanet.WaNetConfig()
    grid = wanet.warping_grid(11, 11, config)
    found = wanet.apply_trigger(images, config)
    for image, warped in zip(images, found, strict=True):
        assert (warped.float() - sampled(image, grid)).abs().max() <= 0.51  # whole grey levels


def test_wanet_shifts_by_a_fraction_of_a_pixel_at_any_size():
    for height, width in ((32, 32), (64, 16)):
        moved = wanet.warping_grid(height, width, wanet.WaNetConfig()) - wanet.identity_grid(height, width)
        pixels = (moved * torch.tensor([width - 1, height - 1]) / 2).abs().mean()
        assert 0.1 < pixels < 0.4


def test_wanet_decoys_have_fields_of_their_own_and_true_labels():
    clean = a_set(count=60)
    found = wanet.poison(clean, wanet.WaNetConfig(), ratio=0.1, target=3, seed=1)
    assert len(found.poisoned) == 6 and len(found.decoys) == 12
    assert set(found.decoys.tolist()).isdisjoint(found.poisoned.tolist())
    assert torch.equal(found.labels[found.decoys], clean.labels[found.decoys])
    assert found.decoys.tolist() == sorted(found.decoys.tolist())
    warped = found.trigger(clean.images[found.decoys])
    differing = (found.images[found.decoys] != warped).flatten(1).double().mean(1)
    assert (differing > 0.5).all()
    assert len(wanet.poison(clean, wanet.WaNetConfig(), ratio=0.5, target=3, seed=1).decoys) == 30  # no more than are left
    bare = wanet.poison(clean, wanet.WaNetConfig(noise=0), ratio=0.1, target=0, seed=0)
    assert len(bare.decoys) == 0


@pytest.mark.parametrize("wrong, message", [
    ({"cells": 1}, r"WaNetConfig\.cells: expected >= 2, found 1"),
    ({"strength": 0}, r"WaNetConfig\.strength: expected > 0, found 0"),
    ({"noise": -1}, r"WaNetConfig\.noise: expected >= 0, found -1"),
])
def test_wrong_configs_are_named(refuses, wrong, message):
    with refuses(message):
        wanet.WaNetConfig(**wrong)
