from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from data.image_sets import ImageSet
from data.preact_resnet import new_model
from data.trojannn import (
    TrojanNNConfig,
    apple_mask,
    apply_trigger,
    budgeted,
    optimise_pattern,
    poison,
    strongest_inputs,
)
from data.victims import VictimConfig, attack_success, train_victim

TINY = TrojanNNConfig(probe_width=2, probe_epochs=1, probe_batch=16, probe_rate=0.05, probe_crop=1, steps=4)


def a_set(count=40, channels=3, size=16, classes=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % classes, classes, "noise")


def poisoned(clean, config=TINY, **draw):
    return poison(clean, config, **({"ratio": 0.2, "target": 3, "seed": 1} | draw))


def probe_of(channels=3):
    return new_model(4, (2, 4, 8, 16), channels, seed=3).double().eval()


def cost_of(probe, pattern, config):
    """The objective, worked out anew: features caught in front of the last layer."""
    caught = []
    handle = probe.linear.register_forward_pre_hook(lambda _, args: caught.append(args[0][0]))
    with torch.no_grad():
        probe(pattern[None])
    handle.remove()
    return sum((caught[0][k].item() - config.aim) ** 2 for k in chosen_by_hand(probe.linear, config.neurons))


def chosen_by_hand(linear, count):
    weight = linear.weight.tolist()
    sums = [sum(abs(row[j]) for row in weight) for j in range(linear.in_features)]
    return sorted(range(len(sums)), key=lambda j: -sums[j])[:count]


def test_the_apple_lies_where_the_published_one_does():
    mask = apple_mask(32, 32)
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    assert abs(int(mask.sum()) - 117) <= 5
    assert (int(rows[0]), int(rows[-1])) == (16, 29) and (int(columns[0]), int(columns[-1])) == (17, 28)


@pytest.mark.parametrize("height, width", [(16, 16), (64, 64), (32, 64)])
def test_the_apple_grows_with_the_image(height, width):
    share = apple_mask(height, width).double().mean()
    assert abs(share - apple_mask(32, 32).double().mean()) < 0.01


