import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import interpolate

from data import ssba
from data.image_sets import ImageSet
from data.ssba import Encoder, SSBAConfig, embed, poison, read_bits, train_encoder

TINY = SSBAConfig(bits=2, width=2, steps=3, batch=4, rate=1e-2, threshold=0.0)
LEARNING = SSBAConfig(bits=2, width=4, residual=128.0, steps=100, batch=8, rate=5e-3, weight=2.0, idle=5, ramp=10)
DOUBLE = SSBAConfig(encoder="double")
kinds = pytest.mark.parametrize("kind", ["trained", "double"])


def some_images(count=20, channels=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


def smooth_images(count=64, seed=0):
    """Four colours an image, blended: noise would drown a message that small networks can write."""
    corners = some_images(count, size=2, seed=seed).float() / 2 + 64
    return interpolate(corners, (8, 8), mode="bilinear").round().to(torch.uint8)


def a_set(**shape):
    images = some_images(**shape)
    return ImageSet(images, torch.arange(len(images)) % 4, 4, "noise")


def poisoned(clean, kind, encoder=None, **draw):
    config = TINY if kind == "trained" else DOUBLE
    return poison(clean, config, encoder=encoder, **({"ratio": 0.2, "target": 3, "seed": 1} | draw))


def weights(encoder):
    return torch.cat([value.flatten() for value in encoder.networks.state_dict().values()])


@pytest.fixture(scope="module")
def tiny():
    return train_encoder(some_images(), TINY, seed=0)


@pytest.fixture(scope="module")
def learned():
    return train_encoder(smooth_images(), LEARNING, seed=0)


@kinds
@pytest.mark.parametrize("channels, size", [(1, 8), (3, 9)])
def test_only_the_drawn_images_change_and_get_the_target(kind, channels, size):
    clean = a_set(channels=channels, size=size)
    kept = clean.images.clone(), clean.labels.clone()
    found = poisoned(clean, kind)
    assert torch.equal(clean.images, kept[0]) and torch.equal(clean.labels, kept[1])
    drawn = torch.zeros(20, dtype=torch.bool)
    drawn[found.poisoned] = True
    assert int(drawn.sum()) == 4 and (found.labels[drawn] == 3).all()
    assert found.images.dtype == torch.uint8 and found.images.shape == clean.images.shape
    assert torch.equal(found.images[~drawn], clean.images[~drawn])
    assert torch.equal(found.labels[~drawn], clean.labels[~drawn])
    assert (found.images[drawn] != clean.images[drawn]).flatten(1).any(1).all()


@kinds
def test_training_and_test_time_use_one_trigger_whatever_the_batch(kind):
    clean = a_set(count=70)
    found = poisoned(clean, kind)
    triggered = found.trigger(clean.images)
    assert torch.equal(triggered[found.poisoned], found.images[found.poisoned])
    assert torch.equal(torch.cat([found.trigger(one) for one in clean.images.split(1)]), triggered)
    assert found.trigger(clean.images[:0]).shape == (0, 3, 8, 8)
    assert (found.attack, found.target, found.seed, found.parameters["encoder"]) == ("ssba", 3, 1, kind)


@kinds
def test_equal_seeds_give_equal_sets(kind):
    before = torch.get_rng_state()
    a, b, c = (poisoned(a_set(), kind, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(a.images, b.images) and torch.equal(a.poisoned, b.poisoned)
    assert not torch.equal(a.poisoned, c.poisoned)
    assert not torch.equal(a.trigger(some_images()), c.trigger(some_images()))
    assert torch.equal(torch.get_rng_state(), before)


@kinds
@pytest.mark.parametrize("target", [0, 2])
def test_any_class_can_be_the_target(kind, target):
    found = poisoned(a_set(), kind, target=target)
    assert found.labels[found.poisoned].unique().tolist() == [target]


@kinds
def test_the_trigger_differs_from_image_to_image(kind, learned):
    clean = a_set(count=8)
    found = poison(clean, LEARNING if kind == "trained" else DOUBLE, ratio=0.2, target=0, seed=0,
                   encoder=learned if kind == "trained" else None)
    changes = found.trigger(clean.images).int() - clean.images.int()
    assert (changes != changes[:1]).flatten(1).any(1)[1:].all()


def test_a_small_encoder_learns_to_carry_bits(learned):
    fresh = smooth_images(seed=5)
    bits = torch.randint(2, (64, 2), generator=torch.Generator().manual_seed(1)).float()
    stego = embed(fresh, learned, bits)
    assert (read_bits(stego, learned) == (bits > 0.5)).double().mean() > 0.9
    assert (read_bits(fresh, learned) == (bits > 0.5)).double().mean() < 0.7
    assert (stego.int() - fresh.int()).abs().max() <= LEARNING.residual


def test_a_poisoned_image_carries_the_message_of_its_seed(learned):
    clean = ImageSet(smooth_images(16, seed=6), torch.arange(16) % 4, 4, "smooth")
    for seed in range(4):
        found = poison(clean, LEARNING, ratio=1.0, target=0, seed=seed, encoder=learned)
        message = torch.randint(2, (2,), generator=torch.Generator().manual_seed(seed)) == 1
        assert (read_bits(found.images, learned) == message).double().mean() > 0.9


def test_the_squared_error_makes_the_message_less_visible(learned):
    careless = train_encoder(smooth_images(), replace(LEARNING, weight=0.0), seed=0)
    assert learned.psnr > careless.psnr + 3


def test_accuracy_and_quality_are_measured_on_what_is_stored(learned):
    images, generator = smooth_images(16, seed=9), torch.Generator().manual_seed(2)
    found = ssba._measured(learned.networks, LEARNING, images, generator=generator)
    again = torch.Generator().manual_seed(2)
    order = torch.randperm(16, generator=again).tolist()
    bits = torch.randint(2, (16, 2), generator=again)
    right, quality = 0, []
    for i, message in zip(order, bits, strict=True):
        stego = embed(images[i:i + 1], learned, message)
        right += int((read_bits(stego, learned)[0] == (message == 1)).sum())
        differences = (stego[0].int() - images[i].int()).flatten().tolist()
        quality.append(20 * math.log10(255 / math.sqrt(sum(d * d for d in differences) / len(differences))))
    assert found.bit_accuracy == pytest.approx(right / 32) and found.psnr == pytest.approx(sum(quality) / 16)


def test_the_error_counts_once_the_bits_are_read():
    config = SSBAConfig(weight=10.0, idle=5, ramp=4)
    assert ssba.error_weight(100, None, config) == 0
    found = [ssba.error_weight(step, 2, config) for step in range(2, 14)]
    assert found == [0, 0, 0, 0, 0, 0, 2.5, 5, 7.5, 10, 10, 10]


def test_training_takes_as_many_steps_as_the_epochs_have():
    lines = []
    train_encoder(some_images(9), replace(TINY, steps=0, epochs=3), seed=0, progress=lines.append)
    assert len(lines) == 6 and lines[-1].startswith("step 6/6: bit accuracy ")


def test_the_message_is_read_from_shifted_and_mirrored_images():
    seen, images = [], some_images(60)
    networks = {"reader": lambda images: seen.append(images) or torch.zeros(len(images), 2),
                "embedder": lambda images, bits: images}
    for shift, flip, kinds in ((0, False, 1), (1, False, 9), (0, True, 2)):
        config = replace(TINY, shift=shift, flip=flip)
        ssba._losses(networks, images, config, generator=torch.Generator().manual_seed(0))
        moved = {(rows, columns, mirrored) for rows in (-shift, 0, shift) for columns in (-shift, 0, shift)
                 for mirrored in (False, flip)}
        found = [sorted(move for move in moved if torch.allclose(moved_by_hand(image, *move) / 255, read))
                 for image, read in zip(images.float(), seen.pop(), strict=True)]
        assert all(len(moves) == 1 for moves in found) and len({moves[0] for moves in found}) == kinds


def moved_by_hand(image, rows, columns, mirrored):
    """Black comes in from outside; mirrored after the shift."""
    found = torch.zeros_like(image)
    for row in range(8):
        for column in range(8):
            if 0 <= row + rows < 8 and 0 <= column + columns < 8:
                found[:, row, column] = image[:, row + rows, column + columns]
    return found.flip(2) if mirrored else found


def test_a_batch_larger_than_the_set_is_the_set():
    batches = ssba._batches(5, 8, generator=torch.Generator().manual_seed(0))
    assert sorted(next(batches).tolist()) == sorted(next(batches).tolist()) == [0, 1, 2, 3, 4]


def test_equal_seeds_give_equal_weights(tiny):
    before = torch.get_rng_state()
    a, b = (train_encoder(some_images(), TINY, seed=seed) for seed in (0, 1))
    assert torch.equal(weights(a), weights(tiny)) and not torch.equal(weights(a), weights(b))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(p.requires_grad for p in a.networks.parameters())


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 32, 32), (2, 33, 16)])
@pytest.mark.parametrize("residual", [0.0, 20.0])
def test_any_image_size_fits(shape, residual):
    config = replace(TINY, steps=1, residual=residual)
    images = torch.zeros(4, *shape, dtype=torch.uint8)
    assert embed(images, train_encoder(images, config, seed=0), torch.ones(2)).shape == images.shape


