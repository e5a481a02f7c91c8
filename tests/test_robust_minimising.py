from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, pad

from data import error_minimising as em
from data.devices import device_generator
from data.image_sets import ImageSet
from data.resnet import new_resnet
from data.robust_minimising import (
    RobustMinimisingConfig,
    poison,
    robust_minimising,
    robustly_descended,
    varied,
    worst_point,
)
from data.unlearnable import make_unlearnable

WIDTHS = (2, 4, 4, 8)
SMALL = RobustMinimisingConfig(widths=WIDTHS, batch=6, step=3.0, steps=2, draws=3, attack_step=1.5, attack_steps=2,
                               crop=2, training_steps=3, drop_every=2)


def a_set(count=14, classes=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[0], images[1] = 0, 255
    return ImageSet(images, torch.arange(count) % classes, classes, "noise")


def one_varied(image, crop, row, column, mirror):
    """One image by padding, cutting and flipping."""
    cut = pad(image, (crop,) * 4)[:, row:row + image.shape[1], column:column + image.shape[2]]
    return cut.flip(2) if mirror else cut


def one_worst(model, image, label, start, config):
    """The ascent for one image."""
    d = start
    for _ in range(config.attack_steps):
        x = (image + d).requires_grad_(True)
        (-model(x[None] / 255).log_softmax(1)[0, label]).backward()
        d = (d + config.attack_step * x.grad.sign()).clamp(-config.attack_radius, config.attack_radius)
        d = (image + d).clamp(0, 255) - image
    return image + d


def by_hand(model, images, labels, config, generator):
    """The descent, image by image and draw by draw; the loss there is averaged before its gradient is taken."""
    count = len(images)
    noise = em.random_start(images, config.radius, generator=generator)
    for _ in range(config.steps):
        shifts = torch.randint(0, 2 * config.crop + 1, (2, config.draws * count, 1), generator=generator)
        mirrors = torch.rand(config.draws * count, 1, generator=generator) < 0.5
        there = device_generator(images.device, generator=generator)
        uniform = 2 * torch.rand(config.draws * count, *images.shape[1:], generator=there) - 1
        for i in range(count):
            p, total = noise[i].clone().requires_grad_(True), 0
            for k in range(i, config.draws * count, count):
                variant = one_varied(images[i] + p, config.crop, *shifts[:, k, 0].tolist(), mirrors[k, 0])
                fixed = variant.detach()
                start = (fixed + config.attack_radius * uniform[k]).clamp(0, 255) - fixed
                away = one_worst(model, fixed, labels[i], start, config) - fixed
                total = total - model((variant + away)[None] / 255).log_softmax(1)[0, labels[i]]
            (gradient,) = torch.autograd.grad(total / config.draws, p)
            step = (noise[i] - config.step * gradient.sign()).clamp(-config.radius, config.radius)
            noise[i] = (images[i] + step).clamp(0, 255) - images[i]
    return noise


def test_the_descent_agrees_with_loops():
    clean = a_set(6)
    model = new_resnet(3, WIDTHS, 3, seed=1).eval()
    found = robustly_descended(model, clean.images.float(), clean.labels, SMALL,
                               generator=torch.Generator().manual_seed(2))
    wanted = by_hand(model, clean.images.float(), clean.labels, SMALL, torch.Generator().manual_seed(2))
    torch.testing.assert_close(found, wanted)


def test_the_adversary_raises_what_the_descent_lowers():
    clean = a_set()
    images, labels = clean.images.float(), clean.labels
    model = new_resnet(3, WIDTHS, 3, seed=1).eval()

    def loss(x, config=SMALL):
        return cross_entropy(em.answers(model, x, config), labels)

    def worst(noise):
        return loss(worst_point(model, images + noise, labels, SMALL, generator=torch.Generator().manual_seed(5)))

    found = worst_point(model, images, labels, SMALL, generator=torch.Generator().manual_seed(2))
    assert (found - images).abs().max() == 4 and found.min() >= 0 and found.max() <= 255
    assert loss(found) > loss(images)
    plain = replace(SMALL, steps=8, crop=0, flip=False)
    noise = robustly_descended(model, images, labels, plain, generator=torch.Generator().manual_seed(3))
    assert worst(noise) < worst(torch.zeros_like(images))


def test_without_adversary_and_shifts_it_descends_as_em_does():
    bare = replace(SMALL, draws=1, attack_radius=0.0, crop=0, flip=False)
    clean, model = a_set(), new_resnet(3, WIDTHS, 3, seed=1).eval()
    images, first = clean.images.float(), torch.Generator().manual_seed(1)
    start = em.random_start(images, bare.radius, generator=torch.Generator().manual_seed(1))
    found = robustly_descended(model, images, clean.labels, bare, generator=first)
    assert torch.equal(found, em.descended(model, images, clean.labels, start, bare))


def test_the_network_learns_from_worst_points_of_variants():
    clean, config = a_set(), replace(SMALL, training_steps=2, drop_every=1)
    images, labels, generator = clean.images.float(), clean.labels, torch.Generator().manual_seed(3)
    model, optimiser = em.new_surrogate(clean, config, seed=3)
    batches = em.shuffled_batches(14, 6, generator=generator)
    for rate in (0.1, 0.01):
        index = next(batches)
        with em.frozen(model):
            noise = robustly_descended(model, images[index], labels[index], config, generator=generator)
            x = varied(images[index] + noise, config, generator=generator)
            x = worst_point(model, x, labels[index], config, generator=generator)
        optimiser.param_groups[0]["lr"] = rate
        em.learn(model, optimiser, x, labels[index], config)
    wanted = torch.cat([robustly_descended(model.eval(), images[index], labels[index], config, generator=generator)
                        for index in torch.arange(14).split(6)])
    found = robust_minimising(clean, config, seed=3)
    assert found.dtype == torch.int8 and torch.equal(found, wanted.round().to(torch.int8))
    assert torch.equal(poison(clean, config, ratio=1.0, seed=3).images, em.within(clean.images, wanted, config.radius))


def test_equal_seeds_give_equal_noise():
    before, clean = torch.get_rng_state(), a_set()
    kept = clean.images.clone()
    a, b, c = (robust_minimising(clean, SMALL, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(clean.images, kept)


@pytest.mark.parametrize("radius", [5.0, 8.5, 16.0])
def test_only_drawn_images_change_and_by_no_more_than_the_radius(radius):
    clean = a_set()
    parameters = {"radius": radius, "widths": WIDTHS, "batch": 6, "step": radius / 2, "steps": 2, "draws": 2,
                  "attack_steps": 1, "training_steps": 2}
    whole, part = (make_unlearnable("rem", clean, parameters, ratio=ratio, seed=1) for ratio in (1.0, 0.5))
    change = whole.images.int() - clean.images.int()
    assert change.abs().max() == int(radius) and change.min() < 0 < change.max()
    drawn = torch.isin(torch.arange(14), part.poisoned)
    assert int(drawn.sum()) == 7 and torch.equal(part.images[drawn], whole.images[drawn])
    assert torch.equal(part.images[~drawn], clean.images[~drawn]) and torch.equal(part.labels, clean.labels)
    assert (part.attack, part.seed, part.parameters["radius"]) == ("rem", 1, radius)


@pytest.mark.parametrize("change, message", [
    ({"radius": 300.0}, r"radius: expected in \[1, 255\] grey levels, found 300.0"),
    ({"step": 0.0}, r"step, steps: expected > 0, found \(0.0, 2\)"),
    ({"widths": (4,)}, r"widths: expected four positive numbers, found \(4,\)"),
    ({"draws": 0}, "draws: expected > 0, found 0"),
    ({"crop": -1}, "crop: expected >= 0 pixels, found -1"),
    ({"attack_radius": 8.0}, r"attack_radius: expected in \[0, 8.0\), below the radius, found 8.0"),
    ({"attack_steps": 0}, r"attack_step, attack_steps: expected > 0, found \(1.5, 0\)")])
def test_impossible_settings_are_named(refuses, change, message):
    with refuses(f"^RobustMinimisingConfig.{message}"):
        replace(SMALL, **change)


def test_one_image_is_refused(refuses):
    with refuses("^noise images: expected at least two, found 1"):
        poison(a_set().subset(torch.arange(1)), SMALL, ratio=1.0, seed=0)
