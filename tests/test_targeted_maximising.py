import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from data import targeted_maximising
from data.image_sets import ImageSet
from data.resnet import new_resnet
from data.targeted_maximising import (
    TargetedMaximisingConfig,
    budgeted,
    frozen,
    mean_loss,
    moved,
    poison,
    targets_of,
)
from data.unlearnable import make_unlearnable
from tests.surrogate_doubles import check_a_part_of_the_set, check_seeds, check_shape, draw, network, noise

TINY = TargetedMaximisingConfig(steps=4, step=0.25, widths=(4, 4, 4, 4), epochs=1, batch=16, crop=1)


def seen(image, row, column, mirrored, crop):
    """The (C, H, W) image moved inside black borders, and perhaps mirrored."""
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * crop, width + 2 * crop)
    padded[:, crop:crop + height, crop:crop + width] = image
    part = padded[:, row:row + height, column:column + width]
    return part.flip(2) if mirrored else part


def slow_moves(model, images, targets, config, generator):
    """Signed descent of one image at a time, the loss written out."""
    starts = (config.radius * torch.randn(images.shape, generator=generator)).clamp(-config.radius, config.radius)
    x = [(image.float() + start).clamp(0, 255) for image, start in zip(images, starts, strict=True)]
    for _ in range(config.steps):
        shifts = torch.randint(0, 2 * config.crop + 1, (2, len(images), 1), generator=generator)
        mirrored = torch.rand(len(images), 1, generator=generator) < 0.5 if config.flip else torch.zeros(len(images))
        for i, target in enumerate(targets):
            pixels = x[i].clone().requires_grad_(True)
            shown = seen(pixels, int(shifts[0, i]), int(shifts[1, i]), bool(mirrored[i]), config.crop)
            (-log_softmax(model(shown[None] / 255)[0], 0)[target]).backward()
            lower = x[i] - config.step * config.radius * pixels.grad.sign()
            x[i] = (images[i] + (lower - images[i]).clamp(-config.radius, config.radius)).clamp(0, 255)
    return torch.stack(x).round().to(torch.uint8)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_moves_are_those_of_the_slow_descent(flip, channels):
    clean, config = noise(6, channels), replace(TINY, radius=6.0, flip=flip, crop=2)
    model = network(channels=channels)
    targets = targets_of(clean.labels, 4, 1)
    found = moved(model, clean.images, targets, config, generator=draw(seed=3))
    expected = slow_moves(model, clean.images, targets, config, draw(seed=3))
    # A gradient near 0 may have another sign where images are computed one by one.
    assert (found != expected).double().mean() < 0.01
    assert (found != clean.images).double().mean() > 0.5


@pytest.mark.parametrize("radius", [1.0, 2.5, 7.5, 8.0, 8.5, 16.0])
def test_no_pixel_moves_further_than_the_radius_after_rounding(radius):
    clean = noise()
    clean.images[:6], clean.images[6:12] = 0, 255
    found = moved(network(), clean.images, clean.labels, replace(TINY, radius=radius), generator=draw(seed=0))
    change = found.int() - clean.images.int()
    assert found.dtype == torch.uint8 and change.abs().max() == math.floor(radius)
    assert (change[:6] >= 0).all() and (change[6:12] <= 0).all()  # nothing wrapped around


@pytest.mark.parametrize("classes, shift", [(2, 1), (4, 1), (4, 6), (10, 3)])
def test_targets_by_hand(classes, shift):
    labels = torch.tensor([0, classes - 1, 1])
    assert targets_of(labels, classes, shift).tolist() == [(label + shift) % classes for label in labels.tolist()]


def test_the_surrogate_is_left_as_it_is():
    clean, model = noise(6), network()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kept = clean.images.clone()
    moved(model, clean.images, clean.labels, TINY, generator=draw(seed=0))
    assert torch.equal(clean.images, kept) and not model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None and not weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("block", [5, 100])