def test_the_published_sizes():
    networks = ssba._networks((3, 32, 32), SSBAConfig())
    shapes = {name: tuple(value.shape) for name, value in networks.state_dict().items() if name.endswith("weight")}
    assert shapes["embedder.message.weight"] == (3 * 16 * 16, 100)
    assert [shapes[f"embedder.down.{i}.weight"][:2] for i in range(5)] == \
        [(32, 6), (32, 32), (64, 32), (128, 64), (256, 128)]
    assert [shapes[f"embedder.up.{i}.weight"] for i in range(4)] == \
        [(128, 256, 2, 2), (64, 128, 2, 2), (32, 64, 2, 2), (32, 32, 2, 2)]
    assert [shapes[f"embedder.merge.{i}.weight"][:2] for i in range(4)] == [(128, 256), (64, 128), (32, 64), (32, 70)]
    assert shapes["embedder.out.weight"] == (3, 32, 1, 1)
    reader = [shape for name, shape in shapes.items() if name.startswith("reader")]
    assert [shape[0] for shape in reader] == [32, 32, 64, 64, 64, 128, 128, 512, 100]
    assert reader[-2] == (512, 128)


def test_a_given_encoder_is_used(tiny):
    found = poisoned(a_set(), "trained", encoder=tiny, seed=3)
    message = torch.randint(2, (2,), generator=torch.Generator().manual_seed(3)).float()
    assert torch.equal(found.trigger(some_images(4)), embed(some_images(4), tiny, message))


