"""Mutual scoring against the double loop over images, at every block size, and what it refuses."""
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn.functional import normalize

from anomaly import mutual_scoring
from anomaly.mutual_scoring import Window, mutual_scores, nearest_distances, nearest_mean


def random_patches(n, length=5, width=4, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, length, width, generator=generator, dtype=dtype), dim=-1)


def by_hand(patches, keep):
    """Image by image, in float64, with torch.cdist that takes differences."""
    patches = patches.double()
    return torch.stack([lowest_mean(patches[i], [p for j, p in enumerate(patches) if j != i], keep)
                        for i in range(len(patches))]).float()


def lowest_mean(queries, others, keep, allowed=None):
    found = []
    for other in others:
        distances = torch.cdist(queries.double(), other.double(), compute_mode="donot_use_mm_for_euclid_dist")
        if allowed is not None:
            distances[~allowed] = torch.inf
        found.append(distances.amin(1))
    return torch.stack(found).sort(0).values[:max(1, int(keep * len(found)))].mean(0)


def likely_patches(n, length=60, width=48, seed=0):
    """Unit vectors with a common part and a few strong directions, as the features of nets have them."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.randn(6, width, generator=generator)
    mixed = torch.randn(n, length, 6, generator=generator).exp() @ strong
    return normalize(mixed + 0.5 * torch.randn(n, length, width, generator=generator), dim=-1)


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


@pytest.mark.parametrize("precision", ["float32", "half"])
@pytest.mark.parametrize("width", [4, 300])
def test_a_duplicated_image_lies_at_distance_zero(precision, width):
    patches = random_patches(3, width=width)
    found = nearest_distances(torch.cat([patches, patches[:1]]), precision=precision)
    assert (found[0, 3] == 0).all() and (found[0, 1] > 0.02).all()


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


@pytest.mark.parametrize("precision", ["float32", "half"])
@pytest.mark.parametrize("n, max_bytes", [(5, None), (16, None), (16, 20_000), (16, 200_000)])
def test_sixteen_bits_keep_the_order(precision, n, max_bytes):
    patches = likely_patches(n)
    found, expected = mutual_scores(patches, precision=precision, max_bytes=max_bytes), by_hand(patches, 0.3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if precision == "float32" else 2e-3)
    assert spearmanr(found.flatten(), expected.flatten())[0] >= 0.9999


def test_sixteen_bits_take_features_of_any_length():
    patches = likely_patches(6)
    torch.testing.assert_close(mutual_scores(1e4 * patches, precision="half") / 1e4,
                               mutual_scores(patches, precision="half"), rtol=1e-3, atol=0)


def test_auto_is_one_of_the_two(monkeypatch):
    patches = likely_patches(5)
    for faster, precision in ((True, "half"), (False, "float32")):
        monkeypatch.setattr(mutual_scoring, "half_is_faster", lambda device, faster=faster: faster)
        assert torch.equal(mutual_scores(patches, precision="auto"), mutual_scores(patches, precision=precision))


def test_bands_hold_few_distances_and_change_nothing(monkeypatch):
    patches, held = random_patches(9), []
    real = mutual_scoring._Pairs.nearest
    monkeypatch.setattr(mutual_scoring._Pairs, "nearest", lambda self, band: held.append(len(band)) or real(self, band))
    scores = mutual_scores(patches, max_bytes=2 * 9 * 5 * 4)  # two rows of distances
    torch.testing.assert_close(scores, by_hand(patches, 0.3), rtol=0, atol=1e-5)
    assert held == [2, 2, 2, 2, 1]


@pytest.mark.parametrize("precision, atol", [("float32", 1e-5), ("half", 3e-3)])
@pytest.mark.parametrize("radius", [0, 1, 2, 9])
@pytest.mark.parametrize("max_bytes", [1, None])
def test_a_window_compares_nearby_patches_only(precision, atol, radius, max_bytes):
    grid = (3, 5)
    patches = likely_patches(6, 15, 16)
    patches = torch.cat([patches, patches[:1] + 1e-4])  # near twins are measured again, within the window
    places = torch.tensor([(r, c) for r in range(3) for c in range(5)])
    near = ((places[:, None] - places[None]).abs() <= radius).all(-1)
    expected = torch.stack([lowest_mean(patches[i], [p for j, p in enumerate(patches) if j != i], 0.3, near)
                            for i in range(7)]).float()
    found = mutual_scores(patches, window=Window(grid, radius), precision=precision, max_bytes=max_bytes)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    if radius == 9:
        torch.testing.assert_close(found, mutual_scores(patches, precision=precision), rtol=0, atol=atol)


@pytest.mark.parametrize("n", [1, 2, 6])
@pytest.mark.parametrize("max_bytes", [1, None])
def test_good_and_earlier_images_judge_and_are_not_scored(n, max_bytes):
    every = random_patches(n + 9)
    patches, earlier, good = every[:n], every[n:n + 4], every[n + 4:]
    for use_earlier, use_good in ((True, False), (False, True), (True, True)):
        expected = []
        for i in range(n):
            others = [p for j, p in enumerate(patches) if j != i] + (list(earlier) if use_earlier else [])
            words = [lowest_mean(patches[i], list(good), 0.3)] if use_good else []
            words += [lowest_mean(patches[i], others, 0.3)] if others else []
            expected.append(torch.stack(words).mean(0))
        found = mutual_scores(patches, earlier=earlier if use_earlier else None, reference=good if use_good else None,
                              max_bytes=max_bytes)
        torch.testing.assert_close(found, torch.stack(expected).float(), rtol=0, atol=1e-5)


def test_a_defect_that_all_images_share_is_seen_by_good_ones():
    patches = random_patches(1, 5, 16).expand(8, -1, -1).clone()
    good = patches[:2].clone()
    patches[:, 3] = -patches[:, 3]
    assert mutual_scores(patches)[:, 3].max() == 0 and (mutual_scores(patches, reference=good).argmax(1) == 3).all()


def test_the_mean_of_the_nearest_leaves_out_what_is_infinite():
    inf = torch.inf
    distances = torch.tensor([[4.0, inf], [1.0, inf], [inf, 5.0], [2.0, inf]])[None]
    assert nearest_mean(distances, 0.5).tolist() == [[1.5, 5.0]]
    assert nearest_mean(distances, 0.1).tolist() == [[1.0, 5.0]]
    assert nearest_mean(distances, 1.0, others=3).tolist()[0] == [pytest.approx(7 / 3), 5.0]


def test_wrong_judges_windows_and_precisions_are_refused(refuses):
    patches = random_patches(3)
    with refuses(r"^reference.shape: expected \(M, 5, 4\) with M >= 1, found \(2, 5, 3\)$"):
        mutual_scores(patches, reference=torch.zeros(2, 5, 3))
    with refuses(r"^earlier.shape: expected \(M, 5, 4\) with M >= 1, found \(0, 5, 4\)$"):
        mutual_scores(patches, earlier=torch.zeros(0, 5, 4))
    with refuses(r"^reference: expected finite features, found NaN or infinity$"):
        mutual_scores(patches, reference=torch.full((2, 5, 4), torch.nan))
    with refuses(r"^patches.shape\[1\]: expected 2 x 3 patches, found 5$"):
        mutual_scores(patches, window=Window((2, 3), 1))
    with refuses(r"^Window.radius: expected >= 0 patches, found -1$"):
        Window((2, 3), -1)
    with refuses(r"^Window.grid: expected rows and columns of patches, found \(0, 3\)$"):
        Window((0, 3), 1)
    with refuses(r"^precision: expected one of auto, float32, half, found double$"):
        mutual_scores(patches, precision="double")
    with refuses(r"^patches.shape\[0\]: expected >= 1 image, found 0$"):
        mutual_scores(patches[:0], reference=patches)


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
