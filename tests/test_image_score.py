"""Image scores by hand, and maps against bilinear interpolation written out."""
import pytest
import torch

from anomaly.image_score import score_maps, two_highest


def test_the_two_highest_patches_count_three_to_one():
    scores = torch.tensor([[0.1, 0.8, 0.4], [0.5, 0.5, 0.0]])
    torch.testing.assert_close(two_highest(scores), torch.tensor([0.75 * 0.8 + 0.25 * 0.4, 0.5]))


def test_an_image_of_one_patch_has_its_score():
    torch.testing.assert_close(two_highest(torch.tensor([[0.3], [0.9]])), torch.tensor([0.3, 0.9]))


def by_hand(patch, size):
    """Corner pixels lie on corner patches; all else by linear interpolation."""
    rows, columns = patch.shape
    result = torch.empty(size, size)
    for a in range(size):
        for b in range(size):
            y, x = a * (rows - 1) / (size - 1), b * (columns - 1) / (size - 1)
            top, left = min(int(y), max(rows - 2, 0)), min(int(x), max(columns - 2, 0))
            fy, fx = y - top, x - left
            below, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            result[a, b] = ((1 - fy) * ((1 - fx) * patch[top, left] + fx * patch[top, right])
                            + fy * ((1 - fx) * patch[below, left] + fx * patch[below, right]))
    return result


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (1, 4)])
def test_maps_are_bilinear_with_corners_aligned(grid):
    scores = torch.rand(2, grid[0] * grid[1], generator=torch.Generator().manual_seed(0))
    maps = score_maps(scores, grid, 14)
    assert maps.shape == (2, 1, 14, 14)
    torch.testing.assert_close(maps[1, 0], by_hand(scores[1].view(grid), 14))


def test_bad_shapes_are_refused(refuses):
    with refuses(r"^patch_scores.shape: expected \(N, L\) with L >= 1, found \(2, 0\)$"):
        two_highest(torch.zeros(2, 0))
    with refuses(r"^patch_scores.shape: expected \(N, 6\), found \(2, 5\)$"):
        score_maps(torch.zeros(2, 5), (2, 3), 14)
