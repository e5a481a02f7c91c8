import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax

from data import self_ensemble
from data.image_sets import ImageSet
from data.resnet import new_resnet
from data.self_ensemble import (
    VARIANTS,
    Ensemble,
    SelfEnsembleConfig,
    budgeted,
    class_features,
    feature_loss,
    moved,
    poison,
    train_checkpoints,
    train_ensemble,
)
from data.targeted_maximising import class_loss, limits
from data.unlearnable import make_unlearnable
from data.victims import train_victim
from tests.surrogate_doubles import check_a_part_of_the_set, check_seeds, check_shape, draw, network, noise

TINY = SelfEnsembleConfig(steps=2, step=4.0, checkpoints=2, inner=2, widths=(4, 4, 4, 4), epochs=2, batch=16, crop=1)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def networks(count=3):
    return [network(seed=seed) for seed in range(count)]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("epochs, checkpoints, expected", [(6, 3, [2, 4, 6]), (5, 2, [2, 5]), (3, 3, [1, 2, 3])])
def test_checkpoints_are_copies_at_equal_distances_of_one_training(epochs, checkpoints, expected):
    clean, config = noise(), replace(TINY, epochs=epochs, checkpoints=checkpoints)
    shown = []

    def record(epoch, model):
        assert model.training
        shown.append((epoch, weights(model)))

    plain, watched = (train_victim(clean.images, clean.labels, 4, config.views(3), seed=1, network=new_resnet,
                                   after_epoch=after) for after in (None, record))
    found = train_checkpoints(clean, config, seed=1)
    assert [epoch for epoch, _ in shown] == list(range(1, epochs + 1))
    assert same(weights(plain), weights(watched)) and same(weights(plain), weights(found[-1]))
    states = dict(shown)
    assert all(same(weights(model), states[epoch]) for model, epoch in zip(found, expected, strict=True))
    assert not same(states[expected[0]], states[expected[1]])
    assert all(not model.training for model in found)
    assert all(weight.grad is None and not weight.requires_grad for model in found for weight in model.parameters())


@pytest.mark.parametrize("block", [5, 512])
def test_class_features_are_the_means_of_images_one_by_one(monkeypatch, block):
    monkeypatch.setattr(self_ensemble, "EVALUATION_BATCH", block)
    clean, model = noise(14), networks(1)[0]
    sums, counts = torch.zeros(4, 8), torch.zeros(4, 1)
    for image, label in zip(clean.images, clean.labels, strict=True):
        sums[label] += model.features(image[None] / 255)[0]
        counts[label] += 1
    torch.testing.assert_close(class_features(model, clean, TINY.views(3)), sums / counts, rtol=1e-4, atol=1e-5)


def slow_moves(checkpoints, clean, targets, config):
    """Plain and fa, one image and one checkpoint at a time, the losses written out."""
    means = [torch.stack([model.features(clean.images[clean.labels == k] / 255).mean(0) for k in range(4)])
             for model in checkpoints]
    moved_images = []
    for image, target in zip(clean.images.float(), targets, strict=True):
        x = image.clone()
        for _ in range(config.steps):
            gradient = torch.zeros_like(x)
            for model, mean in zip(checkpoints, means, strict=True):
                pixels = x.clone().requires_grad_(True)
                if config.variant == "plain":
                    loss = -log_softmax(model(pixels[None] / 255)[0], 0)[target]
                else:
                    loss = ((model.features(pixels[None] / 255)[0] - mean[target]) ** 2).mean()
                loss.backward()
                gradient += pixels.grad / len(checkpoints)
            change = (x - config.step * gradient.sign() - image).clamp(-config.radius, config.radius)
            x = (image + change).clamp(0, 255)
        moved_images.append(x.round().to(torch.uint8))
    return torch.stack(moved_images)


@pytest.mark.parametrize("variant", ["plain", "fa"])
def test_the_moves_are_those_of_the_slow_descent(monkeypatch, variant):
    clean, checkpoints = noise(8), networks(3)
    monkeypatch.setattr(self_ensemble, "train_checkpoints", lambda *given, **seed: checkpoints)
    config = replace(TINY, variant=variant, steps=3, radius=6.0)
    targets = (clean.labels + 2) % 4
    found = moved(train_ensemble(clean, config, seed=0), clean.images, targets, config, generator=draw(seed=0))
    expected = slow_moves(checkpoints, clean, targets, config)
    # A gradient near 0 may have another sign where images are computed one by one.
    assert (found != expected).double().mean() < 0.01
    assert (found != clean.images).double().mean() > 0.9


class Scaled(nn.Module):
    """Features are the pixels times fixed factors: gradients can be written down."""

    def __init__(self, factors):
        super().__init__()
        self.factors = factors

    def features(self, x):
        return x.flatten(1) * self.factors


