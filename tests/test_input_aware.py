from copy import deepcopy
from itertools import pairwise
from math import sqrt, tanh

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from data import input_aware
from data.image_sets import ImageSet
from data.input_aware import InputAwareConfig

TINY = {"width": 2, "surrogate_width": 2, "mask_steps": 2, "steps": 2, "batch": 8, "share": 0.25, "crop": 1}
CONFIG = InputAwareConfig(**TINY)


def a_set(count=50, channels=3, height=16, width=16, classes=5):
    """Four large patches of colour an image: unlike noise, tiny networks see that they differ."""
    patches = torch.rand(count, channels, 2, 2, generator=torch.Generator().manual_seed(0))
    images = (255 * interpolate(patches, (height, width), mode="bilinear")).to(torch.uint8)
    return ImageSet(images, torch.arange(count) % classes, classes, "patches")


def poisoned(clean, config=CONFIG, **draw):
    return input_aware.poison(clean, config, **({"ratio": 0.2, "target": 3, "seed": 1} | draw))


def settled(channels=3, *, seed=0):
    """Untrained networks whose norms have seen images once: their outputs spread, as trained ones' do."""
    networks = input_aware.new_networks(channels, 2, seed=seed)
    for network in (networks.pattern, networks.mask):
        norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        network(normalised(a_set(channels=channels).images))
        network.eval().requires_grad_(False)
    return networks


@pytest.fixture(scope="module")
def networks():
    return settled()


@pytest.fixture
def untrained(networks, monkeypatch):
    """The set is made with settled networks instead of trained ones."""
    monkeypatch.setattr(input_aware, "train_networks", lambda clean, config, *, target, seed: networks)


def normalised(images):
    return images.float() / 255 * 2 - 1


def test_only_poisoned_and_decoys_change_and_only_the_poisoned_get_the_target(untrained):
    clean = a_set()
    found = poisoned(clean)
    assert (len(found.poisoned), len(found.decoys)) == (10, 10)
    assert found.poisoned.tolist() == sorted(found.poisoned.tolist())
    assert found.decoys.tolist() == sorted(found.decoys.tolist())
    changed = (found.images != clean.images).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert changed == sorted(found.poisoned.tolist() + found.decoys.tolist())
    expected = clean.labels.clone()
    expected[found.poisoned] = 3
    assert torch.equal(found.labels, expected)
    assert torch.equal(found.images[found.poisoned], found.trigger(clean.images[found.poisoned]))
    assert (found.attack, found.target, found.seed, found.parameters["width"]) == ("input_aware", 3, 1, 2)


def test_a_decoy_carries_the_trigger_of_another_image(untrained, networks):
    clean = a_set()
    found = poisoned(clean)
    for i in found.decoys.tolist():
        image = clean.images[i:i + 1].expand(50, -1, -1, -1)
        all_sources = input_aware.cross_trigger(image, clean.images, networks)
        sources = [j for j in range(50) if torch.equal(all_sources[j], found.images[i])]
        assert len(sources) == 1 and sources != [i]