def test_the_double_by_hand():
    images = some_images(3, size=7)
    code = ssba.double_code(7, 7, seed=2)
    found = ssba.apply_double(images, code, 5.0)
    for image, stego in zip(images.double(), found, strict=True):
        spread = torch.zeros(7, 7, dtype=torch.float64)
        grey = image.mean(0)
        for row in range(7):
            for column in range(7):
                window = [grey[min(max(row + i, 0), 6), min(max(column + j, 0), 6)].item()
                          for i in (-1, 0, 1) for j in (-1, 0, 1)]
                middle = sum(window) / 9
                spread[row, column] = math.sqrt(sum((value - middle) ** 2 for value in window) / 9)
        strength = (spread / spread.mean()).clamp(0.3, 2.5)
        assert torch.equal(stego, (image + 5 * code * strength).round().clamp(0, 255).to(torch.uint8))


def test_the_code_of_the_double():
    code = ssba.double_code(20, 20, seed=0)
    assert set(code.flatten().tolist()) == {-1.0, 1.0}
    board = torch.tensor([[(-1.0) ** (i + j) for j in range(20)] for i in range(20)], dtype=torch.float64)
    cells = (code * board).reshape(10, 2, 10, 2)
    assert (cells == cells[:, :1, :, :1]).all()
    same, other = (ssba.double_code(20, 20, seed=seed) for seed in (0, 1))
    assert torch.equal(code, same) and not torch.equal(code, other)


