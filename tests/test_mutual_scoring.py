"""Mutual scoring against the double loop over images, at every block size, and what it refuses."""
import pytest
import torch
from torch.nn.functional import normalize

from anomaly.mutual_scoring import mutual_scores, nearest_distances


def random_patches(n, length=5, width=4, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, length, width, generator=generator, dtype=dtype), dim=-1)


def by_hand(patches, keep):
    """Image by image, in float64, with torch.cdist that takes differences."""
    patches = patches.double()
    result = []
    for i in range(len(patches)):
        found = [torch.cdist(patches[i], patches[j], compute_mode="donot_use_mm_for_euclid_dist").amin(1)
                 for j in range(len(patches)) if j != i]
        kept = max(1, int(keep * len(found)))
        result.append(torch.stack(found).sort(0).values[:kept].mean(0))
    return torch.stack(result).float()


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 12])
@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_agrees_with_the_double_loop(n, keep):
    patches = random_patches(n)
    torch.testing.assert_close(mutual_scores(patches, keep), by_hand(patches, keep), rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_bytes", [1, 400, 900, 4000, 10**9])
def test_the_block_size_changes_nothing(max_bytes):
    patches = random_patches(7)
    torch.testing.assert_close(mutual_scores(patches, max_bytes=max_bytes), by_hand(patches, 0.3), rtol=0, atol=1e-5)


def test_long_features_of_any_length_are_exact():
    patches = 30 * random_patches(5, 20, 300, seed=1) + 7
    torch.testing.assert_close(mutual_scores(patches), by_hand(patches, 0.3), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-5, 1e-3, 0.03])
def test_tiny_distances_keep_their_digits(gap):
    patches = random_patches(4, 30, 128, seed=2)
    twins = torch.cat([patches, patches + gap * random_patches(4, 30, 128, seed=3)])
    torch.testing.assert_close(mutual_scores(twins, 0.1), by_hand(twins, 0.1), rtol=0, atol=1e-6)


def test_a_duplicated_image_lies_at_distance_zero():
    patches = random_patches(3)
    assert (nearest_distances(torch.cat([patches, patches[:1]]))[0, 3] == 0).all()


def test_both_directions_and_the_own_image():
    patches = random_patches(4)
    found = nearest_distances(patches)
    assert found.shape == (4, 4, 5)
    torch.testing.assert_close(found[2, 1], torch.cdist(patches[2], patches[1]).amin(1))
    torch.testing.assert_close(found[1, 2], torch.cdist(patches[1], patches[2]).amin(1))
    assert torch.isinf(found.diagonal(dim1=0, dim2=1)).all()


def test_the_order_of_images_permutes_the_scores():
    patches, order = random_patches(6), [3, 0, 5, 1, 4, 2]
    torch.testing.assert_close(mutual_scores(patches[order]), mutual_scores(patches)[order])


def test_a_patch_that_no_other_image_has_stands_out():
    patches = torch.cat([random_patches(1, 5, 16).expand(6, -1, -1)]).clone()
    patches[2, 3] = -patches[2, 3]
    assert mutual_scores(patches).argmax() == 2 * 5 + 3


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_few_or_constant_images_give_finite_scores(n):
    assert (mutual_scores(torch.ones(n, 5, 4)) == 0).all()
    assert torch.isfinite(mutual_scores(random_patches(n))).all()


def test_other_types_score_and_the_input_stays():
    patches = random_patches(4)
    before = patches.clone()
    scores = mutual_scores(patches)
    assert torch.equal(patches, before)
    assert mutual_scores(patches.double()).dtype == torch.float64
    torch.testing.assert_close(mutual_scores(patches.double()).float(), scores, rtol=0, atol=1e-5)
    assert mutual_scores(patches.half()).dtype == torch.float32


def test_one_image_is_refused(refuses):
    with refuses(r"^patches.shape\[0\]: expected >= 2 images, found 1$"):
        mutual_scores(torch.zeros(1, 5, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(refuses, bad):
    patches = random_patches(3)
    patches[1, 2, 3] = bad
    with refuses(r"^patches: expected finite features, found NaN or infinity$"):
        mutual_scores(patches)


def test_wrong_shapes_types_and_shares_are_refused(refuses):
    with refuses(r"^patches.ndim: expected 3, found 2$"):
        mutual_scores(torch.zeros(3, 4))
    with refuses(r"^patches.shape: expected no empty side, found \(3, 0, 4\)$"):
        mutual_scores(torch.zeros(3, 0, 4))
    with refuses(r"^patches.dtype: expected a floating type, found torch.int64$"):
        mutual_scores(torch.zeros(3, 2, 4, dtype=torch.int64))
    for keep in (0, 1.2):
        with refuses(rf"^keep: expected a share in \(0, 1\], found {keep}$"):
            mutual_scores(random_patches(3), keep)
