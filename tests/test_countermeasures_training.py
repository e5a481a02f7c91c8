"""Countermeasures that work on every training batch, and the operations they are made of."""
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from data.devices import device_generator
from data.resnet import new_resnet
from data.victims import VictimConfig, normalise, train_victim
from defense import image_operations as operations
from defense.adversarial_training import AdversarialTrainingConfig
from defense.adversarial_training import hardened as moved_within
from defense.countermeasures import purify
from defense.jpeg import compressed
from defense.orthogonal_projection import ProjectionConfig, augmented, class_vectors, projected
from defense.plasma import plasma
from defense.trivial_augment import OPERATIONS, rotated, trivially_augmented
from defense.worst_augmentation import (
    WorstAugmentationConfig,
    brightness_clouded,
    contrast_clouded,
    shuffled,
)
from defense.worst_augmentation import augmented as strongly_augmented
from defense.worst_augmentation import hardened as worst_of

SLOPE = math.degrees(math.atan(0.3))
PLAIN = {"mean": (0.0,), "std": (1.0,)}
SETTINGS = {"lfu": {"epochs": 1}, "at": {"steps": 2}, "ueraser": {"choices": 2}}
HARDENING = {"lfu": {}, "at": {}, "ueraser": {}, "ueraser jpeg": {"qualities": (10, 99)}}
hardening = pytest.mark.parametrize("name", HARDENING)


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def noise(count=6, channels=3, height=9, width=7, seed=0):
    return torch.randint(256, (count, channels, height, width), generator=drawn(seed), dtype=torch.uint8)


def victim_config(channels=3, **others):
    plain = {key: value * channels for key, value in PLAIN.items()}
    return VictimConfig(**{"widths": (2, 2, 4, 4), **plain, **others})


def a_net(channels=3):
    """With running statistics that are not the first ones."""
    model = new_resnet(3, (2, 2, 4, 4), channels, seed=0).train()
    model(noise(8, channels).float() / 255)
    return model


def harden_of(name, images):
    short = name.split()[0]
    settings = {**SETTINGS[short], **HARDENING[name]}
    return purify(short, images, torch.arange(len(images)) % 3, settings, generator=drawn(0)).harden


def test_who_hardens_and_who_changes_images():
    images, labels = noise(), torch.arange(6) % 3
    for name in ("jpeg", "gray", "bdr"):
        assert purify(name, images, labels, {}, generator=drawn(0)).harden is None
    for name in ("at", "ueraser"):
        found = purify(name, images, labels, {}, generator=drawn(0))
        assert found.images is images and found.harden


@hardening
@pytest.mark.parametrize(("count", "channels", "height", "width"), [(6, 3, 9, 7), (5, 1, 8, 8), (1, 3, 11, 16)])
@pytest.mark.parametrize("floats", [False, True])
def test_hardened_batches_are_float_grey_levels_and_all_else_stays(name, count, channels, height, width, floats):
    images = noise(count, channels, height, width)
    harden, labels = harden_of(name, images), torch.arange(count) % 3
    images = images * 0.5 + 10 if floats else images
    model, kept, global_state = a_net(channels), images.clone(), torch.get_rng_state()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = harden(model, images, labels, victim_config(channels), generator=drawn(1))
    assert found.shape == images.shape and found.dtype == torch.float32 and not found.requires_grad
    assert found.min() >= 0 and found.max() <= 255 and not torch.equal(found, images.float())
    assert torch.equal(images, kept) and torch.equal(torch.get_rng_state(), global_state)
    assert model.training and all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@hardening
