"""Attacks whose trigger covers the whole image: SIG, LF, WaNet."""
from math import exp, floor, pi, sin

import pytest
import torch

from data import low_frequency, sig, wanet
from data.image_sets import ImageSet

SIG, GLOW, WANET = sig.SigConfig(), low_frequency.LowFrequencyConfig(), wanet.WaNetConfig()


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


@pytest.mark.parametrize("ratio", [0, 1.5])
def test_sig_names_a_wrong_ratio(refuses, ratio):
    with refuses(rf"ratio: expected in \(0, 1\], found {ratio}"):
        sig.poison(a_set(), SIG, ratio=ratio, target=2, seed=1)


@pytest.mark.parametrize("attack, config", [(sig, SIG), (low_frequency, GLOW), (wanet, WANET)])
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


def bent_by_hand(image, field):
    """One (C, H, W) image: every pixel looks where the (H, W, 2) field points, in Python numbers."""
    _, height, width = image.shape
    found = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            right, down = field[row, column].tolist()
            x = (min(max(-1 + 2 * column / (width - 1) + right, -1), 1) + 1) / 2 * (width - 1)
            y = (min(max(-1 + 2 * row / (height - 1) + down, -1), 1) + 1) / 2 * (height - 1)
            left, top = min(int(x), width - 2), min(int(y), height - 2)
            a, b = x - left, y - top
            for channel, plane in enumerate(image.tolist()):
                upper = (1 - a) * plane[top][left] + a * plane[top][left + 1]
                lower = (1 - a) * plane[top + 1][left] + a * plane[top + 1][left + 1]
                found[channel, row, column] = round((1 - b) * upper + b * lower)
    return found


@pytest.mark.parametrize("channels, height, width", [(3, 32, 32), (1, 7, 20)])
def test_wanet_by_hand(channels, height, width):
    images = a_set(2, channels, height, width).images
    field = wanet.draw_field(height, width, wanet.WaNetConfig(strength=2), generator=torch.Generator().manual_seed(3))
    found = wanet.apply_trigger(images, field)
    for image, bent in zip(images, found, strict=True):
        assert torch.equal(bent, bent_by_hand(image, field))


@pytest.mark.parametrize("height, width", [(32, 32), (16, 64)])
def test_the_field_is_the_scaled_noise_at_its_control_points_and_smooth_between(height, width):
    config = wanet.WaNetConfig(points=4, strength=0.5)
    field = wanet.draw_field(height, width, config, generator=torch.Generator().manual_seed(3))
    again = 2 * torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 1
    noise = (again / again.abs().mean()).tolist()
    for way, side in enumerate((width, height)):
        for row, y in ((0, 0), (height - 1, 3)):
            for column, x in ((0, 0), (width - 1, 3)):
                assert field[row, column, way].item() == pytest.approx(0.5 * noise[way][y][x] / side)
    pixels = field * torch.tensor([width - 1, height - 1]) / 2
    assert 0.1 < pixels.abs().mean() < 0.4 and pixels.diff(dim=0).abs().max() < 0.3  # published: 0.24 on average


@pytest.mark.parametrize("ratio, poisoned, decoys", [(0.1, 5, 10), (0.02, 1, 2), (0.4, 20, 30), (1.0, 50, 0)])
def test_wanet_bends_the_poisoned_the_decoys_and_nothing_else(ratio, poisoned, decoys):
    clean = a_set()
    kept = clean.images.clone(), clean.labels.clone()
    found = wanet.poison(clean, WANET, ratio=ratio, target=3, seed=1)
    assert torch.equal(clean.images, kept[0]) and torch.equal(clean.labels, kept[1])
    assert (len(found.poisoned), len(found.decoys)) == (poisoned, decoys)
    assert moved(found, clean) == sorted(found.poisoned.tolist() + found.decoys.tolist())
    assert found.decoys.tolist() == sorted(found.decoys.tolist())
    expected = clean.labels.clone()
    expected[found.poisoned] = 3
    assert torch.equal(found.labels, expected)
    assert torch.equal(found.images[found.poisoned], found.trigger(clean.images[found.poisoned]))
    assert (found.attack, found.target, found.seed, found.parameters["noise"]) == ("wanet", 3, 1, 2.0)


def test_decoys_are_bent_along_the_field_plus_noise_of_their_own():
    images = a_set(1).images.expand(300, -1, -1, -1)  # more than one block, all images equal
    field = wanet.draw_field(32, 32, WANET, generator=torch.Generator().manual_seed(0))
    found = wanet.apply_noisy(images, field, WANET, generator=torch.Generator().manual_seed(5))
    draws = torch.rand(300, 32, 32, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for i in (0, 255, 256, 299):
        assert torch.equal(found[i], bent_by_hand(images[i], field + (2 * draws[i] - 1) / 32))
    assert len({tuple(image.flatten().tolist()) for image in found}) == 300
    still = wanet.apply_noisy(images[:2], field, wanet.WaNetConfig(jitter=0), generator=torch.Generator())
    assert torch.equal(still, wanet.apply_trigger(images[:2], field))


def test_wanet_decoys_are_drawn_from_all_classes_and_their_share_is_a_setting():
    found = wanet.poison(a_set(), wanet.WaNetConfig(noise=3.5), ratio=0.2, target=0, seed=0)
    assert len(found.decoys) == 35 and set((found.decoys % 5).tolist()) == {0, 1, 2, 3, 4}
    none = wanet.poison(a_set(), wanet.WaNetConfig(noise=0), ratio=0.2, target=0, seed=0)
    assert len(none.decoys) == 0 and torch.equal(none.poisoned, found.poisoned)


def test_the_warp_of_an_image_does_not_depend_on_the_others():
    clean = a_set(300)
    field = wanet.draw_field(32, 32, WANET, generator=torch.Generator().manual_seed(0))
    together = wanet.apply_trigger(clean.images, field)
    for i in (0, 255, 256, 299):
        assert torch.equal(wanet.apply_trigger(clean.images[i:i + 1], field)[0], together[i])


def test_another_seed_bends_along_another_field():
    clean = a_set()
    a, b = (wanet.poison(clean, WANET, ratio=0.1, target=0, seed=seed) for seed in (0, 1))
    assert not torch.equal(a.trigger(clean.images), b.trigger(clean.images))


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
    (lambda: wanet.WaNetConfig(points=1), r"WaNetConfig\.points: expected >= 2, found 1"),
    (lambda: wanet.WaNetConfig(strength=0), r"WaNetConfig\.strength: expected > 0, found 0"),
    (lambda: wanet.WaNetConfig(noise=-1), r"WaNetConfig noise, jitter: expected >= 0, found \(-1, 1.0\)"),
    (lambda: wanet.WaNetConfig(jitter=-1), r"WaNetConfig noise, jitter: expected >= 0, found \(2.0, -1\)"),
    (lambda: wanet.apply_trigger(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(9, 8, 2)),
     r"images: expected of \(9, 8\) pixels as the field, found \(8, 8\)"),
    (lambda: wanet.apply_trigger(torch.zeros(1, 3, 8, 8), torch.zeros(8, 8, 2)), "uint8, found"),
    (lambda: sig.poison(a_set(), SIG, ratio=0, target=0, seed=0), r"ratio: expected in \(0, 1\], found 0"),
])
def test_wrong_values_are_named(refuses, make, message):
    with refuses(message):
        make()
