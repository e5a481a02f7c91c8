"""What the tests share of attacks that train their surrogate as a victim: images, an untrained surrogate, and what
every such attack owes, whatever it does to the images."""
import torch

from data.image_sets import ImageSet
from data.resnet import new_resnet
from data.targeted_maximising import frozen
from data.unlearnable_sets import drawn_positions
from data.victims import train_victim


def draw(*, seed):
    return torch.Generator().manual_seed(seed)


def noise(count=24, channels=3, height=12, width=10, classes=4):
    images = torch.randint(256, (count, channels, height, width), generator=draw(seed=0), dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % classes, classes, "noise")


def network(classes=4, channels=3, seed=0):
    """Untrained, with running statistics that are not those it begins with."""
    model = new_resnet(classes, (4, 4, 8, 8), channels, seed=seed)
    with torch.no_grad():
        model.train()(torch.rand(8, channels, 12, 10, generator=draw(seed=seed)))
    return frozen(model)


def check_a_part_of_the_set(monkeypatch, attack, config, name):
    """Of the module `attack`: the drawn images alone change, and all images train the surrogate, as `config` says."""
    clean, shown = noise(), []
    kept = clean.images.clone(), clean.labels.clone()

    def spied(images, labels, num_classes, views, **rest):
        shown.append((images.clone(), labels.clone(), views))
        return train_victim(images, labels, num_classes, views, **rest)

    monkeypatch.setattr(attack, "train_victim", spied)
    found = attack.poison(clean, config, ratio=0.5, seed=2)
    ((images, labels, views),) = shown
    assert torch.equal(images, clean.images) and torch.equal(labels, clean.labels)
    assert (views.widths, views.epochs, views.batch, views.rate) == (config.widths, config.epochs, 16, 0.1)
    assert (views.crop, views.flip, views.mean, views.std) == (1, True, (0.0,) * 3, (1.0,) * 3)
    assert torch.equal(found.poisoned, drawn_positions(clean, 0.5, seed=2)) and len(found.poisoned) == 12
    drawn = torch.zeros(24, dtype=torch.bool)
    drawn[found.poisoned] = True
    assert torch.equal(found.images[~drawn], clean.images[~drawn]) and torch.equal(found.labels, clean.labels)
    assert (found.images[drawn] != clean.images[drawn]).flatten(1).any(1).all()
    assert torch.equal(clean.images, kept[0]) and torch.equal(clean.labels, kept[1])
    assert (found.attack, found.num_classes, found.seed) == (name, 4, 2)
    assert type(config)(**found.parameters) == config


def check_seeds(attack, config):
    """Equal seeds give equal sets, others do not, and the global generator stays."""
    before = torch.get_rng_state()
    a, b, c = (attack.poison(noise(), config, ratio=1.0, seed=seed).images for seed in (4, 4, 5))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


def check_shape(attack, config, channels, height, width, classes):
    """Every image of another shape moves by the whole radius."""
    clean = noise(20, channels, height, width, classes)
    found = attack.poison(clean, config, ratio=1.0, seed=0)
    assert found.images.shape == clean.images.shape and found.num_classes == classes
    assert (found.images.int() - clean.images.int()).abs().amax((1, 2, 3)).tolist() == [8] * 20
