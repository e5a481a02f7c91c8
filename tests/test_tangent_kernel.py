import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import conv2d, cross_entropy, one_hot, pad

from data import tangent_kernel as ntga
from data.image_sets import ImageSet, read_digits
from data.tangent_kernel import TangentKernelConfig, ascended, judged, kernel, poison, tangent_kernel, tangent_noise
from data.unlearnable import make_unlearnable

SMALL = TangentKernelConfig(block=4, validation=4, steps=3)


def a_set(count=14, classes=3, size=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    images[0], images[1] = 0, 255
    return ImageSet(images, torch.arange(count) % classes, classes, "noise")


def some(count, height=5, width=6, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def convolved(maps, config, height, width):
    """Means of {(row, column): value} over the windows, what is outside counting as 0; the new height and width."""
    new = math.ceil(height / config.stride), math.ceil(width / config.stride)
    first = [max((m - 1) * config.stride + config.side - n, 0) // 2 for m, n in zip(new, (height, width), strict=True)]
    found = {}
    for row in range(new[0]):
        for column in range(new[1]):
            total = 0.0
            for down in range(config.side):
                for right in range(config.side):
                    total += maps.get((row * config.stride - first[0] + down,
                                       column * config.stride - first[1] + right), 0.0)
            found[row, column] = total / config.side ** 2
    return found, *new


def by_hand(one, other, config):
    """The tangent kernel of two images, number by number."""
    height, width = one.shape[1:]
    weight, bias = config.weight_variance, config.bias_variance

    def covariances(a, b):
        return {(r, c): (a[:, r, c] * b[:, r, c]).mean().item() for r in range(height) for c in range(width)}

    maps = [covariances(one, other), covariances(one, one), covariances(other, other)]
    tangent = dict.fromkeys(maps[0], 0.0)
    for _ in range(2):
        convolutions = [convolved(m, config, height, width) for m in (*maps, tangent)]
        cross, left, right, tangent = ({k: weight * v + (bias if i < 3 else 0) for k, v in m[0].items()}
                                       for i, m in enumerate(convolutions))
        height, width = convolutions[0][1:]
        for key in cross:
            tangent[key] += cross[key]
            norm = math.sqrt(left[key] * right[key])
            angle = math.acos(max(-1.0, min(1.0, cross[key] / norm)))
            cross[key] = norm * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)
            tangent[key] *= (math.pi - angle) / (2 * math.pi)
        maps = [cross, {k: v / 2 for k, v in left.items()}, {k: v / 2 for k, v in right.items()}]
    covariance, slope = sum(cross.values()) / len(cross), sum(tangent.values()) / len(tangent)
    for _ in range(3):
        covariance = weight * covariance + bias
        slope = weight * slope + covariance
    return slope


@pytest.mark.parametrize("change", [{}, {"side": 3}, {"stride": 1, "side": 4}, {"stride": 3, "side": 2}])
def test_the_kernel_agrees_with_loops(change):
    config = replace(SMALL, **change)
    x, others = some(2), torch.cat([some(2, seed=1), some(1), torch.zeros(1, 3, 5, 6)])
    wanted = torch.tensor([[by_hand(a, b, config) for b in others] for a in x], dtype=torch.float64)
    torch.testing.assert_close(tangent_kernel(x, others, config), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tangent_kernel(x.float(), others.float(), config), wanted.float(), rtol=1e-4, atol=0)


def finite(x, config, width, generator):
    """(N,) output of a wide network with the attack's start, and its parameters."""
    def layer(*shape):
        return torch.randn(*shape, generator=generator, dtype=x.dtype).requires_grad_(True)

    parameters, inputs = [], x.shape[1]
    for _ in range(2):
        parameters += [layer(width, inputs, config.side, config.side), layer(width)]
        total = [(math.ceil(n / 2) - 1) * 2 + config.side - n for n in x.shape[2:]]
        x = pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
        scale = math.sqrt(config.weight_variance / parameters[-2][0].numel())
        x = conv2d(x, scale * parameters[-2], math.sqrt(config.bias_variance) * parameters[-1], stride=2).relu()
        inputs = width
    x = x.flatten(1)
    for outputs in (width, width, 1):
        parameters += [layer(x.shape[1], outputs), layer(outputs)]
        scale = math.sqrt(config.weight_variance / x.shape[1])
        x = scale * x @ parameters[-2] + math.sqrt(config.bias_variance) * parameters[-1]
    return x[:, 0], parameters


def test_the_kernel_is_that_of_wide_networks():
    x, generator, total = some(3), torch.Generator().manual_seed(0), 0.0
    for _ in range(16):
        outputs, parameters = finite(x, SMALL, 96, generator)
        rows = [torch.cat([g.flatten() for g in torch.autograd.grad(f, parameters, retain_graph=True)])
                for f in outputs]
        total = total + torch.stack(rows) @ torch.stack(rows).T / 16
    torch.testing.assert_close(tangent_kernel(x, x, SMALL), total, rtol=0.05, atol=0)


def trained_by_steps(own, cross, targets, config, steps=3000):
    """Predictions for the judges after many tiny steps of the gradient flow."""
    own = own + config.regulariser * own.diagonal().mean() * torch.eye(len(own))
    inside, outside = torch.zeros_like(targets), torch.zeros(len(cross), targets.shape[1]).double()
    for _ in range(steps):
        push = (targets - inside) * config.time / steps / targets.numel()
        inside, outside = inside + own @ push, outside + cross @ push
    return outside


def kernels(config, count=6, judges=4):
    x, others = some(count), some(judges, seed=1)
    return kernel(x, x, config), kernel(others, x, config), torch.arange(count) % 3, torch.arange(judges) % 3


@pytest.mark.parametrize("time", [0.5, 8.0, 64.0])
def test_the_prediction_is_that_of_the_gradient_flow(time):
    config = replace(SMALL, time=time)
    own, cross, labels, asked = kernels(config)
    targets = one_hot(labels, 3).double()
    wanted = cross_entropy(trained_by_steps(own, cross, targets, config), asked, reduction="sum")
    torch.testing.assert_close(judged(own, cross, targets, asked, config)[0], wanted, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("twins", [False, True])  # equal images have equal eigenvalues' slopes
def test_gradients_by_the_kernels_agree_with_differences(twins):
    config = replace(SMALL, time=64.0)
    own, cross, labels, asked = kernels(config)
    if twins:
        own = 5 + torch.eye(6, dtype=torch.float64)  # five of six eigenvalues are equal
    targets = one_hot(labels, 3).double()
    loss, by_own, by_cross = judged(own, cross, targets, asked, config)
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        d_own = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        d_own, d_cross = d_own + d_own.T, torch.randn(cross.shape, generator=generator, dtype=torch.float64)
        up, down = (judged(own + s * d_own, cross + s * d_cross, targets, asked, config)[0] for s in (1e-5, -1e-5))
        torch.testing.assert_close((d_own * by_own).sum() + (d_cross * by_cross).sum(), (up - down) / 2e-5,
                                   rtol=1e-5, atol=1e-6)
    assert loss > 0


def test_gradients_by_the_images_agree_with_differences(monkeypatch):
    monkeypatch.setattr(ntga, "TILE", 9 * 4)  # 3 x 3 positions: tiles of two images by two
    x, others = some(5), some(3, seed=1)
    torch.testing.assert_close(kernel(x, others, SMALL), tangent_kernel(x, others, SMALL))
    by_own, by_cross = some(2, 5, 5)[0, 0], some(1, 5, 3)[0, 0]
    found = 2 * ntga.pulled_back(x, x, (by_own + by_own.T) / 2, SMALL) + ntga.pulled_back(x, others, by_cross, SMALL)

    def total(images):
        return (by_own * kernel(images, images, SMALL)).sum() + (by_cross * kernel(images, others, SMALL)).sum()

    for seed in range(3):
        move = some(5, seed=seed + 9) - 0.5
        difference = (total(x + 1e-6 * move) - total(x - 1e-6 * move)) / 2e-6
        torch.testing.assert_close((found * move).sum(), difference, rtol=1e-5, atol=1e-5)


def loss_of(images, block, judges, config):
    x, others = images.double() / 255, judges.images.double() / 255
    return judged(kernel(x, x, config), kernel(others, x, config), one_hot(block.labels, 3).double(), judges.labels,
                  config)[0]


def test_steps_follow_each_other_unless_asked_for_the_released_loop():
    block, judges = a_set().subset(torch.arange(6)), a_set().subset(torch.arange(6, 14))
    x = block.images.float()
    once = ascended(block, judges, replace(SMALL, iterated=False))
    step = replace(SMALL, steps=1, reach=1.0)
    # every round of the released loop begins at the clean images: three rounds of it are one
    assert torch.equal(once, ascended(block, judges, step)) and once.abs().max() == 8
    many = ascended(block, judges, replace(SMALL, steps=5))
    assert not torch.equal(many, once) and many.abs().max() == 8
    assert (many[0] >= 0).all() and (many[1] <= 0).all()  # black and white images
    losses = [loss_of(x + noise, block, judges, SMALL) for noise in (torch.zeros_like(x), once, many)]
    assert losses[0] < losses[1] < losses[2]


def test_a_step_agrees_with_automatic_differentiation():
    block, judges = a_set().subset(torch.arange(2, 8)), a_set().subset(torch.arange(8, 14))
    x = (block.images.double() / 255).requires_grad_(True)
    others, targets = judges.images.double() / 255, one_hot(block.labels, 3).double()
    own, cross = tangent_kernel(x, x, SMALL), tangent_kernel(others, x, SMALL)
    own = own + SMALL.regulariser * own.diagonal().mean() * torch.eye(6)
    pace = SMALL.time / targets.numel()
    # g(own) = integral of exp(-own s) over s from 0 to pace, by a fine midpoint rule
    shares = (torch.arange(200) + 0.5) / 200 * pace
    integral = sum(torch.linalg.matrix_exp(-own * s) for s in shares) * pace / 200
    loss = cross_entropy(cross @ integral @ targets, judges.labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    one = replace(SMALL, iterated=False)
    moved = (block.images + 8 * gradient.sign()).clamp(0, 255) - block.images
    agree = (ascended(block, judges, one) == moved).double().mean()
    assert agree > 0.99  # signs of slopes near 0 depend on the rounding


def test_every_image_is_altered_and_none_judges_itself():
    for count, config in ((14, SMALL), (3, SMALL), (50, replace(SMALL, validation=1000))):
        blocks = list(ntga._blocks(count, config, seed=0))
        assert sorted(torch.cat([index for index, _ in blocks]).tolist()) == list(range(count))
        assert all(0 < len(index) <= 4 and not set(index.tolist()) & set(judges.tolist()) for index, judges in blocks)
        assert {len(judges) for _, judges in blocks} == {min(config.validation, count // 2)}


@pytest.mark.parametrize("radius", [1.0, 8.5, 16.0])
def test_only_drawn_images_change_and_by_no_more_than_the_radius(radius):
    clean = a_set()
    kept = clean.images.clone()
    parameters = {"radius": radius, "block": 4, "validation": 4, "steps": 2}
    whole, part = (make_unlearnable("ntga", clean, parameters, ratio=ratio, seed=1) for ratio in (1.0, 0.5))
    change = whole.images.int() - clean.images.int()
    assert (change.flatten(1).abs().amax(1) == int(radius)).all() and change.min() < 0 < change.max()
    drawn = torch.isin(torch.arange(14), part.poisoned)
    assert int(drawn.sum()) == 7 and torch.equal(part.images[drawn], whole.images[drawn])
    assert torch.equal(part.images[~drawn], clean.images[~drawn]) and torch.equal(part.labels, clean.labels)
    assert (part.attack, part.seed, part.parameters["radius"]) == ("ntga", 1, radius)
    assert torch.equal(clean.images, kept)


def test_equal_seeds_give_equal_noise():
    before, said = torch.get_rng_state(), []
    a, b, c = (tangent_noise(a_set(), SMALL, seed=seed, progress=said.append) for seed in (4, 4, 5))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.get_rng_state(), before)
    assert said[:4] == [f"block {i}/4" for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("radius, kind", [(8.5, torch.int8), (200.0, torch.int16)])
def test_noise_is_held_in_whole_grey_levels_which_give_the_same_set(radius, kind):
    clean, config = a_set(), replace(SMALL, radius=radius)
    exact = torch.empty(clean.images.shape)
    for index, judges in ntga._blocks(14, config, seed=1):
        exact[index] = ascended(clean.subset(index), clean.subset(judges), config)
    found = tangent_noise(clean, config, seed=1)
    assert found.dtype == kind and torch.equal(found, exact.round().to(kind))
    assert torch.equal(poison(clean, config, ratio=1.0, seed=1).images, ntga.within(clean.images, exact, radius))


def test_a_kernel_machine_learns_less_from_altered_digits():
    train, test = read_digits(size=8)
    train, test = train.subset(torch.arange(160)), test.subset(torch.arange(200))
    made = poison(train, TangentKernelConfig(radius=64.0, steps=3, block=128, validation=64), ratio=1.0, seed=0)
    right = []
    for images in (train.images, made.images):
        x, others = images.float() / 255, test.images.float() / 255
        own = kernel(x, x, SMALL).double()
        weights = torch.linalg.solve(own + 1e-3 * torch.eye(160), one_hot(train.labels, 10).double())
        answers = (kernel(others, x, SMALL).double() @ weights).argmax(1)
        right.append((answers == test.labels).double().mean().item())
    assert right[0] > 0.8 and right[1] < right[0] - 0.3


@pytest.mark.parametrize("change, message", [
    ({"radius": 0.0}, r".radius: expected in \[1, 255\] grey levels, found 0.0"),
    ({"reach": 0.0}, r" steps, reach: expected > 0, found \(3, 0.0\)"),
    ({"steps": 0}, r" steps, reach: expected > 0, found \(0, 1.1\)"),
    ({"time": math.inf}, ".time: expected > 0 and finite, found inf"),
    ({"block": 0}, r" block, validation: expected > 0 images, found \(0, 4\)"),
    ({"regulariser": 0.0}, ".regulariser: expected > 0, found 0.0"),
    ({"stride": 0}, r" side, stride: expected > 0 pixels, found \(5, 0\)"),
    ({"bias_variance": 0.0}, r" variances: expected > 0, found \(1.76, 0.0\)")])
def test_impossible_settings_are_named(refuses, change, message):
    with refuses(f"^TangentKernelConfig{message}"):
        replace(SMALL, **change)


def test_one_image_is_refused(refuses):
    with refuses("^noise images: expected at least two, found 1"):
        poison(a_set().subset(torch.arange(1)), SMALL, ratio=1.0, seed=0)
