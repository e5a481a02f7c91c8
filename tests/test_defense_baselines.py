"""Each baseline against a plain rewriting of what it says; what all of them owe is asked of all."""
import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models.resnet import BasicBlock, ResNet

from data.preact_resnet import new_model
from defense import channel_lipschitz, fine_pruning, fine_tuning
from defense.baseline import Repaired, clean_accuracy, run_baseline
from defense.channel_lipschitz import ChannelLipschitzConfig, channel_bounds, norms_of_convolutions, outlying
from defense.deadline import Deadline
from defense.fine_pruning import FinePruningConfig
from defense.fine_tuning import FineTuningConfig
from defense.training import Shift, epoch_batches

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()  # rounding would grow by steps
LABELS = torch.arange(12) % 3
SHORT = FineTuningConfig(batch=6, epochs=3)
DEFENSES = {"fine_tuning": (fine_tuning, SHORT),
            "fine_pruning": (fine_pruning, FinePruningConfig(drop=0.5, at_once=1, tuning=SHORT)),
            "channel_lipschitz": (channel_lipschitz, ChannelLipschitzConfig(0.5))}
TUNING = ["fine_tuning", "fine_pruning"]  # those whose last stage changes the model by steps


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


# --- FP --------------------------------------------------------------------------------------------------------

def pruned_by_hand(model, labels, drop, at_once):
    """The positions cut, by whole forward passes of pruned copies."""
    pooled = model.avgpool(model.layer4(model.layer3(model.layer2(model.layer1(model.conv1(IMAGES)))))).flatten(1)
    order = sorted(range(pooled.shape[1]), key=lambda i: pooled[:, i].mean().item())
    mark, borne = clean_accuracy(model, IMAGES, labels), []
    for count in range(at_once, len(order), at_once):
        trial = copy.deepcopy(model)
        for i in order[:count]:
            trial.linear.weight.data[:, i] = 0
        if (mark - clean_accuracy(trial, IMAGES, labels)) / mark >= drop:
            break
        borne = order[:count]
    return borne


def a_wide_model():
    """Its logits are centred, so that it finds all classes."""
    model = new_model(3, (2, 2, 4, 16), 3, seed=1).double().eval()
    with torch.no_grad():
        model.linear.bias -= model(IMAGES).mean(0)
    return model


@pytest.mark.parametrize(("drop", "at_once"), [(0.1, 1), (0.3, 2), (0.6, 6), (1.0, 3)])
def test_fine_pruning_cuts_the_least_used_inputs_then_tunes(drop, at_once):
    model = a_wide_model()
    truth = model(IMAGES).argmax(1)
    assert len(truth.unique()) == 3
    cut = pruned_by_hand(model, truth, drop, at_once)
    found = defended("fine_pruning", model, FinePruningConfig(drop, at_once, SHORT), labels=truth)
    plain = copy.deepcopy(model)

    def again():
        plain.linear.weight.data[:, cut] = 0

    again()
    generator = started()
    descent = Descent(plain)
    plain.train()
    for number in range(3):
        for index in epoch_batches(12, 6, generator=generator):
            loss = cross_entropy(plain(IMAGES[index]), truth[index])
            descent.step(torch.autograd.grad(loss, descent.parameters), 0.01 * (1 + math.cos(math.pi * number / 3)) / 2)
            again()
    assert found.details["pruned"] == len(cut) and found.details["inputs"] == 16
    assert_close(found.model, plain)
    assert (found.model.linear.weight == 0).all(0).nonzero()[:, 0].tolist() == sorted(cut)


def test_how_much_is_cut_depends_on_the_limit():
    model = a_wide_model()
    truth = model(IMAGES).argmax(1)
    counts = [len(pruned_by_hand(model, truth, drop, 1)) for drop in (0.1, 0.3, 0.6)]
    assert 0 < counts[0] < counts[-1] < 15


def test_bad_settings_of_fine_pruning_are_named(refuses):
    with refuses(r"FinePruningConfig.drop: expected in \(0, 1\], found 0"):
        FinePruningConfig(drop=0)
    with refuses(r"FinePruningConfig.at_once: expected > 0, found 0"):
        FinePruningConfig(at_once=0)
    with refuses(r"model: expected a last linear layer of 3 outputs, for pruning its inputs, found none"):
        defended("fine_pruning", nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten()).double())
    with refuses(r"model: expected a last linear layer of 3 outputs, for pruning its inputs, found Linear\(.*"):
        defended("fine_pruning", nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Unflatten(1, (3, 2)),
                                               nn.AvgPool1d(2), nn.Flatten()).double())
    with refuses(r"model: expected logits that its last linear layer gives, found others"):
        defended("fine_pruning", nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Tanh()).double())


