"""Cutting and stitching: pixels, places and averages."""
import pytest
import torch

from anomaly.tiles import OVERLAP, Tiles


def test_one_tile_is_the_image():
    tiles = Tiles(1, (2, 3), (4, 5))
    images = torch.rand(2, 3, 8, 15)
    assert tiles.canvas == (8, 15) and torch.equal(tiles.cut(images), images)
    scores = torch.rand(2, 1, 6)
    assert torch.equal(tiles.stitched(scores), scores[:, 0])


@pytest.mark.parametrize("side", [2, 3])
def test_stitching_the_patch_means_of_tiles_gives_those_of_the_canvas(side):
    tiles = Tiles(side, (5, 7), (2, 3))
    assert tiles.whole == (side * 5 - (side - 1) * OVERLAP, side * 7 - (side - 1) * OVERLAP)
    images = torch.rand(2, 1, *tiles.canvas, dtype=torch.float64)
    means = torch.nn.functional.avg_pool2d(tiles.cut(images), (2, 3)).flatten(1).view(2, side ** 2, 35)
    expected = torch.nn.functional.avg_pool2d(images, (2, 3)).flatten(1)
    torch.testing.assert_close(tiles.stitched(means), expected)


def test_overlaps_are_averaged():
    tiles = Tiles(2, (4, 4), (1, 1))
    scores = torch.zeros(1, 4, 16)
    scores[0, 3] = 8.0  # the last tile alone
    whole = tiles.stitched(scores).view(5, 5)
    assert whole[0].tolist() == [0] * 5 and whole[2, 2] == 2 and whole[4, 2] == 4 and whole[4, 4] == 8


def test_wrong_shapes_are_named(refuses):
    with refuses(r"^Tiles.side: expected >= 1, found 0$"):
        Tiles(0, (4, 4), (2, 2))
    with refuses(r"^Tiles.grid: expected more than 3 patches a side, found \(3, 9\)$"):
        Tiles(2, (3, 9), (2, 2))
    with refuses(r"^images.shape: expected \(N, C, 10, 10\), found \(1, 3, 9, 10\)$"):
        Tiles(2, (4, 4), (2, 2)).cut(torch.zeros(1, 3, 9, 10))
    with refuses(r"^scores.shape: expected \(N, 4, 16\), found \(1, 4, 15\)$"):
        Tiles(2, (4, 4), (2, 2)).stitched(torch.zeros(1, 4, 15))
