"""The box filter against the literal steps of the paper's code, and grids that are not square."""
import pytest
import torch
from torch.nn.functional import adaptive_avg_pool1d, layer_norm, normalize, unfold

from anomaly.lnamd import neighbourhood_features


def literal(patches, grid, degree):
    """Layer norm over the whole image, unfold with zero padding, adaptive pooling to D, unit length."""
    n, _, width = patches.shape
    image = patches.transpose(1, 2).reshape(n, width, *grid)
    image = layer_norm(image, image.shape[1:])
    around = unfold(image, degree, padding=degree // 2)  # (N, D * degree^2, L)
    return normalize(adaptive_avg_pool1d(around.transpose(1, 2), width), dim=-1)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6)])
@pytest.mark.parametrize("degree", [1, 3, 5])
def test_the_box_filter_equals_the_literal_form(grid, degree):
    patches = torch.randn(3, grid[0] * grid[1], 12, generator=torch.Generator().manual_seed(0)) * 4 + 1
    torch.testing.assert_close(neighbourhood_features(patches, grid, degree), literal(patches, grid, degree),
                               rtol=0, atol=2e-6)


def test_a_constant_image_gives_zeros_not_nan():
    assert (neighbourhood_features(torch.full((2, 6, 4), 3.0), (2, 3), 3) == 0).all()


def test_bad_grids_and_degrees_are_refused(refuses):
    patches = torch.zeros(2, 6, 4)
    with refuses(r"^patches.shape\[1\]: expected 2 x 2 patches, found 6$"):
        neighbourhood_features(patches, (2, 2), 1)
    for degree in (0, 2, -1):
        with refuses(rf"^degree: expected an odd number from 1, found {degree}$"):
            neighbourhood_features(patches, (2, 3), degree)
    with refuses(r"^patches.ndim: expected 3, found 2$"):
        neighbourhood_features(patches[0], (2, 3), 1)