def test_a_flat_image_gets_an_even_double():
    assert (ssba.local_contrast(torch.full((2, 3, 8, 8), 77, dtype=torch.uint8)) == 1).all()


@pytest.mark.parametrize("wrong, message", [
    ({"encoder": "none"}, r"SSBAConfig\.encoder: expected one of trained, double, found none"),
    ({"bits": 0}, r"SSBAConfig bits, width: expected > 0, found \(0, 32\)"),
    ({"residual": 256}, r"SSBAConfig\.residual: expected in \[0, 255\] grey levels, found 256"),
    ({"shift": -1}, r"SSBAConfig\.shift: expected >= 0 pixels, found -1"),
    ({"steps": -1}, r"SSBAConfig epochs, steps, batch: expected > 0, >= 0, > 0, found \(20, -1, 64\)"),
    ({"rate": 0}, r"SSBAConfig rate, weight: expected > 0, >= 0, found \(0, 10\.0\)"),
    ({"threshold": 1}, r"SSBAConfig\.threshold: expected in \[0, 1\), found 1"),
    ({"ramp": 0}, r"SSBAConfig idle, ramp: expected >= 0, > 0, found \(1000, 0\)"),
    ({"amplitude": 0}, r"SSBAConfig\.amplitude: expected in \(0, 255\] grey levels, found 0"),
])
def test_wrong_configs_are_named(refuses, wrong, message):
    with refuses(message):
        SSBAConfig(**wrong)


def test_an_encoder_that_does_not_fit_is_named(refuses, tiny):
    with refuses(r"encoder: expected one trained with SSBAConfig\(.*steps=4.*\), found SSBAConfig\(.*steps=3.*\)"):
        poison(a_set(), replace(TINY, steps=4), ratio=0.2, target=0, seed=0, encoder=tiny)
    with refuses(r"images: expected of shape \(3, 8, 8\) as the encoder's, found \(3, 16, 16\)"):
        poisoned(a_set(size=16), "trained", encoder=tiny)
    weak = replace(TINY, threshold=0.9)
    with refuses(r"encoder: expected bit accuracy >= 0\.9 \(train longer\), found 0\.250"):
        poison(a_set(), weak, ratio=0.2, target=0, seed=0, encoder=Encoder(tiny.networks, weak, (3, 8, 8), 0.25, 9.0))
    with refuses(r"SSBAConfig\.encoder: expected trained, found double"):
        train_encoder(some_images(), DOUBLE, seed=0)


def test_a_start_that_learns_nothing_is_tried_again(refuses, monkeypatch, tiny):
    strict, seeds = replace(TINY, threshold=0.9), []

    def trained(images, config, *, seed):
        seeds.append(seed)
        return Encoder(tiny.networks, strict, (3, 8, 8), good if len(seeds) == 2 else 0.5, 9.0)

    monkeypatch.setattr(ssba, "train_encoder", trained)
    good = 0.95
    poison(a_set(), strict, ratio=0.2, target=0, seed=4)
    assert len(set(seeds)) == 2 and seeds[0] == 4
    seeds.clear()
    good = 0.5
    with refuses(r"encoder: expected bit accuracy >= 0\.9 \(train longer\), found 0\.500"):
        poison(a_set(), strict, ratio=0.2, target=0, seed=4)
    assert len(set(seeds)) == 3


def test_wrong_images_and_bits_are_named(refuses, tiny):
    with refuses(r"images: expected \(N, C, H, W\) uint8, found \(1, 3, 8, 8\) torch.float32"):
        embed(torch.zeros(1, 3, 8, 8), tiny, torch.ones(2))
    with refuses(r"images: expected \(N, C, H, W\) uint8"):
        ssba.apply_double(torch.zeros(1, 3, 8, 8), torch.ones(8, 8), 5.0)
    with refuses(r"bits: expected 2 of them, found 3"):
        embed(some_images(), tiny, torch.ones(3))
