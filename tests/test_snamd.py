"""The weighted neighbourhoods against a loop over patches, and what the distance scale does."""
import math

import pytest
import torch
from torch.nn.functional import normalize

from anomaly.snamd import centre_weights, neighbour_distance, similarity_weighted_features


def around(image, grid, place, degree):
    """The features in the square, zeros beyond the border, in float64."""
    rows, columns = grid
    reach, nothing = degree // 2, torch.zeros(image.shape[1]).double()
    return [image[y * columns + x].double() if 0 <= y < rows and 0 <= x < columns else nothing
            for y in range(place // columns - reach, place // columns + reach + 1)
            for x in range(place % columns - reach, place % columns + reach + 1)]


def by_hand(patches, grid, degrees, tau):
    """Features, and the centre's share at each degree."""
    features, shares = torch.zeros_like(patches).double(), [[] for _ in degrees]
    for n, image in enumerate(patches):
        for place, own in enumerate(image.double()):
            for d, degree in enumerate(degrees):
                square = around(image, grid, place, degree)
                weights = [math.exp(-float((other - own).norm()) / tau) for other in square]
                features[n, place] += sum(w * f for w, f in zip(weights, square, strict=True)) / sum(weights)
                shares[d].append(1 / sum(weights))
    return normalize(features, dim=-1).float(), [sum(same) / len(same) for same in shares]


def given(n=2, grid=(3, 4), width=5):
    return torch.randn(n, grid[0] * grid[1], width, generator=torch.Generator().manual_seed(0)) + 0.3


@pytest.mark.parametrize("grid", [(3, 4), (1, 6), (2, 2)])
@pytest.mark.parametrize("degrees", [(1,), (3,), (1, 3, 5)])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_agrees_with_the_loop(grid, degrees, tau):
    patches = given(grid=grid)
    features, shares = by_hand(patches, grid, degrees, tau)
    torch.testing.assert_close(similarity_weighted_features(patches, grid, degrees, tau=tau), features)
    assert centre_weights(patches, grid, degrees, tau=tau) == pytest.approx(shares, rel=1e-5)


def test_sets_larger_than_a_chunk_and_degrees_in_any_order():
    patches = given(n=19)
    found = similarity_weighted_features(patches, (3, 4), (5, 1, 3), tau=2.0)
    torch.testing.assert_close(found, by_hand(patches, (3, 4), (1, 3, 5), 2.0)[0])


def test_the_median_distance_of_neighbours():
    patches, grid = given(grid=(3, 4)), (3, 4)
    places = [(y, x) for y in range(3) for x in range(4)]
    distances = sorted(float((image[a[0] * 4 + a[1]] - image[b[0] * 4 + b[1]]).norm()) for image in patches
                       for i, a in enumerate(places) for b in places[i + 1:]
                       if max(abs(a[0] - b[0]), abs(a[1] - b[1])) == 1)
    assert neighbour_distance(patches, grid) == pytest.approx(distances[(len(distances) - 1) // 2])
    assert neighbour_distance(patches[:, :1], (1, 1)) == 0


def test_by_default_the_scale_of_the_features_does_not_matter():
    """The published form does nothing where features lie far apart: the centre has all the weight."""
    patches, large = given(), given() * 100
    torch.testing.assert_close(similarity_weighted_features(large, (3, 4), (3,)),
                               similarity_weighted_features(patches, (3, 4), (3,)))
    assert centre_weights(large, (3, 4), (3,))[0] < 0.6
    assert centre_weights(large, (3, 4), (3,), tau=1.0)[0] > 0.999
    torch.testing.assert_close(similarity_weighted_features(large, (3, 4), (3,), tau=1.0), normalize(large, dim=-1))


def test_images_without_any_contrast_stay_finite():
    alike = torch.ones(2, 9, 4)
    assert centre_weights(alike, (3, 3), (1, 3))[0] == 1
    torch.testing.assert_close(similarity_weighted_features(alike, (3, 3), (1, 3)), torch.full((2, 9, 4), 0.5))
    assert (similarity_weighted_features(alike * 0, (3, 3), (1, 3)) == 0).all()


def test_bad_input_is_refused(refuses):
    patches = given()
    with refuses(r"^patches.ndim: expected 3, found 2$"):
        similarity_weighted_features(patches[0], (3, 4), (1,))
    with refuses(r"^patches.shape\[1\]: expected 2 x 4 patches, found 12$"):
        centre_weights(patches, (2, 4), (1,))
    for degrees in ((), (1, 2), (0,)):
        with refuses(r"^degrees: expected odd numbers from 1, found "):
            similarity_weighted_features(patches, (3, 4), degrees)
    with refuses(r"^tau: expected a positive distance, or None, found 0$"):
        similarity_weighted_features(patches, (3, 4), (1,), tau=0)
