import copy
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from backdoor_detection.mmbd import MmBdConfig, largest_margins, p_value
from backdoor_detection.outlier import gamma_p_value
from data.preact_resnet import new_model

SHAPE, MEAN, STD = (3, 8, 8), torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.5])
QUICK = MmBdConfig(images=3, steps=30, rate=0.1)


def a_model(classes=4, seed=0):
    return new_model(classes, (2, 4, 4, 8), 3, seed=seed).eval()


def found(model, config=QUICK, seed=0, classes=4, **changed):
    given = {"shape": SHAPE, "mean": MEAN, "std": STD} | changed
    return largest_margins(model, classes, given["shape"], given["mean"], given["std"], config,
                           generator=torch.Generator().manual_seed(seed))


def published_way(model, images, target, config):
    """One class: SGD with momentum built anew at every step on pixels clamped inside the pass."""
    free = nn.Parameter(images.clone())
    last = None
    for _ in range(config.steps):
        optimiser = torch.optim.SGD([free], lr=config.rate, momentum=0.2)
        logits = model((free.clamp(0, 1) - MEAN.double().view(3, 1, 1)) / STD.double().view(3, 1, 1))
        margins = torch.stack([row[target] - max(row[k] for k in range(len(row)) if k != target) for row in logits])
        loss = -margins.sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if last is not None and abs((last - loss.item()) / last) < config.tolerance:
            return margins.max().item(), True
        last = loss.item()
    return margins.max().item(), False


@cache
def by_the_published_loop(tolerance):
    model = a_model().double()
    for parameter in model.parameters():
        parameter.data *= 1.5  # steep enough that pixels reach the clamp
    config = replace(QUICK, tolerance=tolerance)
    generator = torch.Generator().manual_seed(0)
    runs = [published_way(copy.deepcopy(model), torch.rand(3, *SHAPE, generator=generator).double(), k, config)
            for k in range(4)]
    return model.float(), config, torch.tensor([margin for margin, _ in runs]), [stopped for _, stopped in runs]


@pytest.mark.parametrize("tolerance, stops", [(1e-5, 0), (0.03, 4)])  # with the second, classes stop early
@pytest.mark.parametrize("block", [1, 800, 1 << 26])  # one class at a time, two, all
def test_agrees_with_the_published_loop(tolerance, stops, block):
    model, config, expected, stopped = by_the_published_loop(tolerance)
    assert sum(stopped) == stops
    torch.testing.assert_close(found(model, replace(config, block=block)), expected, rtol=1e-4, atol=1e-4)


def test_blocks_share_passes():
    for block, passes in ((1, 4), (800, 2), (1 << 26, 1)):
        model, sizes = Counting(), []
        model.sizes = sizes
        found(model, replace(QUICK, steps=1, block=block))
        assert sizes == [12 // passes] * passes


class Counting(nn.Module):
    """Stem of two channels, as wide as that of `a_model`: 3 images of 8x8 are 384 values a class."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 2, 1)
        self.linear = nn.Linear(128, 4)

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        self.sizes.append(len(x))
        return self.linear(self.conv1(x).flatten(1))


def test_a_pixel_outside_the_range_counts_as_its_border():
    """Logit 1 grows with the brightness without end: from any start, the clamp stops it at white."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
    model[1].weight.data[0], model[1].weight.data[1] = 0, 1 / 192
    model[1].bias.data.zero_()
    margins = found(model, MmBdConfig(images=2, steps=300, rate=5.0), classes=2, mean=torch.zeros(3),
                    std=torch.full((3,), 0.5))
    torch.testing.assert_close(margins, torch.tensor([0.0, 2.0]), atol=1e-5, rtol=0)


def test_a_class_that_stands_out_is_found():
    plain = a_model(10)
    strong = copy.deepcopy(plain)
    strong.linear.bias.data[7] += 5
    p = [p_value(model, 10, SHAPE, MEAN, STD, QUICK, generator=torch.Generator().manual_seed(0))
         for model in (strong, plain)]
    assert p[0] < 1e-4 < QUICK.alarm < p[1]
    margins = found(strong, classes=10)
    assert margins.argmax() == 7 and p[0] == gamma_p_value(margins)


def test_equal_seeds_give_equal_margins_and_nothing_global_moves():
    model = a_model().train()
    model.conv1.weight.requires_grad_(False)
    state, grads = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    before = torch.get_rng_state(), random.getstate()
    a, b, c = (found(model, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert model.training and [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_numbers_are_the_published_ones():
    config = MmBdConfig()
    assert (config.images, config.steps, config.rate, config.tolerance, config.alarm) == (30, 300, 0.01, 1e-5, 0.05)


def test_wrong_input_is_named(refuses):
    with refuses("num_classes: expected 4, as the model puts out, found 7"):
        found(a_model(), classes=7)
    with refuses("num_classes: expected >= 2, found 1"):
        found(a_model(), classes=1)
    with refuses("mean, std: expected 3 channels, found 1, 3"):
        found(a_model(), mean=torch.zeros(1))
    for name in ("images", "steps", "rate", "block"):
        with refuses(f"MmBdConfig.{name}: expected > 0, found 0"):
            MmBdConfig(**{name: 0})
    with refuses(r"MmBdConfig.alarm: expected in \(0, 1\), found 1\.5"):
        MmBdConfig(alarm=1.5)
