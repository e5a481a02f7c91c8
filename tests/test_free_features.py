import statistics

import pytest
import torch

from backdoor_detection.free_features import CONFIG, CUTS, STEPS, Cut, free_margins
from backdoor_detection.margins import ADAM_EPSILON, rates
from backdoor_detection.split_model import SplitModel
from data.preact_resnet import new_model

CLASSES = 5


EARLY, DEEP = CUTS


@pytest.fixture(scope="module")
def model():
    return new_model(CLASSES, (2, 4, 4, 8), 3, seed=0).eval()


def some_pixels(count):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def by_loops(model, cut, pixels, classes):
    """Class by class, image by image, step by step; the margins of all images."""
    split, found = SplitModel(model, cut.layers), []
    for k in classes:
        reached = []
        for image in pixels:
            free = split.stem(image[None]).detach()
            for rate in rates(CONFIG):
                free = free.detach().requires_grad_(True)
                logits = split.trunk(free)[0]
                margin = logits[k] - max(logits[j] for j in range(CLASSES) if j != k)
                (gradient,) = torch.autograd.grad(-margin, free)
                free = free * (1 - rate * CONFIG.decay) - rate * gradient / (gradient.abs() + ADAM_EPSILON)
            reached.append(margin.item())  # as it was before the last step
        found.append(reached)
    return found


@pytest.mark.parametrize(("count", "used"), [(1, slice(None)), (2, slice(None)), (7, slice(0, 6, 3)),
                                             (9, slice(0, 9, 3))])
def test_early_features_tell_by_the_furthest_of_some_images(model, count, used):
    pixels = some_pixels(count)
    found = free_margins(model, EARLY, pixels, range(CLASSES), CLASSES, block=1 << 20)
    loops = [max(reached) for reached in by_loops(model, EARLY, pixels[used], range(CLASSES))]
    torch.testing.assert_close(found, torch.tensor(loops), rtol=1e-3, atol=1e-3)
    assert len(rates(CONFIG)) == STEPS and EARLY.images(count) == len(pixels[used])


@pytest.mark.parametrize("count", [1, 4, 5])
def test_deep_features_tell_by_the_median_of_all_images(model, count):
    found = free_margins(model, DEEP, some_pixels(count), range(CLASSES), CLASSES, block=1 << 20)
    loops = [statistics.median(reached) for reached in by_loops(model, DEEP, some_pixels(count), range(CLASSES))]
    torch.testing.assert_close(found, torch.tensor(loops), rtol=1e-3, atol=1e-3)
    assert DEEP.images(count) == count


def test_a_deeper_cut_costs_less():
    costs = [Cut(layers, 1, EARLY.over, EARLY.p_value).passes(10) for layers in range(4)]
    assert costs == [80, 60, 40, 20] and EARLY.passes(10) == 3 * STEPS


@pytest.mark.parametrize("cut", CUTS)
def test_some_classes_alone_and_blocks_change_nothing(model, cut):
    pixels = some_pixels(6)
    whole = free_margins(model, cut, pixels, range(CLASSES), CLASSES, block=1 << 20)
    part = free_margins(model, cut, pixels, (1, 4), CLASSES, block=1)
    torch.testing.assert_close(part, whole[[1, 4]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("calls", [0, 1, STEPS - 1, STEPS, 2 * STEPS - 1, 2 * STEPS])
def test_late_is_asked_between_steps_and_leaves_nothing(model, calls):
    """Two classes, a group each."""
    asked = []
    found = free_margins(model, EARLY, some_pixels(3), (0, 2), CLASSES, block=1,
                         late=lambda: asked.append(None) or len(asked) > calls)
    assert (found is None) == (calls < 2 * STEPS) and len(asked) == min(calls + 1, 2 * STEPS)
