"""The most anomalous patch of each image, and the smoothing by it."""
import torch

from anomaly.rscin import smoothed_scores
from anomaly.rscon import salient_features


def test_agrees_with_the_loop():
    generator = torch.Generator().manual_seed(0)
    patches, scores = torch.randn(5, 7, 3, generator=generator), torch.randn(5, 7, generator=generator)
    rows = []
    for image, of_image in zip(patches, scores.tolist(), strict=True):
        rows.append(image[max(range(7), key=lambda place, known=of_image: known[place])])
    assert torch.equal(salient_features(patches, scores), torch.stack(rows))


def test_of_equal_scores_the_first():
    patches = torch.arange(8.0).view(2, 4, 1)
    scores = torch.tensor([[0.0, 2.0, 2.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    assert salient_features(patches, scores).flatten().tolist() == [1.0, 4.0]


def test_images_with_the_same_defect_are_smoothed_together():
    """Images 0 and 1 have it, though one seems harmless; image 2's worst patch is of another kind."""
    normal, defect, other = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0]), torch.tensor([0, 0, 1.0])
    patches = torch.stack([torch.stack([normal, defect]), torch.stack([defect, normal]), torch.stack([normal, other])])
    scores = torch.tensor([[0.0, 1.0], [0.4, 0.1], [0.1, 0.2]])
    found = smoothed_scores(scores.amax(1), salient_features(patches, scores), (2,))
    torch.testing.assert_close(found[:2], torch.tensor([0.625, 0.625]))
    assert found[2] == 0


def test_bad_input_is_refused(refuses):
    with refuses(r"^patches.shape: expected \(N, L, D\) with L >= 1, found \(2, 0, 3\)$"):
        salient_features(torch.zeros(2, 0, 3), torch.zeros(2, 0))
    with refuses(r"^scores.shape: expected \(2, 4\), found \(2, 3\)$"):
        salient_features(torch.zeros(2, 4, 3), torch.zeros(2, 3))