def test_equal_generators_give_equal_batches(name):
    images = noise(12)
    harden, model, labels = harden_of(name, images), a_net(), torch.arange(12) % 3
    a, b, c = (harden(model, images, labels, victim_config(), generator=drawn(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@hardening
def test_a_victim_trains_on_what_is_returned(name):
    images, labels = noise(16), torch.arange(16) % 2
    short = name.split()[0]
    found = purify(short, images, labels, {**SETTINGS[short], **HARDENING[name]}, generator=drawn(0))
    config = victim_config(epochs=1, batch=8, crop=1, flip=True)
    victim, plain = (train_victim(found.images, labels, 2, config, seed=0, network=new_resnet, harden=harden)
                     for harden in (found.harden, None))
    assert not victim.training
    assert any(not torch.equal(a, b) for a, b in zip(victim.parameters(), plain.parameters(), strict=True))


# Adversarial training

def slowly_moved(model, image, label, start, attack, config):
    moved = start
    for _ in range(attack.steps):
        moved = moved.clone().requires_grad_(True)
        cross_entropy(model(normalise(moved[None], config)), label[None]).backward()
        moved = moved.detach() + attack.step * moved.grad.sign()
        moved = (image + (moved - image).clamp(-attack.radius, attack.radius)).clamp(0, 255)
    return moved


def test_adversarial_batches_are_those_of_a_slow_ascent():
    images, labels, config = noise(5), torch.arange(5) % 3, victim_config()
    attack = AdversarialTrainingConfig(radius=5.0, step=1.5, steps=4, spread=20.0)
    found = moved_within(a_net(), images, labels, config, generator=drawn(3), attack=attack)
    starts = images + 20 * torch.randn(images.shape, generator=drawn(3))  # may leave the cube: the first step ends that
    expected = torch.stack([slowly_moved(a_net().eval(), *each, attack, config)
                            for each in zip(images.float(), labels, starts, strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert (found - images).abs().max() <= 5 and (found - images).abs().max() > 4.9


def test_more_steps_raise_the_loss():
    images, labels, config = noise(32), torch.arange(32) % 3, victim_config()
    losses = []
    for steps in (1, 10):
        attack = AdversarialTrainingConfig(steps=steps, spread=0.0)
        found = moved_within(a_net(), images, labels, config, generator=drawn(0), attack=attack)
        losses.append(cross_entropy(a_net().eval()(normalise(found, config)), labels).item())
    plain = cross_entropy(a_net().eval()(normalise(images, config)), labels).item()
    assert plain < losses[0] < losses[1]


# Orthogonal projection

def slow_class_vectors(images, labels, classes, config, seed):
    """torch's linear layer, optimiser and schedule."""
    generator, size = drawn(seed), images[0].numel()
    layer = nn.utils.skip_init(nn.Linear, size, classes, bias=False)
    layer.weight.data = (2 * torch.rand(classes, size, generator=generator) - 1) / math.sqrt(size)
    optimiser = torch.optim.SGD(layer.parameters(), lr=config.rate)
    drops = [int(0.5 * config.epochs), int(0.75 * config.epochs)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, drops)
    for _ in range(config.epochs):
        order = torch.randperm(len(images), generator=generator)
        for index in order.tensor_split(math.ceil(len(images) / config.batch)):
            loss = cross_entropy(layer(images[index].flatten(1) / 255), labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    return layer.weight.detach(), loss.item()


@pytest.mark.parametrize("classes", [1, 4])
def test_class_vectors_are_those_of_torchs_own_training(classes):
    images, labels, config = noise(30), torch.arange(30) % classes, ProjectionConfig(epochs=8, batch=8)
    found, losses = class_vectors(images, labels, classes, config, generator=drawn(5))
    expected, last = slow_class_vectors(images, labels, classes, config, 5)
    torch.testing.assert_close(found, expected)
    assert len(losses) == 8 and (classes == 1 or losses[-1] < losses[0]) and math.isfinite(last)


@pytest.mark.parametrize("epochs, rates", [(1, [1]), (2, [1, 0.01]), (3, [1, 0.1, 0.01]), (4, [1, 1, 0.1, 0.01])])
def test_the_first_epoch_of_the_class_vectors_has_the_whole_rate(epochs, rates):
    images, labels = noise(8), torch.arange(8) % 2
    found, _ = class_vectors(images, labels, 2, ProjectionConfig(epochs=epochs), generator=drawn(0))
    size = images[0].numel()
    weights = (2 * torch.rand(2, size, generator=drawn(0)) - 1) / math.sqrt(size)
    for rate in rates:
        weights.requires_grad_(True)
        (slope,) = torch.autograd.grad(cross_entropy(images.flatten(1) / 255 @ weights.T, labels), weights)
        weights = weights.detach() - 0.1 * rate * slope
    torch.testing.assert_close(found, weights)


def slowly_projected(images, vectors):
    """Gram-Schmidt, then one dot product after the other."""
    basis = []
    for vector in vectors.double().numpy():
        for known in basis:
            vector = vector - (vector @ known) * known
        basis.append(vector / np.linalg.norm(vector))
    found = []
    for image in images.double().flatten(1).numpy():
        for known in basis:
            image = image - (image @ known) * known
        found.append(image)
    return torch.tensor(np.array(found)).view(images.shape)


def test_projected_images_are_those_of_a_slow_projection():
    images, vectors = noise(5), torch.randn(4, 3 * 9 * 7, generator=drawn(1))
    found = projected(images, vectors)
    torch.testing.assert_close(found.double(), slowly_projected(images, vectors), rtol=0, atol=1e-3)
    shares = found.flatten(1) @ vectors.T / vectors.norm(dim=1)
    torch.testing.assert_close(shares, torch.zeros(5, 4), rtol=0, atol=1e-2)
    torch.testing.assert_close(projected(images, 7 * vectors.flip(0)), found, rtol=0, atol=1e-2)  # only the span counts


def test_projection_takes_away_a_linear_shortcut():
    generator, labels = drawn(0), torch.arange(400) % 2
    pattern = 12 * torch.randn(3, 8, 8, generator=generator).sign()
    images = 128 + 20 * torch.randn(400, 3, 8, 8, generator=generator) + pattern * (2 * labels - 1)[:, None, None, None]
    images = images.round().clamp(0, 255).to(torch.uint8)
    found = purify("lfu", images, labels, {"epochs": 40, "batch": 50}, generator=drawn(0))
    before, after = (((x[labels == 1].float().mean(0) - x[labels == 0].float().mean(0)) * pattern).sum().abs()
                     for x in (images, found.images))
    assert after < 0.1 * before
    assert found.images.dtype == torch.float32 and len(found.losses["linear"]) == 40


def test_clip_cuts_and_without_augmentation_training_is_plain():
    images, labels = noise(20) // 128 * 255, torch.arange(20) % 3
    plain, cut = (purify("lfu", images, labels, {"clip": clip, "augment": False}, generator=drawn(0))
                  for clip in (False, True))
    assert plain.images.min() < 0 and plain.images.max() > 255 and plain.harden is None
    assert torch.equal(cut.images, plain.images.clamp(0, 255))


def test_as_many_classes_as_values_are_refused(refuses):
    with refuses("images: expected more than 4 values, one a class, found 4"):
        purify("lfu", noise(4, 1, 2, 2), torch.arange(4), {}, generator=drawn(0))


def slowly_augmented(image, angle, slant, size):
    """The pixel at each place of the turned, then sheared, then resized image; nearest; black outside."""
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    forward = size * np.array([[1, math.tan(slant)], [0, 1]]) @ turn
    return slowly_warped(image, np.c_[np.linalg.inv(forward), np.zeros(2)], nearest=True)


def slowly_warped(image, sources, nearest=False):
    """(C, H, W): pixel by pixel, in double precision."""
    height, width = image.shape[1:]
    found = np.zeros(image.shape)
    for row in range(height):
        for column in range(width):
            x, y = sources @ np.array([column - (width - 1) / 2, row - (height - 1) / 2, 1])
            x, y = x + (width - 1) / 2, y + (height - 1) / 2
            for r in (math.floor(y), math.floor(y) + 1):
                for c in (math.floor(x), math.floor(x) + 1):
                    share = max(0, 1 - abs(y - r)) * max(0, 1 - abs(x - c))
                    if nearest:
                        share = float(r == round(y) and c == round(x))
                    if 0 <= r < height and 0 <= c < width:
                        found[:, row, column] += share * image[:, r, c].numpy()
    return torch.tensor(found)


def test_the_projections_augmentation_turns_then_shears_then_resizes():
    images, config = noise(4, 3, 9, 12).float(), ProjectionConfig(rotation=40.0, shear=30.0, scale=0.5, jitter=0.0)
    found = augmented(None, images, None, None, generator=drawn(2), augmentation=config)
    generator = drawn(2)
    angles, slants, sizes = (2 * torch.rand(4, generator=generator).double() - 1 for _ in range(3))
    for image, shown, angle, slant, size in zip(images, found, angles.tolist(), slants.tolist(), sizes.tolist(),
                                                      strict=True):
        expected = slowly_augmented(image, math.radians(40) * angle, math.radians(30) * slant, 1 + 0.5 * size)
        assert (shown == expected).double().mean() > 0.99  # float32 may round a tie to the other side


def test_the_projections_augmentation_recolours_in_a_drawn_order():
    images, config = noise(6), ProjectionConfig(rotation=0.0, shear=0.0, scale=0.0, jitter=0.9)
    found = augmented(None, images, None, None, generator=drawn(4), augmentation=config)
    generator, expected = drawn(4), images.float() / 255
    torch.rand(18, generator=generator)
    for place in torch.randperm(3, generator=generator).tolist():
        factors = 1 + 0.9 * (2 * torch.rand(6, generator=generator) - 1)
        change = (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation)[place]
        expected = torch.stack([change(x, f.item()) for x, f in zip(expected, factors, strict=True)])
    torch.testing.assert_close(found, 255 * expected, rtol=0, atol=0.1)  # torchvision's luma has fewer digits


# Image operations, each against torchvision's, image by image

STRENGTHS = {  # strength, tolerance in grey levels, torchvision's way with one (C, H, W) image in [0, 1] or uint8
    "brightened": ((0.0, 2.0), 1e-3, vision.adjust_brightness),
    "contrasted": ((0.0, 2.0), 0.1, vision.adjust_contrast),
    "saturated": ((0.0, 2.0), 0.1, vision.adjust_saturation),
    "sharpened": ((0.0, 2.0), 1e-3, vision.adjust_sharpness),
    "solarized": ((0.0, 1.0), 1e-3, vision.solarize),
}


@pytest.mark.parametrize("name", STRENGTHS)
@pytest.mark.parametrize("channels", [1, 3])
def test_operations_with_a_strength_are_torchvisions(name, channels):
    (low, high), tolerance, slow = STRENGTHS[name]
    images, strength = noise(7, channels).float(), torch.linspace(low, high, 7)
    kept = images.clone()
    found = getattr(operations, name)(images, strength * (255 if name == "solarized" else 1))
    expected = torch.stack([255 * slow(x / 255, s) for x, s in zip(images, strength.tolist(), strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert torch.equal(images, kept)


def test_posterized_is_torchvisions():
    images, bits = noise(9), torch.arange(9)
    found = operations.posterized(images.float(), bits)
    expected = torch.stack([vision.posterize(x, b) for x, b in zip(images, bits.tolist(), strict=True)])
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize("size", [(4, 4), (16, 16), (32, 32), (40, 25)])  # 16: too few pixels to change a level
@pytest.mark.parametrize("kind", ["noise", "dark", "two levels", "constant"])
def test_equalized_and_stretched_are_torchvisions(size, kind):
    images = noise(3, 3, *size)
    images = {"noise": images, "dark": images // 9 + 20, "two levels": images // 128 * 60 + 90,
              "constant": torch.full_like(images, 77)}[kind]
    assert torch.equal(operations.equalized(images.float()), vision.equalize(images).float())
    expected = 255 * vision.autocontrast(images.float() / 255)
    torch.testing.assert_close(operations.stretched(images.float()), expected, rtol=0, atol=1e-3)


def test_tiny_images_are_not_sharpened():
    images = noise(2, 3, 2, 5).float()
    assert torch.equal(operations.sharpened(images, torch.tensor([0.0, 2.0])), images)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_warped_images_are_those_of_a_slow_loop(mode):
    images = noise(4, 2, 6, 9).float()
    sources = torch.randn(4, 2, 3, generator=drawn(1)) * torch.tensor([0.5, 0.5, 2.0]) + torch.eye(2, 3)
    found = operations.warped(images, sources, mode=mode)
    for image, shown, source in zip(images, found, sources, strict=True):
        expected = slowly_warped(image, source.double().numpy(), nearest=mode == "nearest")
        torch.testing.assert_close(shown.double(), expected, rtol=0, atol=0.01)


def test_rotation_is_torchvisions():
    images, degrees = noise(5, 3, 9, 12).float(), torch.tensor([-30.0, -7.5, 0.0, 13.0, 90.0])
    expected = [vision.rotate(x, -d, InterpolationMode.BILINEAR)
                for x, d in zip(images, degrees.tolist(), strict=True)]
    torch.testing.assert_close(rotated(images, degrees), torch.stack(expected), rtol=0, atol=0.01)


@pytest.mark.parametrize(("number", "translate", "shear", "strength"), [
    (8, (0, 0), (-SLOPE, 0), 0.3),
    (9, (0, 0), (0, -SLOPE), 0.3),
    (10, (4, 0), (0, 0), 1 / 3), (11, (0, -3), (0, 0), -1 / 3),
])
def test_the_other_warps_are_torchvisions(number, translate, shear, strength):
    images = noise(1, 3, 9, 12).float()
    found = OPERATIONS[number][0](images, torch.tensor([strength]))
    expected = vision.affine(images, 0.0, list(translate), 1.0, list(shear), InterpolationMode.BILINEAR)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


def test_every_image_has_its_own_operation_within_its_range():
    images = noise(200, 3, 8, 8).float()
    found = trivially_augmented(images, generator=drawn(6))
    generator = drawn(6)
    which, place = torch.randint(12, (200,), generator=generator), torch.rand(200, generator=generator)
    assert which.unique().tolist() == list(range(len(OPERATIONS)))
    for i, (operation, low, high) in ((i, OPERATIONS[which[i]]) for i in range(200)):
        expected = operation(images[i:i + 1], low + (high - low) * place[i:i + 1])[0]
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-3)


def test_posterizing_leaves_one_to_four_bits():
    operation, low, high = OPERATIONS[3]
    images = torch.arange(256.0).view(1, 1, 16, 16).expand(100, -1, -1, -1)
    found = operation(images, torch.linspace(low, high - 1e-6, 100))
    assert {len(image.unique()) for image in found} == {2, 4, 8, 16}


# Plasma

def slow_plasma(count, channels, height, width, roughness, generator):
    """Diamond-square, point by point, for one (B, C) after the other."""
    corners = torch.rand(count, channels, 2, 2, generator=generator)
    levels, side = [], 2
    while side < max(height, width) or not levels:
        levels.append([torch.rand(count, channels, rows, columns, generator=generator) for rows, columns in
                       ((side - 1, side - 1), (side, side - 1), (side - 1, side))])
        side = 2 * side - 1
    found = torch.zeros(count, channels, height, width)
    for b in range(count):
        for c in range(channels):
            grid = corners[b, c].double()
            for depth, (centres, rows, columns) in enumerate(levels):
                share = roughness[b].item() ** depth if depth else 0.0
                grid = slow_refinement(grid, share, centres[b, c], rows[b, c], columns[b, c])
                if depth == 0:
                    grid[::2, ::2] /= 3
                    grid[1, 1] /= 3
            found[b, c] = grid[:height, :width]
    return found


def slow_refinement(grid, share, centres, rows, columns):
    side = 2 * len(grid) - 1
    found = torch.zeros(side, side, dtype=torch.float64)
    for r in range(0, side, 2):
        for c in range(0, side, 2):
            found[r, c] = grid[r // 2, c // 2]
    for r in range(1, side, 2):
        for c in range(1, side, 2):
            mean = (found[r - 1, c - 1] + found[r - 1, c + 1] + found[r + 1, c - 1] + found[r + 1, c + 1]) / 4
            found[r, c] = (1 - share) * mean + share * centres[r // 2, c // 2]
    for r in range(side):
        for c in range((r + 1) % 2, side, 2):
            near = [found[y, x] for y, x in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
                    if 0 <= y < side and 0 <= x < side]
            new = (columns if r % 2 else rows)[r // 2, c // 2]
            found[r, c] = (1 - share) * sum(near) / len(near) + share * new
    return found


@pytest.mark.parametrize(("height", "width"), [(9, 9), (8, 5), (3, 3), (1, 1), (4, 17)])
def test_plasma_is_that_of_a_slow_loop(height, width):
    roughness = torch.tensor([0.3, 0.7])
    found = plasma((2, 3, height, width), roughness, generator=drawn(1))
    torch.testing.assert_close(found, slow_plasma(2, 3, height, width, roughness, drawn(1)))


def test_rougher_plasma_is_rougher_and_all_of_it_lies_in_its_range():
    found = plasma((3, 40, 32, 32), torch.tensor([0.0, 0.5, 1.0]), generator=drawn(0))
    steps = (found[..., 1:] - found[..., :-1]).abs().mean((1, 2, 3)).tolist()
    assert found.min() >= 0 and found.max() <= 1
    assert steps[0] < 0.5 * steps[1] and steps[1] < 0.5 * steps[2]
    assert abs(plasma((400, 1, 32, 32), torch.full((400,), 0.5), generator=drawn(0)).mean() - 0.44) < 0.01


# UEraser

def test_the_hardest_of_the_augmentations_is_chosen():
    images, labels, config = noise(6), torch.arange(6) % 3, victim_config()
    found = worst_of(a_net(), images, labels, config, generator=drawn(2), augmentation=WorstAugmentationConfig())
    tried = strongly_augmented(images.repeat(5, 1, 1, 1), WorstAugmentationConfig(), generator=drawn(2))
    model = a_net().eval()
    for i in range(6):
        each = [tried[6 * k + i] for k in range(5)]
        losses = [cross_entropy(model(normalise(x[None], config)), labels[i:i + 1]).item() for x in each]
        assert torch.equal(found[i], each[int(np.argmax(losses))])


def test_one_choice_needs_no_network():
    images, config = noise(6), WorstAugmentationConfig(choices=1)
    found = worst_of(None, images, None, None, generator=drawn(2), augmentation=config)
    assert torch.equal(found, strongly_augmented(images, config, generator=drawn(2)))


def test_augmentation_without_any_share_is_a_trivial_one():
    images, config = noise(30), WorstAugmentationConfig(clouded=0.0, shuffled=0.0)
    found, generator = strongly_augmented(images, config, generator=drawn(3)), drawn(3)
    torch.rand(90, generator=generator)  # who is changed: nobody
    assert torch.equal(found, trivially_augmented(images.float(), generator=generator))


def test_jpeg_comes_first_with_a_quality_of_each_images_own():
    images = noise(40, 3, 16, 16)
    config = WorstAugmentationConfig(clouded=0.0, shuffled=0.0, qualities=(10, 90))
    found, generator = strongly_augmented(images, config, generator=drawn(3)), drawn(3)
    qualities = torch.randint(10, 91, (40,), generator=generator)
    torch.rand(120, generator=generator)
    assert len(qualities.unique()) > 20
    assert torch.equal(found, trivially_augmented(compressed(images, qualities).float(), generator=generator))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_of_changed_images(share, monkeypatch):
    monkeypatch.setattr("defense.worst_augmentation.trivially_augmented", lambda x, generator: x)
    images = noise(400)
    # brightness or contrast; of three channels a sixth of the orders is the old one
    for clouded, mixed, expected in ((share, 0.0, 1 - (1 - share) ** 2), (0.0, share, share * 5 / 6)):
        config = WorstAugmentationConfig(clouded=clouded, shuffled=mixed)
        found = strongly_augmented(images, config, generator=drawn(1))
        assert abs((found != images).flatten(1).any(1).double().mean() - expected) < 0.06


def test_clouds_change_brightness_and_contrast_as_their_formulas_say():
    images, config = noise(5, 3, 8, 8).float(), WorstAugmentationConfig()
    for change in (brightness_clouded, contrast_clouded):
        found, generator = change(images, config, generator=drawn(7)), drawn(7)
        roughness = 0.3 + 0.4 * torch.rand(5, generator=generator)
        clouds = slow_plasma(5, 3, 8, 8, roughness, device_generator(images.device, generator=generator))
        if change is brightness_clouded:
            intensity = 0.5 + 0.5 * torch.rand(5, generator=generator)
            expected = images / 255 + intensity[:, None, None, None] * (2 * clouds - 1)
        else:
            expected = (images / 255 - 0.5) * (4 * clouds) + 0.5
        torch.testing.assert_close(found, 255 * expected.clamp(0, 1), rtol=0, atol=0.01)


def test_shuffled_channels_are_the_same_channels():
    images = noise(60).float()
    found = shuffled(images, generator=drawn(0))
    orders = {tuple(int((image == channel).flatten(1).all(1).nonzero()[0]) for channel in shown)
              for image, shown in zip(images, found, strict=True)}
    assert len(orders) == 6 and torch.equal(found.sort(1).values, images.sort(1).values)


@pytest.mark.parametrize(("wrong", "message"), [
    (partial(AdversarialTrainingConfig, radius=0.0), r"Config radius, step: expected > 0 grey levels, found \(0.0, 2"),
    (partial(AdversarialTrainingConfig, steps=0), "AdversarialTrainingConfig.steps: expected > 0, found 0"),
    (partial(AdversarialTrainingConfig, spread=-1.0), "Config.spread: expected >= 0 grey levels, found -1.0"),
    (partial(ProjectionConfig, epochs=0), r"ProjectionConfig epochs, rate, batch: expected > 0, found \(0, 0.1, 1024"),
    (partial(ProjectionConfig, shear=90.0), r"rotation, shear: expected in \[0, 180\] and \[0, 90\) degrees, found"),
    (partial(ProjectionConfig, scale=1.0), r"Config scale, jitter: expected in \[0, 1\) and \[0, 1\], found \(1"),
    (partial(WorstAugmentationConfig, choices=0), "WorstAugmentationConfig.choices: expected > 0, found 0"),
    (partial(WorstAugmentationConfig, clouded=1.5), r"clouded, shuffled: expected in \[0, 1\], found \(1.5, 0.5\)"),
    (partial(WorstAugmentationConfig, roughness=(0.7, 0.3)), r"roughness: expected lowest and highest, in \[0, 1\]"),
    (partial(WorstAugmentationConfig, intensity=(0.5, 2)), r"intensity: expected lowest and highest, in \[0, 1\]"),
    (partial(WorstAugmentationConfig, qualities=(0, 99)), r"qualities: expected lowest and highest, in \[1, 100\]"),
    (partial(WorstAugmentationConfig, qualities=(10.0, 99)), r"qualities: expected whole numbers, found \(10.0, 99\)"),
    (lambda: purify("ueraser", noise(channels=2), torch.zeros(6).long(), {"qualities": [10, 99]}, generator=drawn(0)),
     "images: expected 1 or 3 channels, found 2"),
])
def test_a_wrong_config_is_named(wrong, message, refuses):
    with refuses(message):
        wrong()
