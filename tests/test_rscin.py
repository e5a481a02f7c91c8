"""Image smoothing against a loop over images, windows larger than the set, and equal scores."""
import pytest
import torch

from anomaly.rscin import smoothed_scores


def by_hand(scores, classes, windows):
    low, high = float(scores.min()), float(scores.max())
    scaled = [(float(s) - low) / (high - low) for s in scores]
    result = []
    for i in range(len(scores)):
        alike = [max(0.0, float(torch.cosine_similarity(classes[i], c, dim=0))) for c in classes]
        order = [i, *sorted((j for j in range(len(scores)) if j != i), key=lambda j: -alike[j])]
        means = []
        for k in windows:
            near = order[:k]
            weights = [1.0 if j == i else alike[j] for j in near]
            means.append(sum(w * scaled[j] for w, j in zip(weights, near, strict=True)) / sum(weights))
        result.append(sum(means) / len(means))
    return torch.tensor(result)


def given(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator), torch.randn(n, 6, generator=generator)


@pytest.mark.parametrize("n", [2, 5, 12])
@pytest.mark.parametrize("windows", [(1,), (2, 3), (1, 8, 9)])
def test_agrees_with_the_loop(n, windows):
    scores, classes = given(n)
    torch.testing.assert_close(smoothed_scores(scores, classes, windows), by_hand(scores, classes, windows))


def test_window_one_is_the_scaled_score_at_any_length_of_the_features():
    scores, classes = given(6)
    scaled = (scores - scores.min()) / (scores.max() - scores.min())
    lengths = torch.arange(1, 7)[:, None]
    torch.testing.assert_close(smoothed_scores(scores, classes * lengths, (1,)), scaled)
    twins = classes[:1].expand(6, -1)  # any image could come first
    torch.testing.assert_close(smoothed_scores(scores, twins, (1,)), scaled)


def test_an_image_is_pulled_towards_those_like_it():
    classes = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.01, 1.0]])
    found = smoothed_scores(torch.tensor([1.0, 0.4, 0.0, 0.6]), classes, (2,))
    torch.testing.assert_close(found, torch.tensor([0.7, 0.7, 0.3, 0.3]), rtol=0, atol=1e-3)


def test_equal_scores_and_one_image_stay():
    assert torch.equal(smoothed_scores(torch.full((4,), 0.2), given(4)[1], (1, 3)), torch.full((4,), 0.2))
    assert torch.equal(smoothed_scores(torch.tensor([3.0]), torch.ones(1, 2), (1, 8)), torch.tensor([3.0]))


def test_zero_features_give_finite_scores():
    assert torch.isfinite(smoothed_scores(given(4)[0], torch.zeros(4, 3), (1, 2, 9))).all()


def test_bad_input_is_refused(refuses):
    scores, classes = given(4)
    with refuses(r"^classes.shape: expected \(4, C\), found \(3, 6\)$"):
        smoothed_scores(scores, classes[:3], (1,))
    with refuses(r"^scores.shape: expected \(N,\) with N >= 1, found \(4, 1\)$"):
        smoothed_scores(scores[:, None], classes, (1,))
    for windows in ((), (0, 1)):
        with refuses(r"^windows: expected numbers of images from 1, found "):
            smoothed_scores(scores, classes, windows)
    scores[0] = float("nan")
    with refuses(r"^scores and classes: expected finite numbers, found NaN or infinity$"):
        smoothed_scores(scores, classes, (1,))
