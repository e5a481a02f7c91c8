"""What the tests of the defenses share: a small model and its images, an augmentation that spoils images, and a clock
that moves when looked at."""
import copy

import torch
from torch import nn

from data.preact_resnet import new_model
from defense.baseline import clean_accuracy
from defense.defenses import DEFENSES
from defense.training import Shift, epoch_batches

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()  # rounding would grow by steps
LABELS = torch.arange(12) % 3


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def a_model(seed=0):
    """Its batch norms are not as they start, so that each channel weighs differently."""
    model = new_model(3, (2, 2, 4, 4), 3, seed=seed).double().eval()
    generator = drawn(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)
    return model


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def assert_close(a, b):
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


def is_finite(model):
    return all(t.isfinite().all() for t in model.state_dict().values() if t.is_floating_point())


def defended_by(settings):
    """A function that runs a defense by its name, with its `settings` unless a config is given."""
    def defended(name, model=None, config=None, seed=0, images=IMAGES, labels=LABELS, **more):
        return DEFENSES[name][0].defend(a_model() if model is None else model, images, labels,
                                        config or settings[name], generator=drawn(seed), **more)

    return defended


def assert_model_stays_and_seeds_decide(name, defended):
    """What every defense owes: nothing of the caller's changes, equal seeds give equal models, the record is true."""
    model = a_model().float()
    frozen = next(model.parameters()).requires_grad_(False)
    model.layer1.train()
    before, generators = copy.deepcopy(model), torch.get_rng_state()
    with torch.no_grad():
        found = defended(name, model, augment=Shift(1))
    again = defended(name, model, augment=Shift(1))
    assert same(model, before) and torch.equal(torch.get_rng_state(), generators) and not frozen.requires_grad
    assert found.method == name and found.finite and found.complete and not found.failed
    assert same(found.model, again.model) and found.losses == again.losses
    assert is_finite(found.model) and not same(found.model, before)
    assert not next(found.model.parameters()).requires_grad and found.model.layer1.training
    assert not found.model.training and not found.model.layer2.training
    assert not any(module._forward_hooks for net in (model, found.model) for module in net.modules())
    record = found.record()
    assert record["clean_accuracy"] == clean_accuracy(before, IMAGES.float(), LABELS)
    assert record["clean_accuracy_repaired"] == clean_accuracy(found.model, IMAGES.float(), LABELS)


def batches(epochs, batch, generator):
    """Per epoch, the batches that a run with this generator trains on, drawn one epoch at a time."""
    for _ in range(epochs):
        yield [(IMAGES[i], LABELS[i]) for i in epoch_batches(len(IMAGES), batch, generator=generator)]


def started(seed=0):
    """The generator after what `run_baseline` draws before the method begins."""
    generator = drawn(seed)
    torch.randint(1 << 31, (), generator=generator)
    return generator


def nan_from(call):
    """An augmentation whose calls from the given one on spoil the images."""
    calls = []

    def spoil(images, generator):
        calls.append(1)
        return images * float("nan") if len(calls) >= call else images

    return spoil


class Clock:
    """Each look at it takes `step` seconds."""

    def __init__(self, step):
        self.seconds, self.step = 0.0, step

    def __call__(self):
        self.seconds += self.step
        return self.seconds
