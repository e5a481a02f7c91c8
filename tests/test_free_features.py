import pytest
import torch

from backdoor_detection.free_features import CONFIG, SHARE, STEPS, free_margins
from backdoor_detection.margins import ADAM_EPSILON, rates
from backdoor_detection.split_model import SplitModel
from data.preact_resnet import new_model

CLASSES = 5


@pytest.fixture(scope="module")
def split():
    return SplitModel(new_model(CLASSES, (2, 4, 4, 8), 3, seed=0).eval())


def some_pixels(count):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def by_loops(split, pixels, classes):
    """Class by class, image by image, step by step."""
    found = []
    for k in classes:
        best = []
        for image in pixels:
            free = split.stem(image[None]).detach()
            for rate in rates(CONFIG):
                free = free.detach().requires_grad_(True)
                logits = split.trunk(free)[0]
                margin = logits[k] - max(logits[j] for j in range(CLASSES) if j != k)
                (gradient,) = torch.autograd.grad(-margin, free)
                free = free * (1 - rate * CONFIG.decay) - rate * gradient / (gradient.abs() + ADAM_EPSILON)
            best.append(margin.item())  # as it was before the last step
        found.append(max(best))
    return torch.tensor(found)


@pytest.mark.parametrize(("count", "used"), [(1, slice(None)), (2, slice(None)), (7, slice(0, 6, SHARE)),
                                             (9, slice(0, 9, SHARE))])
def test_agrees_with_loops_over_classes_and_images(split, count, used):
    pixels = some_pixels(count)
    found = free_margins(split, pixels, range(CLASSES), CLASSES, block=1 << 20)
    torch.testing.assert_close(found, by_loops(split, pixels[used], range(CLASSES)), rtol=1e-3, atol=1e-3)
    assert len(rates(CONFIG)) == STEPS


def test_some_classes_alone_and_blocks_change_nothing(split):
    pixels = some_pixels(6)
    whole = free_margins(split, pixels, range(CLASSES), CLASSES, block=1 << 20)
    part = free_margins(split, pixels, (1, 4), CLASSES, block=1)
    torch.testing.assert_close(part, whole[[1, 4]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("calls", [0, 1, STEPS - 1, STEPS, 2 * STEPS - 1, 2 * STEPS])
def test_late_is_asked_between_steps_and_leaves_nothing(split, calls):
    """Two classes, a group each."""
    asked = []
    found = free_margins(split, some_pixels(3), (0, 2), CLASSES, block=1,
                         late=lambda: asked.append(None) or len(asked) > calls)
    assert (found is None) == (calls < 2 * STEPS) and len(asked) == min(calls + 1, 2 * STEPS)
