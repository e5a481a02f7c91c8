"""Finding poisoned training images: both scores against loops, on a hand-made network with a trigger, on digits."""
import copy

import pytest
import torch
from torch import nn

from defense.scaled_consistency import (
    ConsistencyConfig,
    MaskedConsistencyConfig,
    masked_scaled_consistency,
    scaled_consistency,
)


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def auroc(scores, poisoned):
    """Share of (poisoned, clean) pairs in which the poisoned one scores higher; ties count half."""
    pairs = [(a > b) + (a == b) / 2 for a in scores[poisoned].tolist() for b in scores[~poisoned].tolist()]
    return sum(pairs) / len(pairs)


def a_network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3),
                             nn.Dropout(0.5)).double()


IMAGES = torch.rand(10, 3, 8, 8, generator=drawn()).double() ** 2


class Triggered(nn.Module):
    """Class 2 where the corner's four pixels are bright, 3 where all is bright or dark, else by the brighter half."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        corner = images[:, :, -2:, -2:].mean((1, 2, 3))
        left, right = images[..., :4].mean((1, 2, 3)), images[:, :, :-2, 4:].mean((1, 2, 3))
        return self.weight * torch.stack([20 * (left - right), 20 * (right - left), 100 * (corner - 0.5),
                                          10 * ((images.mean((1, 2, 3)) - 0.45).abs() - 0.3)], 1)


def a_triggered_set(count=40, poisoned=8):
    """Of grey noise; scaled, it is bright all over."""
    images = 0.3 + 0.4 * torch.rand(count, 3, 8, 8, generator=drawn(1))
    images[:, :, -2:, -2:] = 0
    triggered = torch.arange(count) % (count // poisoned) == 0
    images[triggered, :, -2:, -2:] = 1
    return images, triggered


# --- SPC -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scales", [(2, 3, 5), (1.5, 12)])
def test_the_share_of_scales_that_keep_the_class(scales):
    network = a_network()
    found = scaled_consistency(network, IMAGES, ConsistencyConfig(scales, batch=4), normalise=lambda x: (x - 0.4) / 0.2)
    network.eval()
    wanted = []
    for image in IMAGES:
        whole = network((image[None] - 0.4) / 0.2)[0].argmax()
        same = [network((torch.minimum(image * s, torch.ones(()))[None] - 0.4) / 0.2)[0].argmax() == whole
                for s in scales]
        wanted.append(sum(bool(one) for one in same) / len(scales))
    assert found.tolist() == pytest.approx(wanted) and len(set(wanted)) > 1
    plain = scaled_consistency(network, IMAGES, ConsistencyConfig(scales))
    assert plain.tolist() != found.tolist()  # the normalisation comes after scaling


def test_the_network_stays_as_it_was():
    network = a_network()
    network[0].eval()
    before, generators = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    scaled_consistency(network, IMAGES, ConsistencyConfig())
    masked_scaled_consistency(network, IMAGES, MaskedConsistencyConfig(rounds=1, epochs=1))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values(), strict=True))
    assert network.training and not network[0].training and torch.equal(torch.get_rng_state(), generators)
    assert all(p.grad is None for p in network.parameters())


# --- MSPC ------------------------------------------------------------------------------------------------------

def masked_by_hand(network, images, config):
    """Image by image and scale by scale; momentum and decay written out."""
    mask, speed = torch.ones(8, 8).double(), torch.zeros(8, 8).double()

    def score(image, mask):
        whole = network(image[None])[0].argmax()
        kept = [network(((image - config.shift) * mask * s).clamp(0, 1)[None])[0].argmax() == whole
                for s in config.scales]
        return sum(1 if one else -1 for one in kept) / len(kept)

    scores = first = [score(image, mask) for image in images]
    for _ in range(config.rounds):
        for _ in range(config.epochs):
            for start in range(0, len(images), config.batch):
                part = range(start, min(start + config.batch, len(images)))
                mask.requires_grad_()
                loss = config.sparsity * mask.abs().sum()
                for i in part:
                    p = network(images[i][None])[0].softmax(0).detach()
                    for s in config.scales if scores[i] > 0 else ():
                        q = network(((images[i] - config.shift) * mask * s).clamp(0, 1)[None])[0].softmax(0)
                        loss = loss + (p * (p / q).log()).sum() / len(part) / len(config.scales)
                (slope,) = torch.autograd.grad(loss, mask)
                speed = config.momentum * speed + slope + config.decay * mask.detach()
                mask = (mask.detach() - config.rate * speed).clamp(0, 1)
        scores = [score(image, mask) for image in images]
    return scores, mask, first


@pytest.mark.parametrize("config", [
    MaskedConsistencyConfig((2, 5), shift=0.05, rounds=2, epochs=2, batch=4, rate=0.5),
    MaskedConsistencyConfig((3, 4, 9), shift=0.3, rounds=1, epochs=3, batch=20, rate=0.5, sparsity=0.1, momentum=0.5,
                            decay=0.1)])
def test_the_mask_agrees_with_loops(config):
    network = a_network().eval()
    found = masked_scaled_consistency(network, IMAGES, config)
    scores, mask, first = masked_by_hand(network, IMAGES, config)
    torch.testing.assert_close(found.mask, mask)
    assert found.scores.tolist() == pytest.approx(scores) and found.first.tolist() == pytest.approx(first)
    assert 0 < sum(one > 0 for one in first) < 10 and mask.min() < 0.9


def test_the_mask_keeps_the_trigger_and_the_scores_tell_it():
    images, poisoned = a_triggered_set()
    found = masked_scaled_consistency(Triggered(), images, MaskedConsistencyConfig(
        (2, 4, 8), rounds=2, epochs=60, batch=40, rate=0.01, sparsity=0.1))
    assert auroc(found.scores, poisoned) == 1 and (found.scores[poisoned] > 0).all()
    corner = torch.zeros(8, 8, dtype=torch.bool)
    corner[-2:, -2:] = True
    assert found.mask[corner].min() > 2 * found.mask[~corner].max()
    assert (found.scores[~poisoned] < 0).float().mean() > 0.9


def test_half_precision_and_batches_change_nothing_but_rounding():
    images, poisoned = a_triggered_set()
    whole = scaled_consistency(Triggered(), images, ConsistencyConfig())
    assert torch.equal(whole, scaled_consistency(Triggered(), images, ConsistencyConfig(batch=7)))
    half = scaled_consistency(Triggered().bfloat16(), images, ConsistencyConfig())
    assert half.dtype == torch.float32 and (half[poisoned] == whole[poisoned]).all()


def test_bad_input_is_named(refuses):
    for message, images in [
            (r"images: expected \(N, C, H, W\) of floating point, found \(2, 3, 8, 8\) torch.uint8",
             torch.zeros(2, 3, 8, 8, dtype=torch.uint8)),
            (r"images: expected at least one, found 0", torch.zeros(0, 3, 8, 8)),
            (r"images: expected in \[0, 1\], before the normalisation, found -1.0 to 1.0",
             1 - 2 * torch.eye(8)[None, None])]:
        with refuses(message):
            scaled_consistency(a_network(), images, ConsistencyConfig())
        with refuses(message):
            masked_scaled_consistency(a_network(), images, MaskedConsistencyConfig())


def test_bad_settings_are_named(refuses):
    with refuses(r"ConsistencyConfig.scales: expected rising numbers > 1, found \(1, 2\)"):
        ConsistencyConfig((1, 2))
    with refuses(r"ConsistencyConfig.batch: expected > 0, found 0"):
        ConsistencyConfig(batch=0)
    for message, settings in [
            (r".scales: expected rising numbers > 1, found \(\)", {"scales": ()}),
            (r".shift: expected in \[0, 1\), found 1", {"shift": 1}),
            (r" rounds, epochs, batch: expected > 0, found \(4, 0, 1000\)", {"epochs": 0}),
            (r" rate, momentum: expected > 0, in \[0, 1\), found \(0.1, 1\)", {"momentum": 1}),
            (r" decay, sparsity: expected >= 0, found \(0.0005, -1\)", {"sparsity": -1})]:
        with refuses("MaskedConsistencyConfig" + message):
            MaskedConsistencyConfig(**settings)