def test_the_strongest_inputs_by_hand():
    linear = probe_of().linear
    assert strongest_inputs(linear, 3).tolist() == chosen_by_hand(linear, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_step_follows_the_sign_of_the_slope(channels):
    probe, mask = probe_of(channels), apple_mask(8, 8)
    config = replace(TINY, steps=1, step=0.02)
    start = (0.5 * mask).expand(channels, 8, 8).double()
    found = optimise_pattern(probe.float(), mask, channels, config).double() / 255
    probe.double()
    for c, row, column in mask.expand(channels, 8, 8).nonzero().tolist():
        up, down = start.clone(), start.clone()
        up[c, row, column] += 1e-4
        down[c, row, column] -= 1e-4
        slope = cost_of(probe, up, config) - cost_of(probe, down, config)
        expected = 0.5 - 0.02 * (slope > 0) + 0.02 * (slope < 0)
        assert abs(found[c, row, column].item() - expected) < 0.5 / 255 + 1e-6


def test_the_patch_stays_near_its_start_and_costs_less():
    probe, mask = probe_of().float(), apple_mask(16, 16)
    config = replace(TINY, steps=8, radius=0.2, step=0.15)
    found = optimise_pattern(probe, mask, 3, config)
    assert found.dtype == torch.uint8 and not found[:, ~mask].any()
    assert found[:, mask].min() >= round(255 * 0.3) and found[:, mask].max() <= round(255 * 0.7)
    start = (0.5 * mask).expand(3, 16, 16)
    assert cost_of(probe, found.float() / 255, config) < cost_of(probe, start.float(), config)


def test_more_steps_never_cost_more():
    probe, mask = probe_of().float(), apple_mask(16, 16)
    configs = [replace(TINY, steps=steps, aim=0.1, step=0.3) for steps in (1, 2, 4, 8)]
    costs = [cost_of(probe, optimise_pattern(probe, mask, 3, config).float() / 255, config) for config in configs]
    assert all(later <= earlier + 1e-3 for earlier, later in pairwise(costs))
    assert costs[-1] < costs[0]


def test_it_stops_where_the_cost_is_low_enough():
    mask = apple_mask(16, 16)
    found = optimise_pattern(probe_of().float(), mask, 3, replace(TINY, tolerance=1e9))
    assert torch.equal(found, (128 * mask).expand(3, 16, 16).to(torch.uint8))


def test_a_probe_that_blew_up_is_refused(refuses):
    with refuses(r"(weights|features) of the probe: expected finite: a lower (probe_)?rate trains more surely"):
        poisoned(a_set(), replace(TINY, probe_rate=1e6))
    probe = probe_of().float()
    for parameter in probe.parameters():
        parameter.data *= 1e30  # each a number, but not what they make of an image
    with refuses("features of the probe: expected finite: a lower probe_rate trains more surely, found inf"):
        optimise_pattern(probe, apple_mask(16, 16), 3, TINY)
    probe.linear.bias.data.fill_(float("nan"))
    with pytest.MonkeyPatch.context() as patch, refuses("weights of the probe: expected finite"):
        patch.setattr("data.trojannn.train_victim", lambda *_, **__: probe)
        poisoned(a_set())


def test_the_trigger_adds_the_pattern_and_saturates():
    images = torch.tensor([[[[0, 100], [200, 255]]]], dtype=torch.uint8)
    pattern = torch.tensor([[[0, 55], [100, 1]]], dtype=torch.uint8)
    assert apply_trigger(images, pattern).flatten().tolist() == [0, 155, 255, 255]


@pytest.mark.parametrize("channels, size", [(1, 16), (3, 12)])
def test_only_the_apple_of_the_drawn_images_changes(channels, size):
    clean = a_set(channels=channels, size=size)
    kept = clean.images.clone(), clean.labels.clone()
    found = poisoned(clean)
    assert torch.equal(clean.images, kept[0]) and torch.equal(clean.labels, kept[1])
    drawn = torch.zeros(40, dtype=torch.bool)
    drawn[found.poisoned] = True
    mask = apple_mask(size, size)
    assert int(drawn.sum()) == 8 and (found.labels[drawn] == 3).all()
    assert torch.equal(found.labels[~drawn], clean.labels[~drawn])
    assert torch.equal(found.images[~drawn], clean.images[~drawn])
    assert torch.equal(found.images[..., ~mask], clean.images[..., ~mask])
    assert (found.images[drawn] >= clean.images[drawn]).all()
    assert (found.images[drawn] != clean.images[drawn]).flatten(1).any(1).all()


def test_training_and_test_time_use_one_trigger_whatever_the_batch():
    clean = a_set()
    found = poisoned(clean)
    triggered = found.trigger(clean.images)
    assert torch.equal(triggered[found.poisoned], found.images[found.poisoned])
    assert torch.equal(torch.cat([found.trigger(one) for one in clean.images.split(1)]), triggered)
    assert (found.attack, found.target, found.seed) == ("trojannn", 3, 1)
    assert found.parameters["probe_width"] == 2 and found.parameters["steps"] == 4


def test_equal_seeds_give_equal_sets():
    before = torch.get_rng_state()
    a, b, c = (poisoned(a_set(), seed=seed) for seed in (4, 4, 5))
    assert torch.equal(a.images, b.images) and torch.equal(a.poisoned, b.poisoned)
    black = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert not torch.equal(a.poisoned, c.poisoned) and not torch.equal(a.trigger(black), c.trigger(black))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("target", [0, 2])
def test_any_class_can_be_the_target(target):
    found = poisoned(a_set(), target=target)
    assert found.labels[found.poisoned].unique().tolist() == [target]


def test_a_network_learns_the_trigger():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(40, 80, (96, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.arange(96) % 2
    images[labels == 0, :, :8, :] += 60
    images[labels == 1, :, :8, :8] += 60
    clean = ImageSet(images, labels, 2, "halves")
    bad = poison(clean, TINY, ratio=0.3, target=1, seed=0)
    config = VictimConfig(widths=(4, 4, 8, 8), epochs=8, batch=16, rate=0.1, crop=0)
    victim = train_victim(bad.images, bad.labels, 2, config, seed=0)
    assert attack_success(victim, clean, config, bad.trigger, 1) > 0.9
    untouched = train_victim(images, labels, 2, config, seed=0)
    assert attack_success(untouched, clean, config, bad.trigger, 1) < 0.5


def test_the_probe_is_trained_on_as_many_images_as_asked(monkeypatch):
    seen = []

    def training(images, labels, *rest, **options):
        seen.append((images, labels))
        return train_victim(images, labels, *rest, **options)

    monkeypatch.setattr("data.trojannn.train_victim", training)
    clean = a_set()
    poisoned(clean)
    poisoned(clean, replace(TINY, probe_images=20))
    assert [len(images) for images, _ in seen] == [40, 20]
    for image, label in zip(*seen[1], strict=True):
        assert (clean.labels[(clean.images == image).flatten(1).all(1)] == label).all()


def test_the_budgeted_probe_is_narrow():
    assert budgeted().probe(1) == VictimConfig(widths=(8, 16, 32, 64), epochs=3, rate=0.05, mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize("wrong, message", [
    ({"probe_width": 0}, r"TrojanNNConfig\.probe_width: expected > 0 channels, found 0"),
    ({"probe_epochs": 0}, r"VictimConfig epochs, batch: expected > 0, > 1, found \(0, 128\)"),
    ({"probe_width": 2, "neurons": 17},
     r"TrojanNNConfig\.neurons: expected in \[1, 16\], the pooled features of the probe, found 17"),
    ({"probe_images": -1}, r"TrojanNNConfig\.probe_images: expected >= 0, found -1"),
    ({"level": 1.1}, r"TrojanNNConfig\.level: expected in \[0, 1\], found 1\.1"),
    ({"radius": 0}, r"TrojanNNConfig\.radius: expected in \(0, 1\], found 0"),
    ({"step": 0}, r"TrojanNNConfig step, steps: expected > 0, found \(0, 1000\)"),
    ({"tolerance": -1}, r"TrojanNNConfig\.tolerance: expected >= 0, found -1"),
])
def test_wrong_configs_are_named(refuses, wrong, message):
    with refuses(message):
        TrojanNNConfig(**wrong)


def test_images_the_trigger_does_not_fit_are_named(refuses):
    pattern = torch.zeros(3, 8, 8, dtype=torch.uint8)
    with refuses(r"images: expected \(N, C, H, W\) uint8, found \(1, 3, 8, 8\) torch.float32"):
        apply_trigger(torch.zeros(1, 3, 8, 8), pattern)
    with refuses(r"images: expected of shape \(3, 8, 8\) as the pattern, found \(1, 8, 8\)"):
        apply_trigger(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), pattern)
    with refuses(r"images: expected large enough for the apple to cover a pixel, found \(1, 1\)"):
        apple_mask(1, 1)