def test_the_mean_loss_is_that_of_all_images_one_by_one(block):
    clean, model = noise(12), network()
    each = [cross_entropy(model(image[None] / 255), label[None]) for image, label in
            zip(clean.images, clean.labels, strict=True)]
    found = mean_loss(model, clean.images, clean.labels, replace(TINY, block=block))
    assert found == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def tinted(count=64):
    """Class k < 3 has 30 grey levels more of colour k, class 3 of none, over noise of 20."""
    images = torch.randint(100, 120, (count, 3, 8, 8), generator=draw(seed=0), dtype=torch.uint8)
    labels = torch.arange(count) % 4
    for label in range(3):
        images[labels == label, label] += 30
    return ImageSet(images, labels, 4, "tinted")


def test_the_surrogate_takes_the_images_for_the_next_class(monkeypatch):
    clean, trained = tinted(), []
    monkeypatch.setattr(targeted_maximising, "frozen", lambda model: trained.append(frozen(model)) or trained[0])
    config = TargetedMaximisingConfig(steps=10, step=0.2, radius=45.0, widths=(8, 8, 16, 16), epochs=15, batch=16,
                                      rate=0.02, crop=0, flip=False)
    found = poison(clean, config, ratio=1.0, seed=1)
    (surrogate,), targets = trained, (clean.labels + 1) % 4
    assert (surrogate(clean.images / 255).argmax(1) == clean.labels).double().mean() > 0.9
    before, after = (mean_loss(surrogate, images, targets, config) for images in (clean.images, found.images))
    assert after < before / 2
    assert (surrogate(found.images / 255).argmax(1) == targets).double().mean() > 0.5


def test_only_the_drawn_images_change_and_all_train_the_surrogate(monkeypatch):
    check_a_part_of_the_set(monkeypatch, targeted_maximising, TINY, "tap")


def test_images_are_moved_in_blocks_each_towards_its_own_target(monkeypatch):
    clean, blocks = noise(), []

    def recorded(surrogate, images, targets, config, *, generator):
        blocks.append((images, targets))
        return images

    monkeypatch.setattr(targeted_maximising, "moved", recorded)
    found = poison(clean, replace(TINY, block=5, shift=2), ratio=0.5, seed=2)
    assert [len(images) for images, _ in blocks] == [5, 5, 2]
    assert torch.equal(torch.cat([images for images, _ in blocks]), clean.images[found.poisoned])
    assert torch.equal(torch.cat([targets for _, targets in blocks]), (clean.labels[found.poisoned] + 2) % 4)


@pytest.mark.parametrize("losses, best", [([3.0, 1.0, 2.0], 1), ([1.0, 2.0, 3.0], 0), ([2.0, 2.0, 1.0], 2)])
def test_of_several_starts_the_one_with_the_lowest_loss_stays(monkeypatch, losses, best):
    clean, tried, given = noise(), [], iter(losses)

    def told(surrogate, images, targets, config):
        tried.append(images.clone())
        return next(given)

    monkeypatch.setattr(targeted_maximising, "mean_loss", told)
    found = poison(clean, replace(TINY, restarts=3), ratio=0.5, seed=1)
    assert len(tried) == 3 and not torch.equal(tried[0], tried[1]) and not torch.equal(tried[1], tried[2])
    assert torch.equal(found.images[found.poisoned], tried[best])


def test_starts_are_compared_by_the_loss_of_the_finished_images(monkeypatch):
    clean, calls = noise(), []

    def spied(surrogate, images, targets, config):
        calls.append((images.clone(), targets.clone(), mean_loss(surrogate, images, targets, config)))
        return calls[-1][2]

    monkeypatch.setattr(targeted_maximising, "mean_loss", spied)
    found = poison(clean, replace(TINY, restarts=4), ratio=0.5, seed=1)
    lowest = min(calls, key=lambda call: call[2])
    assert torch.equal(found.images[found.poisoned], lowest[0])
    assert torch.equal(lowest[1], (clean.labels[found.poisoned] + 1) % 4)


def test_equal_seeds_give_equal_sets():
    check_seeds(targeted_maximising, TINY)


