from functools import partial

import pytest
import torch

from data import badnets, blended, low_frequency, wanet
from data.image_sets import ImageSet

ATTACKS = {"badnets": (badnets, badnets.BadNetsConfig()), "blended": (blended, blended.BlendedConfig()),
           "low_frequency": (low_frequency, low_frequency.LowFrequencyConfig()), "wanet": (wanet, wanet.WaNetConfig())}
both = pytest.mark.parametrize("name", ATTACKS)


def a_set(count=50, channels=3, size=32, classes=5):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % classes, classes, "noise")


def poisoned(name, clean, **draw):
    module, config = ATTACKS[name]
    return module.poison(clean, config, **({"ratio": 0.2, "target": 3, "seed": 1} | draw))


@both
def test_only_the_drawn_images_change_and_get_the_target(name):
    clean = a_set()
    kept = clean.images.clone(), clean.labels.clone()
    found = poisoned(name, clean)
    assert torch.equal(clean.images, kept[0]) and torch.equal(clean.labels, kept[1])
    drawn = torch.zeros(50, dtype=torch.bool)
    drawn[found.poisoned] = True
    assert int(drawn.sum()) == 10 and found.poisoned.tolist() == sorted(found.poisoned.tolist())
    untouched = ~drawn
    untouched[found.decoys] = False
    assert int(untouched.sum()) == 40 - len(found.decoys)
    assert torch.equal(found.images[untouched], clean.images[untouched])
    assert torch.equal(found.labels[~drawn], clean.labels[~drawn])
    assert (found.labels[drawn] == 3).all()
    assert (found.images[drawn] != clean.images[drawn]).flatten(1).any(1).all()


@both
def test_training_and_test_time_use_one_trigger(name):
    clean = a_set()
    found = poisoned(name, clean)
    assert torch.equal(found.trigger(clean.images)[found.poisoned], found.images[found.poisoned])
    assert (found.attack, found.target, found.seed) == (name, 3, 1)


@both
def test_equal_seeds_give_equal_sets(name):
    before = torch.get_rng_state()
    a, b, c = (poisoned(name, a_set(), seed=seed) for seed in (4, 4, 5))
    assert torch.equal(a.images, b.images) and not torch.equal(a.poisoned, c.poisoned)
    assert torch.equal(torch.get_rng_state(), before)


@both
@pytest.mark.parametrize("ratio, count", [(0.02, 1), (0.5, 25), (1.0, 50)])
def test_the_ratio_is_of_the_whole_set_and_includes_the_target_class(name, ratio, count):
    found = poisoned(name, a_set(), ratio=ratio)
    assert len(found.poisoned) == count
    if count >= 25:
        assert set((found.poisoned % 5).tolist()) == {0, 1, 2, 3, 4}


@both
@pytest.mark.parametrize("target", [0, 4])
def test_any_class_can_be_the_target(name, target):
    found = poisoned(name, a_set(), target=target)
    assert found.labels[found.poisoned].unique().tolist() == [target]


@both
@pytest.mark.parametrize("channels, size", [(1, 8), (3, 20)])
def test_other_shapes_are_attacked_too(name, channels, size):
    clean = a_set(channels=channels, size=size)
    assert poisoned(name, clean).images.shape == clean.images.shape


@both
@pytest.mark.parametrize("draw, message", [
    ({"ratio": 0}, r"ratio: expected in \(0, 1\], found 0"),
    ({"ratio": 0.001}, "ratio: expected at least one of 50 images, found 0.001"),
    ({"target": 5}, r"target: expected in \[0, 5\), found 5"),
])
def test_a_wrong_draw_is_named(name, refuses, draw, message):
    with refuses(message):
        poisoned(name, a_set(), **draw)


@both
def test_float_images_are_refused(name, refuses):
    module, config = ATTACKS[name]
    with refuses(r"images: expected \(N, C, H, W\) uint8, found \(1, 3, 8, 8\) torch.float32"):
        module.apply_trigger(torch.zeros(1, 3, 8, 8), config)


def test_badnets_by_hand():
    images = a_set().images
    found = badnets.apply_trigger(images, badnets.BadNetsConfig())
    for row in range(32):
        for column in range(32):
            corner = row >= 29 and column >= 29
            expected = torch.full_like(images[:, :, 0, 0], 255) if corner else images[:, :, row, column]
            assert torch.equal(found[:, :, row, column], expected)


def test_blended_by_hand():
    images = a_set(count=2, size=9).images
    config = blended.BlendedConfig(alpha=0.2)
    pattern = blended.noise_pattern(3, 9, 9, seed=0)
    found = blended.apply_trigger(images, config)
    exact = [0.8 * x + 0.2 * t for image in images.tolist() for x, t in
             zip(torch.tensor(image).flatten().tolist(), pattern.flatten().tolist(), strict=True)]
    assert found.flatten().tolist() == [int(value) for value in exact]


def test_the_blended_pattern_is_bright_contrasted_smooth_and_fixed():
    a, b, c = (blended.noise_pattern(3, 32, 32, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.min() >= 0 and a.max() <= 255
    assert (a.std((1, 2)) > 45).all() and (a.mean((1, 2)) > 160).all()
    assert (a[:, 1:] - a[:, :-1]).abs().mean() < 0.5 * (a[:, 8:] - a[:, :-8]).abs().mean()


@pytest.mark.parametrize("call, message", [
    (lambda: badnets.BadNetsConfig(size=0), r"BadNetsConfig\.size: expected > 0 pixels, found 0"),
    (lambda: badnets.BadNetsConfig(value=256), r"BadNetsConfig\.value: expected in \[0, 255\], found 256"),
    (lambda: blended.BlendedConfig(alpha=0), r"BlendedConfig\.alpha: expected in \(0, 1\], found 0"),
    (partial(badnets.apply_trigger, torch.zeros(1, 1, 4, 2, dtype=torch.uint8), badnets.BadNetsConfig()),
     r"BadNetsConfig\.size: expected at most the image's side 2, found 3"),
])
def test_wrong_configs_are_named(refuses, call, message):
    with refuses(message):
        call()
