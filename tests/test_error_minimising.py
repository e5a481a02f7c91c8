from dataclasses import replace

import pytest
import torch

from data import error_minimising as em
from data.error_minimising import ErrorMinimisingConfig, descended, error_minimising, poison, shuffled_batches
from data.image_sets import ImageSet, read_digits
from data.resnet import new_resnet
from data.unlearnable import make_unlearnable
from data.victims import VictimConfig, predict, train_victim

WIDTHS = (2, 4, 4, 8)
SAMPLE = ErrorMinimisingConfig(widths=WIDTHS, batch=6, batches=2, rounds=2, step=3.0, steps=2, stop_error=0.0)
CLASS = replace(SAMPLE, kind="class", share=0.5)
STEPS = replace(SAMPLE, schedule="steps", training_steps=4, drop_every=2)
every = pytest.mark.parametrize("config", [SAMPLE, CLASS, STEPS], ids=["sample", "class", "steps"])


def a_set(count=14, classes=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[0], images[1] = 0, 255  # nothing can be taken from, or added to, these
    return ImageSet(images, torch.arange(count) % classes, classes, "noise")


def by_hand(model, images, labels, noise, config):
    """The signed descent, image by image."""
    noise = noise.clone()
    for i in range(len(images)):
        for _ in range(config.steps):
            x = (images[i] + noise[i]).requires_grad_(True)
            loss = -model(x[None] / 255).log_softmax(1)[0, labels[i]]
            loss.backward()
            moved = (noise[i] - config.step * x.grad.sign()).clamp(-config.radius, config.radius)
            noise[i] = (images[i] + moved).clamp(0, 255) - images[i]
    return noise


def test_the_descent_agrees_with_a_loop_over_images():
    clean = a_set()
    images = clean.images.float()
    model = new_resnet(3, WIDTHS, 3, seed=1).eval()
    start = em.random_start(images, 8.0, generator=torch.Generator().manual_seed(2))
    found = descended(model, images, clean.labels, start, SAMPLE)
    torch.testing.assert_close(found, by_hand(model, images, clean.labels, start, SAMPLE))
    before, after = (torch.nn.functional.cross_entropy(em.answers(model, images + p, SAMPLE), clean.labels)
                     for p in (start, found))
    assert after < before


@pytest.mark.parametrize("config", [SAMPLE, CLASS], ids=["sample", "class"])
def test_alternating_agrees_with_a_plain_loop(config):
    clean, generator = a_set(), torch.Generator().manual_seed(3)
    images, labels = clean.images.float(), clean.labels
    model, optimiser = em.new_surrogate(clean, config, seed=3)
    visited = torch.randperm(14, generator=generator)[:7 if config.kind == "class" else 14].sort().values
    batches = shuffled_batches(14, 6, generator=generator)
    noise = torch.zeros(14, 3, 8, 8)  # the class's at each of its images
    for _ in range(config.rounds):
        for _ in range(config.batches):
            index = next(batches)
            em.learn(model, optimiser, images[index] + noise[index], labels[index], config)
        model.eval()
        for index in visited.split(6):
            start = (images[index] + noise[index]).clamp(0, 255) - images[index]
            found = descended(model, images[index], labels[index], start, config)
            for k in range(3) if config.kind == "class" else ():
                if (labels[index] == k).any():
                    noise[labels == k] = found[labels[index] == k].mean(0)
            if config.kind == "sample":
                noise[index] = found
    found = error_minimising(clean, config, seed=3)
    assert found.shape == ((3, 3, 8, 8) if config.kind == "class" else (14, 3, 8, 8))
    torch.testing.assert_close(found[labels] if config.kind == "class" else found.float(), noise)
    assert found.dtype == (torch.float32 if config.kind == "class" else torch.float16)


def test_what_is_held_between_rounds_hardly_decides_a_grey_level(monkeypatch):
    config, clean = replace(SAMPLE, step=0.8, steps=6), a_set()
    found = poison(clean, config, ratio=1.0, seed=3).images
    monkeypatch.setattr(em, "HELD", torch.float32)
    whole = poison(clean, config, ratio=1.0, seed=3).images
    assert (found != whole).double().mean() < 0.01  # a slope near 0 may change its sign
    assert (found != clean.images).double().mean() > 0.3


def test_steps_agree_with_a_plain_loop():
    clean, generator = a_set(), torch.Generator().manual_seed(3)
    images, labels = clean.images.float(), clean.labels
    model, optimiser = em.new_surrogate(clean, STEPS, seed=3)
    batches = shuffled_batches(14, 6, generator=generator)

    def perturbed(index):
        start = em.random_start(images[index], 8.0, generator=generator)
        return descended(model.eval(), images[index], labels[index], start, STEPS)

    for rate in (0.1, 0.1, 0.01, 0.01):
        index = next(batches)
        x = images[index] + perturbed(index)
        optimiser.param_groups[0]["lr"] = rate
        em.learn(model, optimiser, x, labels[index], STEPS)
    wanted = torch.cat([perturbed(index) for index in torch.arange(14).split(6)])
    found = error_minimising(clean, STEPS, seed=3)
    assert found.dtype == torch.int8 and torch.equal(found, wanted.round().to(torch.int8))
    assert torch.equal(poison(clean, STEPS, ratio=1.0, seed=3).images, em.within(clean.images, wanted, 8.0))


@pytest.mark.parametrize("radius, kind", [(8.0, torch.int8), (127.0, torch.int8), (127.6, torch.int16)])
def test_a_large_radius_takes_two_bytes_a_number(radius, kind):
    found = error_minimising(a_set(), replace(STEPS, radius=radius, step=radius), seed=0)
    assert found.dtype == kind and found.max() == round(radius) and found.min() == -round(radius)


@every
def test_equal_seeds_give_equal_noise(config):
    before, clean = torch.get_rng_state(), a_set()
    kept = clean.images.clone()
    a, b, c = (error_minimising(clean, config, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(clean.images, kept)


@every
@pytest.mark.parametrize("radius", [1.0, 8.0, 8.5, 9.6])
def test_no_pixel_changes_by_more_than_the_radius(config, radius):
    clean = a_set()
    found = poison(clean, replace(config, radius=radius), ratio=1.0, seed=1)
    change = found.images.int() - clean.images.int()
    assert change.abs().max() == int(radius) if config.kind == "sample" else 0 < change.abs().max() <= radius
    assert change.min() < 0 < change.max()  # both signs are kept


def test_noise_stays_within_the_ball_and_the_grey_levels():
    images = torch.tensor([0.0, 3.0, 100.0, 253.0, 255.0])
    low, high = (em.bounded(torch.full((5,), p), images, 8.0) for p in (-20.0, 20.0))
    assert low.tolist() == [0, -3, -8, -8, -8] and high.tolist() == [8, 8, 8, 2, 0]
    start = em.random_start(a_set().images.float(), 8.0, generator=torch.Generator().manual_seed(0))
    assert start[0].min() == 0 and start[1].max() == 0 and 7 < start.abs().max() <= 8
    levels = torch.arange(256, dtype=torch.uint8)
    assert (em.within(levels, torch.full((256,), 8.5), 8.5).int() - levels.int()).max() == 8  # never 9 by rounding


@every
def test_part_of_the_set_gets_the_noise_of_the_whole(config):
    clean = a_set()
    whole, part = (poison(clean, config, ratio=ratio, seed=1) for ratio in (1.0, 0.5))
    assert len(whole.poisoned) == 14 and len(part.poisoned) == 7
    drawn = torch.isin(torch.arange(14), part.poisoned)
    assert torch.equal(part.images[drawn], whole.images[drawn])
    assert torch.equal(part.images[~drawn], clean.images[~drawn]) and torch.equal(part.labels, clean.labels)
    assert (part.attack, part.seed, part.parameters["radius"]) == ("em", 1, 8.0)


def test_a_class_shares_one_perturbation():
    clean = replace(a_set(), images=a_set().images // 2 + 64)  # no grey level is near its limits
    change = poison(clean, CLASS, ratio=1.0, seed=1).images.int() - clean.images.int()
    first = [change[clean.labels == k][0] for k in range(3)]
    assert all(torch.equal(change[i], first[k]) for i, k in enumerate(clean.labels.tolist()))
    assert not torch.equal(first[0], first[1])


def test_perturbing_leaves_the_network_as_it_was():
    clean = a_set()
    model = new_resnet(3, WIDTHS, 3, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with em.frozen(model):
        assert not model.training
        gradient = em.input_gradient(model, clean.images.float(), clean.labels, SAMPLE)
        assert gradient.abs().sum() > 0 and all(p.grad is None for p in model.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("stop_error, rounds", [(1.0, 1), (0.0, 2)])
def test_a_small_error_or_the_cap_ends_the_rounds(stop_error, rounds):
    said = []
    error_minimising(a_set(), replace(SAMPLE, stop_error=stop_error), seed=0, progress=said.append)
    assert len(said) == rounds and said[0].startswith(f"round 1/{SAMPLE.rounds}: error 0.")


def test_batches_take_every_image_once_a_round():
    batches = shuffled_batches(7, 3, generator=torch.Generator().manual_seed(0))
    rounds = [torch.cat([next(batches), next(batches)]) for _ in range(2)]
    assert all(len(found.unique()) == 6 for found in rounds) and not torch.equal(*rounds)
    assert len(next(shuffled_batches(2, 3, generator=torch.Generator()))) == 2


def test_half_precision_is_near_full():
    model, x = new_resnet(3, WIDTHS, 3, seed=1).eval(), a_set().images.float()
    full, half = (em.answers(model, x, replace(SAMPLE, precision=name)) for name in ("float32", "bfloat16"))
    assert half.dtype == torch.float32 and not torch.equal(full, half)
    torch.testing.assert_close(full, half, rtol=0.05, atol=0.05)


def test_a_poisoned_set_is_learnt_but_teaches_little():
    train, test = read_digits(size=8)
    train = train.subset(torch.arange(300))
    plain = VictimConfig(widths=(4, 8, 16, 32), epochs=8, batch=32, rate=0.1, crop=0, mean=(0,) * 3, std=(1,) * 3)
    config = {"radius": 80.0, "step": 16.0, "batch": 64, "widths": plain.widths}
    sets = [train] + [make_unlearnable("em", train, config | more, ratio=1.0, seed=0) for more in (
        {"steps": 5, "rounds": 10}, {"kind": "class", "steps": 1, "rounds": 10})]
    learnt, right = [], []
    for made in sets:
        model = train_victim(made.images, made.labels, 10, plain, seed=5, network=new_resnet)
        learnt.append((predict(model, made.images, plain) == made.labels).float().mean().item())
        right.append((predict(model, test.images, plain) == test.labels).float().mean().item())
    assert min(learnt) > 0.9 and right[0] > 0.8
    assert max(right[1:]) < right[0] - 0.2


@pytest.mark.parametrize("change, message", [
    ({"kind": "image"}, "kind: expected one of sample, class, found image"),
    ({"schedule": "once"}, "schedule: expected one of alternating, steps, found once"),
    ({"kind": "class", "schedule": "steps"}, "schedule: expected alternating for perturbations of classes, found s"),
    ({"share": 0.0, "kind": "class"}, r"share: expected in \(0, 1\], found 0.0"),
    ({"share": 0.5}, "share: expected 1 for perturbations of images, found 0.5"),
    ({"rounds": 0}, r"batches, rounds: expected > 0, found \(2, 0\)"),
    ({"stop_error": 2.0}, r"stop_error: expected in \[0, 1\], found 2.0"),
    ({"radius": 0.5}, r"radius: expected in \[1, 255\] grey levels, found 0.5"),
    ({"steps": 0}, r"step, steps: expected > 0, found \(3.0, 0\)"),
    ({"widths": (4, 4)}, r"widths: expected four positive numbers, found \(4, 4\)"),
    ({"batch": 1}, "batch: expected > 1 images, found 1"),
    ({"clip": 0.0}, r"rate, clip: expected > 0, found \(0.1, 0.0\)"),
    ({"momentum": 1.0}, r"momentum, decay: expected in \[0, 1\), >= 0, found \(1.0, 0.0005\)"),
    ({"precision": "half"}, "precision: expected one of auto, float32, bfloat16, found half"),
    ({"drop_every": 0}, r"training_steps, drop_every: expected > 0, found \(5000, 0\)")])
def test_impossible_settings_are_named(refuses, change, message):
    with refuses(f"^ErrorMinimisingConfig.{message}"):
        replace(SAMPLE, **change)


def test_one_image_is_refused(refuses):
    with refuses("^noise images: expected at least two, found 1"):
        poison(a_set().subset(torch.arange(1)), SAMPLE, ratio=1.0, seed=0)


def test_a_surrogate_that_blows_up_is_named_and_poisons_nothing(refuses):
    for config in (replace(SAMPLE, rate=1e30, clip=1e30), replace(STEPS, rate=1e30, clip=1e30)):
        with refuses("weights of the surrogate: expected finite: a lower rate .*, found NaN or infinite values"):
            poison(a_set(), config, ratio=1.0, seed=0)