@pytest.mark.parametrize("channels, height, width, classes", [(1, 8, 8, 2), (3, 20, 12, 2), (1, 9, 33, 5)])
def test_other_shapes_and_numbers_of_classes(channels, height, width, classes):
    check_shape(targeted_maximising, TINY, channels, height, width, classes)


def test_the_attack_has_its_name():
    parameters = {"steps": 2, "widths": (4, 4, 4, 4), "epochs": 1, "batch": 16}
    found = make_unlearnable("tap", noise(), parameters, ratio=0.5, seed=3)
    expected = poison(noise(), TargetedMaximisingConfig(**parameters), ratio=0.5, seed=3)
    assert torch.equal(found.images, expected.images) and found.attack == "tap"


def test_defaults_are_the_published_ones():
    config = TargetedMaximisingConfig()
    assert (config.radius, config.steps, config.step * config.radius, config.epochs) == (8.0, 250, 0.4, 40)
    assert budgeted().radius == 8.0 and budgeted().steps * budgeted().step * 8 > 16  # every pixel can cross its range


@pytest.mark.parametrize("wrong, message", [
    ({"radius": 0.5}, r"TargetedMaximisingConfig.radius: expected in \[1, 255\] grey levels, found 0.5"),
    ({"radius": 256}, r"TargetedMaximisingConfig.radius: expected in \[1, 255\] grey levels, found 256"),
    ({"step": 0.0}, r"TargetedMaximisingConfig.step: expected in \(0, 1\] of the radius, found 0.0"),
    ({"step": 2.0}, r"TargetedMaximisingConfig.step: expected in \(0, 1\] of the radius, found 2.0"),
    ({"steps": 0}, r"TargetedMaximisingConfig steps, restarts: expected > 0, found \(0, 1\)"),
    ({"restarts": 0}, r"TargetedMaximisingConfig steps, restarts: expected > 0, found \(250, 0\)"),
    ({"shift": 0}, "TargetedMaximisingConfig.shift: expected > 0, found 0"),
    ({"block": 0}, "TargetedMaximisingConfig.block: expected > 0 images, found 0"),
    ({"widths": (4, 4, 4)}, r"TargetedMaximisingConfig.widths: expected four positive numbers, found \(4, 4, 4\)"),
    ({"widths": (4, 0, 4, 4)}, "TargetedMaximisingConfig.widths: expected four positive numbers"),
    ({"epochs": 0}, r"VictimConfig epochs, batch: expected > 0, > 1, found \(0, 128\)"),
    ({"rate": 0.0}, r"VictimConfig rate, clip: expected > 0, found \(0.0, 5.0\)"),
    ({"crop": -1}, "VictimConfig.crop: expected >= 0 pixels, found -1"),
    ({"precision": "half"}, "VictimConfig.precision: expected one of auto, float32, bfloat16, found half"),
])
def test_a_wrong_config_is_named(refuses, wrong, message):
    with refuses(message):
        TargetedMaximisingConfig(**wrong)


@pytest.mark.parametrize("parts, ratio, message", [
    ({"shift": 4}, 1.0, "shift: expected no multiple of the 4 classes, found 4"),
    ({}, 0.0, r"ratio: expected in \(0, 1\], found 0.0"),
    ({}, 0.001, "ratio: expected at least one of 24 images, found 0.001"),
])
def test_a_wrong_draw_is_named_before_the_training(refuses, monkeypatch, parts, ratio, message):
    monkeypatch.delattr(targeted_maximising, "train_victim")
    with refuses(message):
        poison(noise(), replace(TINY, **parts), ratio=ratio, seed=0)


def test_a_surrogate_that_blew_up_is_named(refuses):
    model = new_resnet(2, (4, 4, 4, 4), 3, seed=0)
    with torch.no_grad():
        model.linear.weight[0, 0] = math.nan
    with refuses("weights of the surrogate: expected finite: a lower rate .*, found NaN or infinite values"):
        frozen(model)
