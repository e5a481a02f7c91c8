import math

import pytest
import torch
from torch import nn

from backdoor_detection.changed_images import ChangedImages
from backdoor_detection.natural import RADIUS, natural_reach

STD = torch.tensor([0.25, 0.5])
LABELS = torch.tensor([0, 1, 2, 0, 3, 1])
KNOWN = torch.tensor([0, 0, 1, 1, 2, 3, 3, 3])


@pytest.fixture(autouse=True)
def global_state():
    with torch.random.fork_rng(devices=[]):
        yield


def a_network(classes=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(125, classes)).eval()


def some_pixels(count, seed=1):
    return torch.randn(count, 2, 5, 5, generator=torch.Generator().manual_seed(seed))


def natural(known=KNOWN, labels=LABELS, classes=4, network=None, block=1 << 22, late=lambda: False):
    images = ChangedImages(network or a_network(classes), some_pixels(len(labels)), labels, STD, classes, block)
    return natural_reach(images, some_pixels(len(known), 2), known, late=late)


def margin(logits, k):
    return (logits[k] - max(logits[j] for j in range(len(logits)) if j != k)).item()


def by_loops(known, labels, classes):
    """Class by class, image by image, in pixel values."""
    network, pixels, told = a_network(classes), some_pixels(len(labels)), some_pixels(len(known), 2)
    scale, parts = STD.view(-1, 1, 1), []
    with torch.no_grad():
        for k in range(classes):
            mine = [i for i in range(len(known)) if known[i] == k]
            if not mine:
                parts.append(math.nan)
                continue
            added = (sum(told[i] for i in mine) / len(mine) - sum(told) / len(told)) * scale
            added = added / added.square().mean().sqrt() * RADIUS
            moved = sorted(margin(network(((pixels[i] * scale + added) / scale)[None])[0], k)
                           for i in range(len(labels)) if labels[i] != k)
            middle = len(moved) // 2
            parts.append(moved[middle] if len(moved) % 2 else (moved[middle - 1] + moved[middle]) / 2)
    values = torch.tensor(parts)
    return torch.where(values.isnan(), values.nanmean(), values)


@pytest.mark.parametrize("known", [KNOWN, torch.tensor([0, 0, 1, 3, 3]), torch.tensor([2, 1])])
def test_agrees_with_loops_over_classes_and_images(known):
    torch.testing.assert_close(natural(known), by_loops(known, LABELS, 4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [1, 700])  # one class, two classes; one image, two images
def test_the_block_size_is_for_memory_only(block):
    torch.testing.assert_close(natural(block=block), natural(), rtol=1e-5, atol=1e-6)


def test_an_image_without_a_label_of_a_class_tells_of_none():
    """It is in the mean of all."""
    unknown = KNOWN.clone()
    unknown[[1, 4, 6]] = torch.tensor([-1, 4, 99])
    torch.testing.assert_close(natural(unknown), by_loops(unknown, LABELS, 4), rtol=1e-4, atol=1e-5)


def test_a_class_of_which_nothing_is_known_has_the_mean_of_the_others():
    """Also one that all `images` belong to: it has no others."""
    found = natural(labels=torch.full((6,), 1))
    torch.testing.assert_close(found[1], found[[0, 2, 3]].mean())
    assert torch.equal(natural(known=torch.full((3,), 2), labels=torch.full((2,), 2)), torch.zeros(4))


def test_a_class_that_looks_like_all_others_is_near():
    """The network sees the mean of the first channel in its first output, in the others nothing."""
    pixels = torch.zeros(4, 1, 2, 2)
    pixels[0] = 1.0
    images = ChangedImages(lambda x: torch.stack([x.mean((1, 2, 3)), *3 * [torch.zeros(len(x))]], 1), pixels,
                           torch.arange(4), torch.ones(1), 4, 1 << 22)
    found = natural_reach(images, pixels, torch.arange(4))
    torch.testing.assert_close(found, torch.tensor([RADIUS, -0.0, -0.0, -0.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("calls", range(6))
def test_late_is_asked_between_blocks(calls):
    """Four classes, a block each."""
    asked = []
    found = natural(block=1, late=lambda: asked.append(None) or len(asked) > calls)
    assert len(asked) == min(calls + 1, 4) and (found is None) == (calls < 4)


def test_a_margin_that_is_no_number_stays_none():
    assert natural(network=lambda x: a_network()(x) * torch.tensor([1.0, math.nan, 1.0, 1.0])).isnan().all()


def test_images_and_labels_of_other_number_are_refused(refuses):
    images = ChangedImages(a_network(), some_pixels(6), LABELS, STD, 4, 1 << 22)
    with refuses(r"known, labels: expected equally many, at least one, found \(3, 8\)"):
        natural_reach(images, some_pixels(3), KNOWN)
    with refuses(r"known, labels: expected equally many, at least one, found \(0, 0\)"):
        natural_reach(images, some_pixels(0), KNOWN[:0])