def written_out(factors, aims, images, targets, config, draws):
    """The two loops, with the gradient of mean((a x / 255 - f)^2) as a formula, in float64."""
    radius, size = math.floor(config.radius), images[0].size

    def gradient(k, x):
        return 2 * factors[k] / (255 * size) * (factors[k] * x / 255 - aims[k][targets])

    def lowered(x, by):
        return np.clip(np.clip(x - config.step * np.sign(by), images - radius, images + radius), 0, 255)

    x = images
    for chosen in draws:
        each = [gradient(k, x) for k in range(len(factors))]
        inside, total = x, 0.0
        for k in chosen:
            total = total + gradient(k, inside) - (each[k] - np.mean(each, axis=0))
            inside = lowered(inside, total)
        x = lowered(x, total)
    return np.round(x)


def test_the_reduction_of_variance_is_the_written_out_one():
    config = replace(TINY, variant="fa_vr", steps=4, step=3.0, inner=5, epochs=3, checkpoints=3)
    generator = draw(seed=0)
    factors = torch.rand(3, 12, generator=generator) + 0.5
    aims = torch.rand(3, 4, 12, generator=generator)
    images = torch.randint(256, (6, 3, 2, 2), generator=generator, dtype=torch.uint8)
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    ensemble = Ensemble([Scaled(row) for row in factors], list(aims), feature_loss, config.views(3))
    found = moved(ensemble, images, targets, config, generator=draw(seed=5))
    drawing = draw(seed=5)
    draws = [torch.randint(3, (5,), generator=drawing).tolist() for _ in range(4)]
    assert len({tuple(row) for row in draws}) > 1
    flat = images.flatten(1).double().numpy()
    expected = written_out(factors.double().numpy(), aims.double().numpy(), flat, targets.numpy(), config, draws)
    assert found.flatten(1).tolist() == expected.tolist()
    plain = moved(ensemble, images, targets, replace(config, variant="fa"), generator=draw(seed=5))
    assert not torch.equal(found, plain)


@each_variant
@pytest.mark.parametrize("radius", [1.0, 7.5, 8.0, 16.0])
def test_no_pixel_moves_further_than_the_radius_after_rounding(monkeypatch, variant, radius):
    checkpoints = networks(2)
    monkeypatch.setattr(self_ensemble, "train_checkpoints", lambda *given, **seed: checkpoints)
    clean, config = noise(), replace(TINY, variant=variant, radius=radius, step=9.0)
    clean.images[:6], clean.images[6:12] = 0, 255
    found = poison(clean, config, ratio=1.0, seed=0)
    change = found.images.int() - clean.images.int()
    assert found.images.dtype == torch.uint8 and change.abs().max() == math.floor(radius)
    assert (change[:6] >= 0).all() and (change[6:12] <= 0).all()  # nothing wrapped around


def mean_over_checkpoints(ensemble, images, targets):
    with torch.no_grad():
        return sum(ensemble.loss(model, images.float(), aims[targets], ensemble.views).item()
                   for model, aims in zip(ensemble.checkpoints, ensemble.aims, strict=True))


@each_variant
def test_what_the_checkpoints_ask_for_comes_nearer(monkeypatch, variant):
    clean, checkpoints = noise(32), networks(3)
    for model in checkpoints:  # as sure of their classes as trained ones, and of all as often
        model.linear.weight *= 300
        model.linear.bias.copy_(-model.linear.weight @ model.features(clean.images / 255).mean(0))
    monkeypatch.setattr(self_ensemble, "train_checkpoints", lambda *given, **seed: checkpoints)
    config = replace(TINY, variant=variant, steps=6, radius=16.0, inner=3)
    found = poison(clean, config, ratio=1.0, seed=0)
    ensemble, targets = train_ensemble(clean, config, seed=0), (clean.labels + 2) % 4
    assert ensemble.loss is (class_loss if variant == "plain" else feature_loss)
    before, after = (mean_over_checkpoints(ensemble, images, targets) for images in (clean.images, found.images))
    assert after < 0.9 * before


@pytest.mark.parametrize("classes, shift, expected", [(10, 0, 5), (43, 0, 21), (2, 0, 1), (3, 0, 1), (10, 3, 3)])
def test_images_are_moved_in_blocks_each_towards_its_own_target(monkeypatch, classes, shift, expected):
    clean, blocks = noise(50, classes=classes), []

    def recorded(ensemble, images, targets, config, *, generator):
        blocks.append((images, targets))
        return images

    monkeypatch.setattr(self_ensemble, "train_checkpoints", lambda *given, **seed: [])
    monkeypatch.setattr(self_ensemble, "moved", recorded)
    found = poison(clean, replace(TINY, block=10, shift=shift), ratio=0.5, seed=2)
    assert [len(images) for images, _ in blocks] == [10, 10, 5]
    assert torch.equal(torch.cat([images for images, _ in blocks]), clean.images[found.poisoned])
    targets = torch.cat([targets for _, targets in blocks])
    assert torch.equal(targets, (clean.labels[found.poisoned] + expected) % classes)


@each_variant
def test_only_the_drawn_images_change_and_all_train_the_checkpoints(monkeypatch, variant):
    check_a_part_of_the_set(monkeypatch, self_ensemble, replace(TINY, variant=variant), "sep")