# --- CLP -------------------------------------------------------------------------------------------------------

def silenced_by_hand(model, deviations):
    """{(norm, channel)} with NumPy's decomposition, one kernel at a time."""
    convolutions = {"layer1.0.bn1": "conv1", "layer1.1.bn1": "layer1.0.conv2"}  # the first stage has no shortcut
    for stage in range(1, 5):
        for block in range(2):
            convolutions[f"layer{stage}.{block}.bn2"] = f"layer{stage}.{block}.conv1"
    for stage in range(2, 5):
        convolutions[f"layer{stage}.0.bn1"] = f"layer{stage - 1}.1.conv2"
        convolutions[f"layer{stage}.1.bn1"] = f"layer{stage}.0.shortcut.0"
    found, modules = set(), dict(model.named_modules())
    for norm, convolution in convolutions.items():
        kernels, layer = modules[convolution].weight.detach().numpy(), modules[norm]
        bounds = []
        for i, kernel in enumerate(kernels):
            top = np.linalg.svd(kernel.reshape(len(kernel), -1), compute_uv=False)[0]
            bounds.append(top * abs(layer.weight[i].item()) / math.sqrt(layer.running_var[i].item() + layer.eps))
        mark = np.mean(bounds) + deviations * np.std(bounds, ddof=1)
        found |= {(norm, i) for i, bound in enumerate(bounds) if bound > mark}
    return found


@pytest.mark.parametrize("deviations", [0.0, 0.7, 1.2, 9.0])
def test_channel_lipschitz_agrees_with_numpy(deviations):
    model = a_model(3)
    by_hand = silenced_by_hand(model, deviations)
    found = defended("channel_lipschitz", model, ChannelLipschitzConfig(deviations))
    plain = copy.deepcopy(model)
    for norm, i in by_hand:
        layer = plain.get_submodule(norm)
        layer.weight.data[i] = layer.bias.data[i] = 0
    assert same(found.model, plain) and found.details["pruned"] == len(by_hand) and found.details["layers"] == 16
    assert (len(by_hand) > 0) == (deviations < 9)


def test_a_mad_channel_is_the_one_silenced():
    model = new_model(3, (16, 16, 16, 16), 3, seed=0).eval()
    model.layer3[0].conv1.weight.data[5] *= 50
    model.layer3[0].bn2.bias.data += 1
    found = defended("channel_lipschitz", model, ChannelLipschitzConfig(), images=IMAGES.float()).model
    assert (found.layer3[0].bn2.weight == 0).nonzero()[:, 0].tolist() == [5]
    assert (found.layer3[0].bn2.bias == 0).nonzero()[:, 0].tolist() == [5]


def test_layers_of_a_torchvision_resnet():
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
    names = {module: name for name, module in model.named_modules()}
    pairs = {names[norm]: names[convolution] for convolution, norm in norms_of_convolutions(model)}
    expected = {"bn1": "conv1"}
    for stage in range(1, 5):
        expected |= {f"layer{stage}.0.bn{i}": f"layer{stage}.0.conv{i}" for i in (1, 2)}
        expected |= {f"layer{stage}.0.downsample.1": f"layer{stage}.0.downsample.0"} if stage > 1 else {}
    assert pairs == expected


def test_dead_and_single_channels_are_no_outliers():
    assert not outlying(torch.ones(1), 0.0).any()
    block = a_model().layer1[0]
    block.bn2.weight.data[0] = block.bn2.running_var[0] = 0
    bounds = channel_bounds(block.conv1, block.bn2)
    assert bounds[0] == 0 and bounds.isfinite().all()


def test_norms_of_another_width_are_left_alone(refuses):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(144),
                          nn.Linear(144, 3)).double()
    assert norms_of_convolutions(model) == [(model[0], model[1])]
    for without in (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 8), nn.Flatten()),
                    nn.Sequential(nn.Conv2d(3, 3, 8), nn.BatchNorm2d(3, affine=False), nn.Flatten()),
                    nn.Sequential(nn.Conv2d(3, 3, 8), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten())):
        with refuses(r"model: expected convolutions followed by batch norms with weights and statistics, found none"):
            defended("channel_lipschitz", without.double())


def test_bad_settings_of_channel_lipschitz_are_named(refuses):
    with refuses(r"ChannelLipschitzConfig.deviations: expected >= 0, found -1"):
        ChannelLipschitzConfig(-1)
