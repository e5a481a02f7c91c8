import copy
import math
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from backdoor_detection.clean_images import CleanImages
from backdoor_detection.near_ood import near_ood
from backdoor_detection.trodo import TrodoConfig, confidence_rise, score
from data.preact_resnet import new_model

QUICK = TrodoConfig(images=6, steps=4, eps=0.05)
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.5])


def a_model(steepness=1.5):
    model = new_model(4, (2, 4, 4, 8), 3, seed=0).eval()
    for parameter in model.parameters():
        parameter.data *= steepness
    return model


def clean_images(count=3):
    unit = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return CleanImages((unit - MEAN[:, None, None]) / STD[:, None, None], torch.full((count,), -1), MEAN, STD)


def scored(model, config=QUICK, seed=0, images=None):
    return score(model, images or clean_images(), config, generator=torch.Generator().manual_seed(seed))


def rise_by_loops(model, image, noise, config):
    """One image: the published steps, written out; the highest probability through a plain softmax."""
    def confidence(x):
        logits = model(((x - MEAN.double().view(3, 1, 1)) / STD.double().view(3, 1, 1))[None])[0]
        return max(logit.exp() / logits.exp().sum() for logit in logits)

    x = (image + noise).clamp(0, 1)
    for _ in range(config.steps):
        x = x.detach().requires_grad_(True)
        confidence(x).backward()
        x = x.detach() + 2.5 * config.eps / config.steps * x.grad.sign()
        x = image + (x - image).clamp(-config.eps, config.eps)
        x = x.clamp(0, 1)
    return (confidence(x) - confidence(image)).item()


@pytest.mark.parametrize("harsh", [1, 2])
@pytest.mark.parametrize("block", [1, 300, 1 << 26])  # one image at a time, two, all
def test_agrees_with_the_loop_over_images(harsh, block):
    config = replace(QUICK, harsh=harsh, block=block)
    generator = torch.Generator().manual_seed(0)
    outside = near_ood(clean_images().unit(), 6, harsh, generator=generator)
    noise = (torch.rand(outside.shape, generator=generator) * 2 - 1) * config.eps
    model = a_model()
    reference = copy.deepcopy(model).double()
    expected = sum(rise_by_loops(reference, image.double(), start.double(), config)
                   for image, start in zip(outside, noise, strict=True)) / 6
    assert expected > 0.01
    assert scored(model, config) == pytest.approx(expected, abs=1e-4)


def logistic(images):
    """Two classes, the second's logit 8 * (mean - 0.5)."""
    other = 8 * (images.flatten(1).mean(1) - 0.5)
    return torch.stack([torch.zeros_like(other), other], 1).softmax(1).amax(1)


@pytest.mark.parametrize("value, reached", [
    (0.7, 0.75),    # the second class leads: brighter by eps
    (0.3, 0.25),    # the first leads: darker
    (0.98, 1.0), (0.01, 0.0)])  # no further than the range
def test_by_hand(value, reached):
    images = torch.full((2, 3, 4, 4), value)
    noise = torch.stack([torch.full((3, 4, 4), 0.05), torch.full((3, 4, 4), -0.05)])
    found = confidence_rise(logistic, images, noise, TrodoConfig(eps=0.05, steps=10))

    def confidence(x):
        return 1 / (1 + math.exp(-8 * abs(x - 0.5)))

    torch.testing.assert_close(found, torch.full((2,), confidence(reached) - confidence(value)))


def test_the_steps_reach_as_far_as_said():
    """A single step of 2.5 eps in all is cut to eps; ten steps of a reach of 0.5 eps stop half-way."""
    images = torch.full((1, 1, 2, 2), 0.7)
    seen = []

    def watched(x):
        seen.append(x.detach().mean().item())
        return logistic(x)

    confidence_rise(watched, images, torch.zeros_like(images), TrodoConfig(eps=0.1, steps=1))
    assert seen == pytest.approx([0.7, 0.7, 0.8])
    seen.clear()
    confidence_rise(watched, images, torch.zeros_like(images), TrodoConfig(eps=0.1, steps=10, reach=0.5))
    assert seen == pytest.approx([0.7, *[0.7 + 0.005 * s for s in range(11)]])


def test_a_steeper_network_scores_higher():
    flat, steep = (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)) for _ in range(2))
    weight = torch.randn(4, 192, generator=torch.Generator().manual_seed(0)) / 100
    for model, factor in ((flat, 1), (steep, 3)):
        model[1].weight.data, model[1].bias.data = weight * factor, torch.zeros(4)
    assert 0 < scored(flat) < scored(steep) < 1


def test_equal_seeds_give_equal_scores_and_nothing_moves():
    model, images = a_model().train(), clean_images()
    model.conv1.weight.requires_grad_(False)
    state, grads = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    pixels, before = images.pixels.clone(), (torch.get_rng_state(), random.getstate())
    a, b, c = (scored(model, seed=seed, images=images) for seed in (0, 0, 1))
    assert a == b != c and isinstance(a, float)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert torch.equal(images.pixels, pixels) and model.training
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_one_image_does():
    assert -1 < scored(a_model(), images=clean_images(1)) < 1


@pytest.mark.parametrize("wrong, message", [
    ({"images": 0}, "TrodoConfig.images: expected > 0, found 0"),
    ({"steps": 0}, "TrodoConfig.steps: expected > 0, found 0"),
    ({"reach": 0}, "TrodoConfig.reach: expected > 0, found 0"),
    ({"block": 0}, "TrodoConfig.block: expected > 0, found 0"),
    ({"harsh": 8}, r"TrodoConfig.harsh: expected in \[1, 7\], found 8"),
    ({"eps": 0.0}, r"TrodoConfig.eps: expected in \(0, 1\], found 0\.0"),
])
def test_a_wrong_config_is_named(refuses, wrong, message):
    with refuses(message):
        TrodoConfig(**wrong)


def test_the_numbers_are_the_published_ones():
    config = TrodoConfig()
    assert (config.eps, config.steps, config.reach) == (2 / 255, 10, 2.5)
