"""Each baseline against a plain rewriting of what it says; what all of them owe is asked of all."""
import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from data.preact_resnet import new_model
from defense import fine_tuning
from defense.baseline import Repaired, clean_accuracy, run_baseline
from defense.deadline import Deadline
from defense.fine_tuning import FineTuningConfig
from defense.training import Shift, epoch_batches

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()  # rounding would grow by steps
LABELS = torch.arange(12) % 3
SHORT = FineTuningConfig(batch=6, epochs=3)
DEFENSES = {"fine_tuning": (fine_tuning, SHORT)}
TUNING = ["fine_tuning"]  # those whose last stage changes the model by steps


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


def defended(name, model=None, config=None, seed=0, images=IMAGES, labels=LABELS, **more):
    module, short = DEFENSES[name]
    return module.defend(a_model() if model is None else model, images, labels, config or short,
                         generator=drawn(seed), **more)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def assert_close(a, b):
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


def is_finite(model):
    return all(t.isfinite().all() for t in model.state_dict().values() if t.is_floating_point())


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


class Descent:
    """SGD with momentum and decay, written out."""

    def __init__(self, model, momentum=0.9, decay=5e-4):
        self.parameters, self.momentum, self.decay = list(model.parameters()), momentum, decay
        self.speed = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, gradients, rate):
        for i, (p, g) in enumerate(zip(self.parameters, gradients, strict=True)):
            self.speed[i] = self.momentum * self.speed[i] + g + self.decay * p
            p -= rate * self.speed[i]


# --- what every baseline owes ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", DEFENSES)
def test_the_given_model_stays_and_seeds_decide(name):
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
    record = found.record()
    assert record["clean_accuracy"] == clean_accuracy(before, IMAGES.float(), LABELS)
    assert record["clean_accuracy_repaired"] == clean_accuracy(found.model, IMAGES.float(), LABELS)


@pytest.mark.parametrize("name", TUNING)
def test_another_seed_gives_another_model(name):
    assert not same(defended(name).model, defended(name, seed=1).model)


@pytest.mark.parametrize("name", DEFENSES)
def test_half_precision_and_a_missing_class_work(name):
    images, labels = IMAGES.half()[:8], LABELS[:8] % 2
    half = defended(name, a_model().half(), images=images, labels=labels)
    whole = defended(name, a_model().half().float(), images=images.float(), labels=labels)
    assert half.model.conv1.weight.dtype == torch.float16 and half.details["missing_classes"] == [2]
    assert same(half.model, whole.model.half())  # the work is done in float32


@pytest.mark.parametrize("name", TUNING)
def test_a_nan_from_the_start_leaves_the_model_unrepaired(name):
    model = a_model()
    found = defended(name, model, augment=nan_from(1))
    assert found.failed.startswith("no finite epoch of") and same(found.model, model)
    assert not found.finite and not found.complete


@pytest.mark.parametrize("name", DEFENSES)
def test_no_time_leaves_the_model_unrepaired(name):
    model = a_model()
    found = defended(name, model, deadline=Deadline(1.0, clock=Clock(2.0)))
    assert found.failed.startswith("no time to") and same(found.model, model) and not found.complete


@pytest.mark.parametrize("name", DEFENSES)
def test_wrong_labels_are_named(name, refuses):
    with refuses(r"labels: expected in \[0, 3\), as the model has classes, found 1 to 3"):
        defended(name, labels=LABELS + 1)


def run(repair, model):
    return run_baseline("x", repair, model, IMAGES.to(model.conv1.weight.dtype), LABELS, generator=drawn(),
                        augment=None, deadline=None)


def scaled(factor):
    def repair(given, training):
        with torch.no_grad():
            given.model.linear.weight.mul_(factor)
        return Repaired(given.model)
    return repair


def test_a_lost_model_is_not_given_back():
    model = a_model()
    truth = model(IMAGES).argmax(1)
    found = run_baseline("x", scaled(-1), model, IMAGES, truth, generator=drawn(), augment=None, deadline=None)
    assert found.details["clean_accuracy"] == 1 and same(found.model, model)
    assert found.failed == f"the repaired model is lost: accuracy {found.details['clean_accuracy_repaired']:.3f} " \
                           "on the clean images"


def test_a_model_that_its_dtype_cannot_hold_is_not_given_back():
    model = a_model().half()
    found = run(scaled(1e8), model)
    assert found.failed == "the repaired model is too large for its dtype" and same(found.model, model)
    assert run(scaled(1e8), a_model().float()).failed == ""


# --- FT --------------------------------------------------------------------------------------------------------

def tuned_by_hand(model, config, generator, after=lambda: None):
    descent, losses = Descent(model, config.momentum, config.decay), []
    model.train(config.statistics == "batch")
    for number, epoch in enumerate(batches(config.epochs, config.batch, generator)):
        rate = config.rate * 0.5 * (1 + math.cos(math.pi * number / (config.horizon or config.epochs)))
        losses.append(0)
        for images, labels in epoch:
            loss = cross_entropy(model(images), labels)
            descent.step(torch.autograd.grad(loss, descent.parameters), rate)
            after()
            losses[-1] += loss.item() / len(epoch)
    return losses


@pytest.mark.parametrize("config", [SHORT, FineTuningConfig(batch=12, epochs=2, horizon=5, decay=0.1, momentum=0.5),
                                    FineTuningConfig(batch=5, epochs=2, statistics="running")])
def test_fine_tuning_is_sgd_along_a_cosine(config):
    found, plain = defended("fine_tuning", config=config), a_model()
    losses = tuned_by_hand(plain, config, started())
    assert_close(found.model, plain)
    assert found.losses == pytest.approx(losses) and len(set(losses)) == len(losses)


def test_a_late_nan_keeps_the_epochs_before_it():
    found = defended("fine_tuning", augment=nan_from(5))  # two steps an epoch
    assert not found.finite and not found.complete and not found.failed and len(found.losses) == 2
    assert same(found.model, defended("fine_tuning", config=FineTuningConfig(batch=6, epochs=2, horizon=3)).model)


def test_bad_settings_of_fine_tuning_are_named(refuses):
    with refuses(r"FineTuningConfig rate, momentum, decay: expected > 0, in \[0, 1\), >= 0, found \(0.01, 1, 0.0005\)"):
        FineTuningConfig(momentum=1)
    with refuses(r"FineTuningConfig batch, epochs: expected > 1, > 0, found \(256, 0\)"):
        FineTuningConfig(epochs=0)
    with refuses(r"FineTuningConfig.horizon: expected None or >= 100 epochs, found 99"):
        FineTuningConfig(horizon=99)
    with refuses(r"FineTuningConfig.statistics: expected one of batch, running, found x"):
        FineTuningConfig(statistics="x")
