import pytest
import torch
from torch import nn
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms.functional import to_pil_image

from data.badnets import BadNetsConfig, poison
from data.image_sets import ImageSet
from data.preact_resnet import new_model
from data.victims import VictimConfig, attack_success, augment, clean_accuracy, hardened, normalise, train_victim

TINY = VictimConfig(widths=(2, 4, 4, 8), epochs=5, batch=16, rate=0.1, crop=1)


def easy_set(count=64, classes=2):
    """Class 0 is dark on the left, class 1 dark on the right, with some noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(150, 200, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % classes
    images[labels == 0, :, :, :4] -= 140
    images[labels == 1, :, :, 4:] -= 140
    return ImageSet(images, labels, classes, "halves")


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Fixed(nn.Module):
    """Says class 1 where the top-left red value is above the middle."""

    def forward(self, x):
        high = (x[:, 0, 0, 0] > 0).float()
        return torch.stack([1 - high, high], 1)


def test_a_victim_learns_and_is_in_evaluation_mode():
    train = easy_set()
    model = train_victim(train.images, train.labels, 2, TINY, seed=0)
    assert not model.training
    assert clean_accuracy(model, train, TINY) > 0.95


def test_a_poisoned_victim_learns_the_trigger():
    train = easy_set()
    bad = poison(train, BadNetsConfig(), ratio=0.3, target=1, seed=0)
    config = VictimConfig(widths=(4, 4, 8, 8), epochs=8, batch=16, rate=0.1, crop=0)
    model = train_victim(bad.images, bad.labels, 2, config, seed=0)
    clean = train_victim(train.images, train.labels, 2, config, seed=0)
    assert attack_success(model, train, config, bad.trigger, 1) > 0.9
    assert attack_success(clean, train, config, bad.trigger, 1) < 0.5


def test_equal_seeds_give_equal_weights():
    train, config = easy_set(32), VictimConfig(widths=(2, 2, 2, 2), epochs=1, batch=8, crop=2, flip=True)
    before = torch.get_rng_state()
    a, b, c = (weights(train_victim(train.images, train.labels, 2, config, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


def test_progress_comes_every_epoch():
    train, lines = easy_set(8), []
    config = VictimConfig(widths=(2, 2, 2, 2), epochs=2, batch=100)  # fewer images than one batch
    train_victim(train.images, train.labels, 2, config, seed=0, progress=lines.append)
    assert [line.split(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_is_crop_of_the_padded_image_and_perhaps_a_mirror(flip):
    images = torch.randint(1, 256, (40, 2, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    config = VictimConfig(crop=2, flip=flip)
    found = augment(images, config, generator=torch.Generator().manual_seed(1))
    mirrored, shifts = 0, set()
    for image, shown in zip(images, found, strict=True):
        padded = torch.zeros(2, 10, 9, dtype=torch.uint8)
        padded[:, 2:8, 2:7] = image
        candidates = {(r, c, m): padded[:, r:r + 6, c:c + 5].flip(2) if m else padded[:, r:r + 6, c:c + 5]
                      for r in range(5) for c in range(5) for m in (False, True)}
        (hit,) = [key for key, candidate in candidates.items() if torch.equal(candidate, shown)]
        mirrored += hit[2]
        shifts.add(hit[:2])
    assert (8 < mirrored < 32) if flip else mirrored == 0
    assert len(shifts) > 12


def slow_ascent(model, images, labels, config, generator):
    """Madry et al., Eq. 2.1, one image at a time."""
    starts = 2 * torch.rand(images.shape, generator=generator) - 1
    found = []
    for image, label, start in zip(images.float(), labels, starts, strict=True):
        moved = (image + config.radius * start).clamp(0, 255)
        for _ in range(config.ascents):
            moved = moved.clone().requires_grad_(True)
            nn.functional.cross_entropy(model(normalise(moved[None], config)), label[None]).backward()
            moved = moved.detach() + 2.5 * config.radius / config.ascents * moved.grad.sign()
            moved = image + (moved - image).clamp(-config.radius, config.radius)
            moved = moved.clamp(0, 255)
        found.append(moved)
    return torch.stack(found)


def test_hardened_images_are_those_of_the_slow_ascent():
    train, config = easy_set(6), VictimConfig(widths=(4, 4, 4, 4), radius=8.0, ascents=3)
    model = new_model(2, config.widths, 3, seed=0).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = hardened(model, train.images, train.labels, config, generator=torch.Generator().manual_seed(1))
    assert model.training and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (found - train.images).abs().max() <= 8 and found.min() >= 0 and found.max() <= 255
    expected = slow_ascent(model.eval(), train.images, train.labels, config, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def robust_accuracy(model, test, config):
    moved = hardened(model, test.images, test.labels, config, generator=torch.Generator().manual_seed(2))
    model.eval()
    return (model(normalise(moved, config)).argmax(1) == test.labels).double().mean().item()


def test_adversarial_training_resists_what_ordinary_training_does_not():
    train = easy_set()
    train.images[:] = (train.images.float() * 0.2 + 100).to(torch.uint8)  # classes 28 grey levels apart, noisy
    plain = VictimConfig(widths=(4, 4, 8, 8), epochs=12, batch=16, rate=0.1, crop=0, radius=0.0)
    hard = VictimConfig(widths=(4, 4, 8, 8), epochs=12, batch=16, rate=0.1, crop=0, radius=8.0)
    accuracies = [robust_accuracy(train_victim(train.images, train.labels, 2, config, seed=0), train, hard)
                  for config in (plain, hard)]
    assert accuracies[0] < 0.7 < 0.9 < accuracies[1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_precisions_learn(precision):
    train = easy_set()
    config = VictimConfig(widths=(2, 4, 4, 8), epochs=5, batch=16, rate=0.1, crop=1, precision=precision)
    model = train_victim(train.images, train.labels, 2, config, seed=0)
    assert next(model.parameters()).dtype == torch.float32
    assert clean_accuracy(model, train, config) > 0.95


def test_normalisation_is_torchvisions():
    config = VictimConfig(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    images = torch.randint(256, (4, 3, 7, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    transform = Compose([ToTensor(), Normalize(config.mean, config.std)])
    expected = torch.stack([transform(to_pil_image(image)) for image in images])
    torch.testing.assert_close(normalise(images, config), expected, rtol=1e-6, atol=1e-6)


def test_accuracy_and_success_by_hand():
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    images[2:, 0, 0, 0] = 255                                    # predicted 0, 0, 1, 1
    test = ImageSet(images, torch.tensor([0, 1, 1, 0]), 2, "x")
    assert clean_accuracy(Fixed(), test, TINY) == 0.5

    def whiten_first(some):
        assert len(some) == 2                                    # those of the target are left out
        return torch.cat([torch.full_like(some[:1], 255), some[1:]])

    # target 1: the others are images 0 and 3; after the trigger both are predicted 1
    assert attack_success(Fixed(), test, TINY, whiten_first, 1) == 1.0
    # target 0: the others are images 1 (made white: predicted 1) and 2 (predicted 1)
    assert attack_success(Fixed(), test, TINY, whiten_first, 0) == 0.0


@pytest.mark.parametrize("wrong, message", [
    ({"epochs": 0}, r"VictimConfig epochs, batch: expected > 0, > 1, found \(0, 128\)"),
    ({"rate": 0.0}, r"VictimConfig rate, clip: expected > 0, found \(0.0, 5.0\)"),
    ({"warm_up": 1.0}, r"VictimConfig.warm_up: expected in \[0, 1\), found 1.0"),
    ({"radius": -1.0}, r"VictimConfig radius, ascents: expected >= 0, > 0, found \(-1.0, 5\)"),
    ({"precision": "half"}, "VictimConfig.precision: expected one of auto, float32, bfloat16, found half"),
    ({"crop": -1}, "VictimConfig.crop: expected >= 0 pixels, found -1"),
    ({"std": (1.0, 0.0, 1.0)}, "VictimConfig mean, std: expected one each a channel, std > 0"),
])
def test_a_wrong_config_is_named(refuses, wrong, message):
    with refuses(message):
        VictimConfig(**wrong)


def test_a_channel_count_without_statistics_is_named(refuses):
    with refuses("VictimConfig.mean: expected 1 channels, found 3"):
        train_victim(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4).long(), 2, TINY, seed=0)


def test_success_without_other_classes_is_refused(refuses):
    test = ImageSet(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), torch.zeros(2).long(), 2, "x")
    with refuses("test images: expected some of another class than 0, found none"):
        attack_success(Fixed(), test, TINY, lambda x: x, 0)