def test_equal_seeds_give_equal_sets():
    check_seeds(self_ensemble, TINY)


@pytest.mark.parametrize("channels, height, width, classes", [(1, 8, 8, 2), (3, 20, 12, 2), (1, 9, 33, 5)])
def test_other_shapes_and_numbers_of_classes(channels, height, width, classes):
    check_shape(self_ensemble, replace(TINY, epochs=1, checkpoints=1), channels, height, width, classes)


def test_the_attack_has_its_name():
    parameters = {"variant": "fa", "steps": 2, "checkpoints": 1, "widths": (4, 4, 4, 4), "epochs": 1, "batch": 16}
    found = make_unlearnable("sep", noise(), parameters, ratio=0.5, seed=3)
    expected = poison(noise(), SelfEnsembleConfig(**parameters), ratio=0.5, seed=3)
    assert torch.equal(found.images, expected.images) and found.attack == "sep"


def test_defaults_are_the_published_ones():
    config = SelfEnsembleConfig()
    assert (config.variant, config.radius, config.steps, config.step) == ("fa_vr", 8.0, 30, 1.0)
    assert (config.checkpoints, config.inner, config.epochs) == (15, 15, 120)
    assert budgeted().steps * budgeted().step >= 2 * budgeted().radius  # every pixel can cross its range


@pytest.mark.parametrize("wrong, message", [
    ({"variant": "vr"}, "SelfEnsembleConfig.variant: expected one of plain, fa, fa_vr, found vr"),
    ({"radius": 0.5}, r"SelfEnsembleConfig.radius: expected in \[1, 255\] grey levels, found 0.5"),
    ({"step": 0.0}, r"SelfEnsembleConfig step, steps: expected > 0, found \(0.0, 30\)"),
    ({"steps": 0}, r"SelfEnsembleConfig step, steps: expected > 0, found \(1.0, 0\)"),
    ({"shift": -1}, "SelfEnsembleConfig.shift: expected >= 0, found -1"),
    ({"inner": 0}, "SelfEnsembleConfig.inner: expected > 0 checkpoints, found 0"),
    ({"checkpoints": 0}, "SelfEnsembleConfig.checkpoints: expected 1 to the 120 epochs, found 0"),
    ({"checkpoints": 9, "epochs": 8}, "SelfEnsembleConfig.checkpoints: expected 1 to the 8 epochs, found 9"),
    ({"block": 0}, "SelfEnsembleConfig.block: expected > 0 images, found 0"),
    ({"widths": (4, 4, 4)}, r"SelfEnsembleConfig.widths: expected four positive numbers, found \(4, 4, 4\)"),
    ({"epochs": 0}, r"VictimConfig epochs, batch: expected > 0, > 1, found \(0, 128\)"),
    ({"rate": 0.0}, r"VictimConfig rate, clip: expected > 0, found \(0.0, 5.0\)"),
    ({"precision": "half"}, "VictimConfig.precision: expected one of auto, float32, bfloat16, found half"),
])
def test_a_wrong_config_is_named(refuses, wrong, message):
    with refuses(message):
        SelfEnsembleConfig(**wrong)


@pytest.mark.parametrize("parts, ratio, message", [
    ({"shift": 8}, 1.0, "shift: expected no multiple of the 4 classes, found 8"),
    ({}, 0.0, r"ratio: expected in \(0, 1\], found 0.0"),
    ({}, 0.001, "ratio: expected at least one of 24 images, found 0.001"),
])
def test_a_wrong_draw_is_named_before_the_training(refuses, monkeypatch, parts, ratio, message):
    monkeypatch.delattr(self_ensemble, "train_victim")
    with refuses(message):
        poison(noise(), replace(TINY, **parts), ratio=ratio, seed=0)


@each_variant
def test_a_class_without_images_has_no_features(refuses, variant):
    clean, config = noise(), replace(TINY, variant=variant)
    clean = ImageSet(clean.images, clean.labels * 2, 8, "gaps")
    if variant == "plain":
        assert len(poison(clean, config, ratio=1.0, seed=0).poisoned) == 24
        return
    with refuses(r"gaps labels: expected images of every class, found none of \[1, 3, 5, 7\]"):
        poison(clean, config, ratio=1.0, seed=0)


def test_checkpoints_that_blew_up_are_named(refuses, monkeypatch):
    def broken(*given, after_epoch, **rest):
        model = new_resnet(4, (4, 4, 4, 4), 3, seed=0)
        with torch.no_grad():
            model.linear.bias[0] = math.inf
        after_epoch(2, model)

    monkeypatch.setattr(self_ensemble, "train_victim", broken)
    with refuses("weights of the surrogate: expected finite: a lower rate .*, found NaN or infinite values"):
        poison(noise(), TINY, ratio=1.0, seed=0)


def test_limits_are_whole_grey_levels():
    low, high = limits(torch.tensor([0, 3, 200, 250], dtype=torch.uint8), 7.9)
    assert low.tolist() == [0, 0, 193, 243] and high.tolist() == [7, 10, 207, 255]
