"""Attacks whose trigger covers the whole image: SIG, LF."""
from math import exp, floor, pi, sin

import pytest
import torch

from data import low_frequency, sig
from data.image_sets import ImageSet

SIG, GLOW = sig.SigConfig(), low_frequency.LowFrequencyConfig()


def a_set(count=50, channels=3, height=32, width=32, classes=5):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, height, width), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % classes, classes, "noise")


def moved(found, clean):
    """Positions of the images that are not as they were."""
    return (found.images != clean.images).flatten(1).any(1).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("channels, height, width", [(3, 32, 32), (1, 5, 24)])
def test_sig_by_hand(channels, height, width):
    images = a_set(4, channels, height, width).images
    config = sig.SigConfig(delta=40, frequency=6 if width == 32 else 2)  # 24 columns meet 40 * sin(30 degrees) = 20
    found = sig.apply_trigger(images, config)
    for column in range(width):
        lift = 40 * sin(2 * pi * config.frequency * column / width)
        exact = [floor(round(min(max(x + lift, 0), 255), 3)) for x in images[..., column].flatten().tolist()]
        assert found[..., column].flatten().tolist() == exact


@pytest.mark.parametrize("target", [0, 4])
def test_sig_changes_only_images_of_the_target_and_no_label(target):
    clean = a_set()
    kept = clean.images.clone(), clean.labels.clone()
    found = sig.poison(clean, SIG, ratio=0.1, target=target, seed=1)
    assert torch.equal(clean.images, kept[0]) and torch.equal(clean.labels, kept[1])
    assert torch.equal(found.labels, clean.labels) and len(found.poisoned) == 5
    assert moved(found, clean) == found.poisoned.tolist()
    assert set(clean.labels[found.poisoned].tolist()) == {target}
    assert torch.equal(found.images[found.poisoned], found.trigger(clean.images[found.poisoned]))
    assert (found.attack, found.parameters) == ("sig", {"delta": 40.0, "frequency": 6.0})


def test_sig_takes_all_of_a_class_that_is_smaller_than_the_share():
    found = sig.poison(a_set(), SIG, ratio=0.5, target=2, seed=1)
    assert found.poisoned.tolist() == list(range(2, 50, 5))


@pytest.mark.parametrize("attack, config", [(sig, SIG), (low_frequency, GLOW)])
def test_equal_seeds_give_equal_sets(attack, config):
    before = torch.get_rng_state()
    a, b, c = (attack.poison(a_set(), config, ratio=0.1, target=1, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(a.images, b.images) and not torch.equal(a.poisoned, c.poisoned)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("channels, height, width", [(3, 32, 32), (1, 9, 16)])
def test_the_low_frequency_trigger_by_hand(channels, height, width):
    images = a_set(3, channels, height, width).images
    found = low_frequency.apply_trigger(images, GLOW)
    for channel, level in enumerate((18, 0, 51) if channels == 3 else (51,)):
        for row in range(height):
            for column in range(width):
                y, x = (row - (height - 1) / 2) / height * 32, (column - (width - 1) / 2) / width * 32
                lift = round(level * exp(-(y * y + x * x) / (2 * 10 ** 2)))
                exact = [min(value + lift, 255) for value in images[:, channel, row, column].tolist()]
                assert found[:, channel, row, column].tolist() == exact


def test_the_glow_has_the_published_patterns_mean_and_spectrum():
    glow = low_frequency.glow(3, 32, 32, GLOW).double()
    assert glow.amax((1, 2)).tolist() == [18, 0, 51]
    assert glow.mean((1, 2)).tolist() == pytest.approx([9.9, 0, 27.6], abs=3)  # theirs: 9.9, 0, 27.6
    energy = torch.fft.fft2(glow[2]).abs().square()
    energy[0, 0] = 0
    frequency = torch.fft.fftfreq(32, 1 / 32).abs()
    low = (frequency[:, None] <= 2) & (frequency[None, :] <= 2)
    assert energy[low].sum() > 0.98 * energy.sum()  # theirs: 98 %


@pytest.mark.parametrize("make, message", [
    (lambda: sig.SigConfig(delta=0), r"SigConfig\.delta: expected in \(0, 255\] grey levels, found 0"),
    (lambda: sig.SigConfig(frequency=-1), r"SigConfig\.frequency: expected > 0 cycles, found -1"),
    (lambda: low_frequency.LowFrequencyConfig(green=-1),
     r"LowFrequencyConfig red, green, blue: expected in \[0, 255\], one above 0, found \(18.0, -1, 51.0\)"),
    (lambda: low_frequency.LowFrequencyConfig(red=0, blue=0), "one above 0, found"),
    (lambda: low_frequency.LowFrequencyConfig(spread=0), r"LowFrequencyConfig\.spread: expected > 0, found 0"),
    (lambda: low_frequency.apply_trigger(torch.zeros(1, 2, 4, 4, dtype=torch.uint8), GLOW),
     "images: expected 1 or 3 channels, found 2"),
    (lambda: sig.apply_trigger(torch.zeros(1, 3, 8, 8), SIG), r"images: expected \(N, C, H, W\) uint8, found"),
    (lambda: sig.poison(a_set(), SIG, ratio=0, target=0, seed=0), r"ratio: expected in \(0, 1\], found 0"),
])
def test_wrong_values_are_named(refuses, make, message):
    with refuses(message):
        make()
