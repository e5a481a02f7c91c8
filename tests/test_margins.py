import copy
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from backdoor_detection.margins import ReportConfig, class_margins, rates, sign_step
from backdoor_detection.split_model import SplitModel
from data.preact_resnet import new_model

NARROW = (2, 4, 4, 8)


def a_model(classes=4, seed=0):
    """Running statistics and norms differ from the initial ones, as in a trained network."""
    model = new_model(classes, NARROW, 3, seed=seed).train()
    generator = torch.Generator().manual_seed(seed)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        norm.bias.data.uniform_(-0.5, 0.5, generator=generator)
    with torch.no_grad():
        model(torch.randn(16, 3, 8, 8, generator=generator))
    return model.eval()


def published_way(model, images, target, config):
    """One class, one image batch: AdamW built anew at every step, a scheduler's rate, margins by a mask."""
    with torch.no_grad():
        free = model.layer1[0](model.conv1(images))
    free = nn.Parameter(free.clone())
    last = None
    for rate in rates(config):
        optimiser = torch.optim.AdamW([free], lr=rate)
        logits = model.linear(model.avgpool(
            model.layer4(model.layer3(model.layer2(model.layer1[1](free))))).flatten(1))
        mask = torch.zeros_like(logits)
        mask[:, target] = 1
        margins = (logits * mask).sum(1) - (logits - 1e9 * mask).max(1).values
        loss = -margins.sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if last is not None and abs(last - loss.item()) < config.tolerance * abs(last):
            break
        last = loss.item()
    return margins.max().item()


@cache
def four_classes_by_the_published_loop(tolerance):
    model = a_model().double()
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    draws = [torch.randperm(6, generator=torch.Generator().manual_seed(k))[:4] for k in range(4)]
    config = ReportConfig(images=4, steps=60, warm_up=5, tolerance=tolerance)
    expected = [published_way(copy.deepcopy(model), images[draw], k, config) for k, draw in enumerate(draws)]
    return model, images, draws, config, torch.tensor(expected).double()


@pytest.mark.parametrize("tolerance", [1e-5, 0.005])  # the second makes classes stop at different steps
@pytest.mark.parametrize("block", [1, 1200, 1 << 26])  # one class at a time, two, all
def test_agrees_with_the_published_loop(tolerance, block):
    model, images, draws, config, expected = four_classes_by_the_published_loop(tolerance)
    split = SplitModel(model)
    found = class_margins(split.trunk, split.stem(images).detach(), draws, replace(config, block=block))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_classes_do_stop_early():
    calls = []
    split = SplitModel(a_model())
    split.trunk.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    draws = [torch.arange(4)] * 4
    features = split.stem(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))).detach()
    class_margins(split.trunk, features, draws, ReportConfig(images=4, steps=60, warm_up=5, tolerance=0.005))
    assert calls[0] == 16 and calls[-1] < 16
    assert calls == sorted(calls, reverse=True)


def test_a_step_is_adamw_rebuilt():
    generator = torch.Generator().manual_seed(0)
    free = torch.randn(3, 4, 5, 5, generator=generator)
    gradient = torch.randn(3, 4, 5, 5, generator=generator) * 10 ** torch.linspace(-12, 2, 5)  # tiny ones too
    gradient[0, 0, 0] = 0
    parameter = nn.Parameter(free.clone())
    parameter.grad = gradient
    torch.optim.AdamW([parameter], lr=0.07).step()
    torch.testing.assert_close(sign_step(free, gradient, 0.07, 0.01), parameter.detach(), rtol=1e-5, atol=1e-6)


def test_the_rates_are_the_reports():
    found = rates(ReportConfig())
    assert len(found) == 100
    assert found[0] == pytest.approx(0.01) and found[9] == found[10] == pytest.approx(0.1)
    assert found[-1] == pytest.approx(0.001, abs=1e-4) and sorted(found[10:], reverse=True) == found[10:]
    assert math.fsum(found) == pytest.approx(5.14, abs=0.01)  # how far an activation can move at most


def test_the_callers_model_stays():
    model = a_model().train()
    model.layer2.eval()
    model.conv1.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    split = SplitModel(model)
    class_margins(split.trunk, split.stem(torch.randn(2, 3, 8, 8)), [torch.arange(2)] * 4,
                  ReportConfig(images=2, steps=3, warm_up=1))
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_split_computes_the_model():
    model = a_model()
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    split = SplitModel(model)
    torch.testing.assert_close(split.trunk(split.stem(x)), model(x), rtol=1e-4, atol=1e-5)


def test_wrong_input_is_named(refuses):
    with refuses("model: expected a PreActResNet18 with 'layer1', found Conv2d"):
        model = nn.Conv2d(1, 1, 1)
        model.conv1 = nn.Identity()
        SplitModel(model)
    split = SplitModel(a_model())
    with refuses("num_classes: expected 4, as the model puts out, found 7"):
        class_margins(split.trunk, torch.zeros(2, 2, 8, 8), [torch.arange(2)] * 7, ReportConfig(images=2))


@pytest.mark.parametrize("wrong, message", [
    ({"images": 0}, "ReportConfig.images: expected > 0, found 0"),
    ({"warm_up": 100}, r"ReportConfig.warm_up: expected in \[0, 100\), found 100"),
    ({"alarm": 1.0}, r"ReportConfig.alarm: expected in \(0, 1\), found 1\.0"),
])
def test_a_wrong_config_is_named(refuses, wrong, message):
    with refuses(message):
        ReportConfig(**wrong)