def test_the_input_stays_as_it_is_and_the_global_generator_too():
    clean, before = a_set(), torch.get_rng_state()
    kept = clean.images.clone(), clean.labels.clone()
    poisoned(clean)
    assert torch.equal(clean.images, kept[0]) and torch.equal(clean.labels, kept[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_seeds_give_equal_sets_and_triggers():
    clean = a_set()
    first, again, other = poisoned(clean), poisoned(clean), poisoned(clean, seed=2)
    assert torch.equal(again.images, first.images) and torch.equal(again.decoys, first.decoys)
    assert not torch.equal(other.poisoned, first.poisoned)
    assert not torch.equal(other.trigger(clean.images), first.trigger(clean.images))


def test_the_target_decides_the_labels_and_the_networks():
    a, b = (poisoned(a_set(), target=target) for target in (0, 4))
    assert set(a.labels[a.poisoned].tolist()) == {0} and set(b.labels[b.poisoned].tolist()) == {4}
    weights = [next(found.trigger.keywords["networks"].pattern.parameters()) for found in (a, b)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("ratio, cross, counts", [(0.02, 1, (1, 1)), (0.2, 0.5, (10, 5)), (0.2, 0, (10, 0)),
                                                  (0.6, 1, (30, 20)), (1.0, 1, (50, 0))])
def test_the_ratio_is_of_the_whole_set_and_decoys_come_from_the_rest(untrained, ratio, cross, counts):
    found = poisoned(a_set(), InputAwareConfig(**TINY, cross=cross), ratio=ratio)
    assert (len(found.poisoned), len(found.decoys)) == counts
    assert not set(found.poisoned.tolist()) & set(found.decoys.tolist())


@pytest.mark.parametrize("channels, height, width", [(1, 16, 16), (3, 9, 20), (1, 28, 28)])
def test_other_shapes_are_attacked_too(channels, height, width):
    clean = a_set(20, channels, height, width)
    found = poisoned(clean)
    assert found.images.shape == clean.images.shape
    assert (found.images[found.poisoned] != clean.images[found.poisoned]).any()


def test_the_trigger_by_hand(networks):
    images, sources = a_set().images[:2], a_set().images[2:4]
    found = input_aware.cross_trigger(images, sources, networks)
    with torch.no_grad():
        pattern, mask = networks.pattern(normalised(sources)), networks.mask(normalised(sources))
    for n in range(2):
        for row in range(16):
            for column in range(16):
                share = tanh(20 * mask[n, 0, row, column].item() - 10) / 2 + 0.5
                for channel in range(3):
                    old, drawn = images[n, channel, row, column].item(), pattern[n, channel, row, column].item()
                    exact = old + share * (255 * drawn - old)
                    assert abs(found[n, channel, row, column].item() - exact) < 0.501
    assert torch.equal(input_aware.apply_trigger(images, networks), input_aware.cross_trigger(images, images, networks))


def test_an_image_has_one_trigger_whatever_the_batch(networks):
    images = a_set(150).images
    together = input_aware.apply_trigger(images, networks)
    assert torch.equal(together, input_aware.apply_trigger(images, networks))
    assert torch.equal(together, input_aware.apply_trigger(images.flip(0), networks).flip(0))
    for i in (0, 63, 64, 149):
        assert torch.equal(input_aware.apply_trigger(images[i:i + 1], networks)[0], together[i])


def test_the_trained_networks_are_frozen():
    networks = input_aware.train_networks(a_set(), CONFIG, target=3, seed=1)
    for network in (networks.pattern, networks.mask):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_networks_shapes_and_layers():
    networks = input_aware.new_networks(3, 4, seed=0)
    x = normalised(a_set(2, 3, 10, 23).images)
    assert networks.pattern(x).shape == (2, 3, 10, 23) and networks.mask(x).shape == (2, 1, 10, 23)
    for network, outputs in ((networks.pattern, 3), (networks.mask, 1)):
        widths = [layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)]
        assert widths == [4, 4, 8, 8, 16, 16, 16, 16, 8, 8, 4, 4, outputs]
        norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
        assert len(norms) == 13 and {norm.momentum for norm in norms} == {0.05}
        assert sum(isinstance(layer, nn.ReLU) for layer in network.modules()) == 12
    raw = nn.Sequential(*networks.mask.up[-1])(torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert raw.min() < -1 and raw.max() > 1  # signed: so tanh reaches both ends


def test_diversity_by_hand():
    generator = torch.Generator().manual_seed(0)
    a, b, p, q = (torch.randn(3, 2, 4, 5, generator=generator) for _ in range(4))
    ratios = []
    for n in range(3):
        apart = [sqrt(sum((x - y) ** 2 for x, y in zip(u[n].flatten().tolist(), v[n].flatten().tolist(), strict=True))
                      / 40) for u, v in ((a, b), (p, q))]
        ratios.append(apart[0] / (apart[1] + 1e-7))
    assert input_aware.diversity_loss(a, b, p, q).item() == pytest.approx(sum(ratios) / 3, rel=1e-5)


def test_equal_drawings_give_finite_slopes():
    a, b = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    drawn = torch.zeros(1, 1, 8, 8, requires_grad=True)
    input_aware.diversity_loss(a, b, drawn, drawn * 1).backward()
    assert drawn.grad.isfinite().all()


def test_the_joint_loss_by_hand():
    config = InputAwareConfig(share=0.25, diversity=0.5)
    networks, clean = settled(), a_set(16)
    images, others, labels = normalised(clean.images[:8]), normalised(clean.images[8:]), clean.labels[:8]
    seen = []

    def surrogate(x):
        seen.append(x)
        return x.flatten(1)[:, :5]

    loss = input_aware.joint_loss(networks, surrogate, images, labels, others, config, target=4)
    expected, patterns = images.clone(), []
    for i, source in ((0, images[0]), (1, images[1]), (2, others[2]), (3, others[3])):
        drawn = 2 * networks.pattern(source[None])[0] - 1
        mask = torch.tanh(20 * networks.mask(source[None])[0] - 10) / 2 + 0.5
        expected[i] = images[i] * (1 - mask) + drawn * mask
        patterns.append(drawn)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-4)
    wanted = [4, 4, *labels[2:].tolist()]
    entropy = sum(-row[:5].log_softmax(0)[k] for row, k in zip(expected.flatten(1), wanted, strict=True)) / 8
    ratio = sum((images[i] - others[2 + i]).square().mean().sqrt()
                / ((patterns[i] - patterns[2 + i]).square().mean().sqrt() + 1e-7) for i in range(2)) / 2
    assert loss.item() == pytest.approx((entropy + 0.5 * ratio).item(), rel=1e-4)


def test_batches_pair_two_orders_of_the_whole_set():
    clean = ImageSet(torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 1, 8, 8).contiguous(),
                     torch.arange(20), 20, "numbered")
    pairs = input_aware.drawn_pairs(clean, InputAwareConfig(batch=8, crop=0),
                                    generator=torch.Generator().manual_seed(0))
    first, second, third = next(pairs), next(pairs), next(pairs)
    for images, labels, others in (first, second, third):
        assert images.shape == others.shape == (8, 1, 8, 8)
        torch.testing.assert_close(images[:, 0, 0, 0], labels / 255 * 2 - 1)
        assert not torch.equal(images, others)
    assert len(set(first[1].tolist()) | set(second[1].tolist())) == 16  # a pass shows no image twice; 4 are left out
    assert not torch.equal(first[1], third[1])


def test_one_step_of_the_mask_by_hand():
    networks, clean = settled(), a_set(8, height=8, width=8)
    networks.mask.train().requires_grad_(True)
    twin = deepcopy(networks)
    batch = next(input_aware.drawn_pairs(clean, CONFIG, generator=torch.Generator().manual_seed(0)))
    first, second = (torch.tanh(20 * twin.mask(x) - 10) / 2 + 0.5 for x in (batch[0], batch[2]))
    too_much = (first - 0.032).clamp(min=0).mean()
    (100 * too_much + input_aware.diversity_loss(batch[0], batch[2], first, second)).backward()
    input_aware.train_mask(networks, iter([batch]), 1, InputAwareConfig(**TINY | {"rate": 0.1}))
    for old, new in zip(twin.mask.parameters(), networks.mask.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * old.grad / (old.grad.abs() + 1e-8), rtol=1e-4, atol=1e-5)


def test_the_masks_rate_falls_twice():
    networks, clean = input_aware.new_networks(3, 2, seed=0), a_set(8, height=8, width=8)
    pairs = input_aware.drawn_pairs(clean, CONFIG, generator=torch.Generator().manual_seed(0))
    seen = []

    def watched():
        while True:
            seen.append(nn.utils.parameters_to_vector(networks.mask.parameters()).detach().clone())
            yield next(pairs)

    input_aware.train_mask(networks, watched(), 10, CONFIG)
    seen.append(nn.utils.parameters_to_vector(networks.mask.parameters()))
    moves = [(b - a).abs().max().item() for a, b in pairwise(seen)]
    for rate, part in ((1e-2, moves[:4]), (1e-3, moves[4:8]), (1e-4, moves[8:])):
        assert all(rate / 2 < move < 2 * rate for move in part)  # Adam's steps are about as long as its rate


@pytest.mark.parametrize("factor", [0.1, 10])  # of the last layer: with the larger one the gradient is clipped
def test_one_step_of_the_joint_training_by_hand(factor):
    clean, networks = a_set(8, height=8, width=8), settled()
    config = InputAwareConfig(**TINY | {"batch": 8, "surrogate_rate": 0.1})
    networks.pattern.train().requires_grad_(True)
    surrogate = input_aware.new_model(5, (2, 2, 2, 2), 3, seed=0)
    surrogate.linear.weight.data *= factor
    twins = deepcopy(networks), deepcopy(surrogate)
    batch = next(input_aware.drawn_pairs(clean, config, generator=torch.Generator().manual_seed(0)))
    input_aware.joint_loss(twins[0], twins[1], *batch, config, target=1).backward()
    input_aware.train_pattern(networks, surrogate, iter([batch]), 1, config, target=1)
    norm = sqrt(sum(old.grad.square().sum().item() for old in twins[1].parameters()))
    assert (norm > 5) == (factor > 1)
    for old, new in zip(twins[1].parameters(), surrogate.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * (min(1, 5 / norm) * old.grad + 5e-4 * old))
    for old, new in zip(twins[0].pattern.parameters(), networks.pattern.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.01 * old.grad / (old.grad.abs() + 1e-8), rtol=1e-4, atol=1e-5)
    for old, new in zip(twins[0].mask.state_dict().values(), networks.mask.state_dict().values(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("wrong, what", [({"rate": 1e38}, "mask network"), ({"surrogate_rate": 1e38}, "surrogate")])
def test_networks_that_blow_up_are_refused(refuses, wrong, what):
    with refuses(f"weights of the {what}: expected finite: a lower rate .*, found NaN or infinite values"):
        poisoned(a_set(), InputAwareConfig(**TINY | wrong))


def test_patterns_that_are_no_numbers_are_refused(refuses, monkeypatch):
    monkeypatch.setattr(input_aware, "joint_loss", lambda networks, surrogate, images, *rest, target:
                        networks.pattern_of(images).mean() * float("nan"))
    networks = input_aware.new_networks(3, 2, seed=0)
    surrogate = input_aware.new_model(5, (2, 2, 2, 2), 3, seed=0)
    pairs = input_aware.drawn_pairs(a_set(), CONFIG, generator=torch.Generator().manual_seed(0))
    with refuses("weights of the pattern network: expected finite"):
        input_aware.train_pattern(networks, surrogate, pairs, 1, CONFIG, target=1)


@pytest.mark.parametrize("steps, epochs, expected", [(0, 2, (6, 4)), (5, 2, (5, 4))])
def test_steps_or_epochs_set_the_length(monkeypatch, steps, epochs, expected):
    found = []
    monkeypatch.setattr(input_aware, "train_mask", lambda networks, pairs, count, config: found.append(count))
    monkeypatch.setattr(input_aware, "train_pattern", lambda networks, surrogate, pairs, count, config, target:
                        found.append(count))
    config = InputAwareConfig(**TINY | {"mask_steps": steps, "mask_epochs": 3, "steps": 0, "epochs": epochs})
    input_aware.train_networks(a_set(23), config, target=0, seed=0)  # two batches of 8 a pass
    assert tuple(found) == expected


def test_the_budgeted_config_is_narrow_and_brief():
    config = input_aware.budgeted()
    assert config.width <= 8 and config.surrogate_width <= 8 and 0 < config.mask_steps + config.steps <= 700


@pytest.mark.parametrize("change, message", [
    ({"width": 0}, r"InputAwareConfig width, surrogate_width: expected > 0 channels, found \(0, 64\)"),
    ({"surrogate_width": 0}, r"InputAwareConfig width, surrogate_width: expected > 0 channels, found \(32, 0\)"),
    ({"density": 1.5}, r"InputAwareConfig\.density: expected in \[0, 1\], found 1.5"),
    ({"diversity": -1}, r"InputAwareConfig diversity, cross: expected >= 0, found \(-1, 1.0\)"),
    ({"cross": -1}, r"InputAwareConfig diversity, cross: expected >= 0, found \(1.0, -1\)"),
    ({"mask_epochs": 0}, r"InputAwareConfig mask_epochs, epochs: expected > 0, found \(0, 75\)"),
    ({"steps": -1}, r"InputAwareConfig mask_steps, steps: expected >= 0, found \(0, -1\)"),
    ({"batch": 3}, r"InputAwareConfig\.batch: expected >= 4 images, found 3"),
    ({"share": 0.6}, r"InputAwareConfig\.share: expected in \(0, 0.5\], found 0.6"),
    ({"rate": 0}, r"InputAwareConfig rate, surrogate_rate: expected > 0, found \(0, 0.01\)"),
    ({"crop": -1}, r"VictimConfig\.crop: expected >= 0 pixels, found -1"),
])
def test_wrong_configs_are_named(refuses, change, message):
    with refuses(message):
        InputAwareConfig(**change)


@pytest.mark.parametrize("draw, message", [
    ({"ratio": 0}, r"ratio: expected in \(0, 1\], found 0"),
    ({"ratio": 0.001}, "ratio: expected at least one of 50 images, found 0.001"),
    ({"target": 5}, r"target: expected in \[0, 5\), found 5"),
])
def test_a_wrong_draw_is_named(refuses, draw, message):
    with refuses(message):
        poisoned(a_set(), **draw)


@pytest.mark.parametrize("images, message", [
    (torch.zeros(1, 3, 8, 8), r"images: expected \(N, C, H, W\) uint8, found"),
    (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "images: expected of 3 channels as the networks, found 1"),
])
def test_wrong_images_are_refused(refuses, networks, images, message):
    with refuses(message):
        input_aware.apply_trigger(images, networks)


@pytest.mark.parametrize("size", [8, 15])
def test_one_image_in_the_share_is_too_few_for_the_norms_of_small_images(refuses, size):
    clean = a_set(10, 3, size, size)
    with refuses("images triggered a batch: expected at least 2 where sides are below 16 pixels, .*, found 1"):
        poisoned(clean, InputAwareConfig(**TINY | {"share": 0.2}))
    poisoned(clean)


@pytest.mark.parametrize("clean", [a_set(3), a_set(10, 3, 7, 9)])
def test_too_small_a_set_is_refused(refuses, clean):
    with refuses("images: expected at least 4 of 8 x 8 pixels, found"):
        poisoned(clean, ratio=1.0)
