"""Each baseline against a plain rewriting of what it says; what all of them owe is asked of all."""
import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, cross_entropy
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock, ResNet

from data.preact_resnet import new_model
from defense import adversarial_pruning
from defense.adversarial_pruning import AdversarialPruningConfig, choose_threshold, learn_masks, prune
from defense.attention_distillation import AttentionDistillationConfig, attention_map
from defense.baseline import Repaired, clean_accuracy, run_baseline
from defense.channel_lipschitz import ChannelLipschitzConfig, channel_bounds, norms_of_convolutions, outlying
from defense.deadline import Deadline
from defense.defenses import DEFENSES, defense_config
from defense.defenses import defend as defend_by_name
from defense.fine_pruning import FinePruningConfig
from defense.fine_tuning import FineTuningConfig
from defense.neuron_ratio import RatioConfig, split_clean
from defense.sharpness_tuning import SharpnessTuningConfig, steepest
from defense.training import Shift, Training, epoch_batches
from tests.defense_doubles import (
    IMAGES,
    LABELS,
    Clock,
    a_model,
    assert_close,
    assert_model_stays_and_seeds_decide,
    batches,
    defended_by,
    drawn,
    is_finite,
    nan_from,
    same,
    started,
)

SHORT = FineTuningConfig(batch=6, epochs=3)
QUICK = {"ft": SHORT,
         "fp": FinePruningConfig(drop=0.5, at_once=1, tuning=SHORT),
         "clp": ChannelLipschitzConfig(0.5),
         "anp": AdversarialPruningConfig(rate=0.5, batch=6, steps=6, threshold=0.6),
         "nad": AttentionDistillationConfig(teacher=SHORT, student=FineTuningConfig(
             batch=6, epochs=2, horizon=math.inf)),
         "ft-sam": SharpnessTuningConfig(batch=6, epochs=3)}
TUNING = ["ft", "fp", "nad", "ft-sam"]  # those whose last stage changes the model by steps
LEARNING = [*TUNING, "anp"]             # those that see training batches


defended = defended_by(QUICK)


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

@pytest.mark.parametrize("name", QUICK)
def test_the_given_model_stays_and_seeds_decide(name):
    assert_model_stays_and_seeds_decide(name, defended)


@pytest.mark.parametrize("name", TUNING)
def test_another_seed_gives_another_model(name):
    assert not same(defended(name).model, defended(name, seed=1).model)


@pytest.mark.parametrize("name", QUICK)
def test_half_precision_and_a_missing_class_work(name):
    images, labels = IMAGES.half()[:8], LABELS[:8] % 2
    half = defended(name, a_model().half(), images=images, labels=labels)
    whole = defended(name, a_model().half().float(), images=images.float(), labels=labels)
    assert half.model.conv1.weight.dtype == torch.float16 and half.details["missing_classes"] == [2]
    assert same(half.model, whole.model.half())  # the work is done in float32


@pytest.mark.parametrize("name", LEARNING)
def test_a_nan_from_the_start_leaves_the_model_unrepaired(name):
    model = a_model()
    found = defended(name, model, augment=nan_from(1))
    assert found.failed.startswith("no finite epoch of") and same(found.model, model)
    assert not found.finite and not found.complete


@pytest.mark.parametrize("name", QUICK)
def test_no_time_leaves_the_model_unrepaired(name):
    model = a_model()
    found = defended(name, model, deadline=Deadline(1.0, clock=Clock(2.0)))
    assert found.failed.startswith("no time to") and same(found.model, model) and not found.complete


LONG = {"ft": {"epochs": 10**6, "batch": 6}, "fp": {"tuning": {"epochs": 10**6, "batch": 6}},
        "anp": {"steps": 10**6, "batch": 6}, "ft-sam": {"epochs": 10**6, "batch": 6},
        "nad": {"teacher": {"epochs": 99, "batch": 6}, "student": {"epochs": 10**6, "batch": 6}}}


@pytest.mark.parametrize("name", LEARNING)
def test_the_deadline_is_kept(name):
    clock = Clock(0.0)

    def slow(images, generator):
        clock.seconds += 1  # each step
        return images

    found = defended(name, config=defense_config(name, LONG[name], "x"), augment=slow,
                     deadline=Deadline(40.0, clock=clock))
    assert not found.complete and found.finite and not found.failed and is_finite(found.model) and found.losses
    assert 34 <= found.seconds == clock.seconds <= 40


@pytest.mark.parametrize("name", QUICK)
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
    found, plain = defended("ft", config=config), a_model()
    losses = tuned_by_hand(plain, config, started())
    assert_close(found.model, plain)
    assert found.losses == pytest.approx(losses) and len(set(losses)) == len(losses)


def test_a_late_nan_keeps_the_epochs_before_it():
    found = defended("ft", augment=nan_from(5))  # two steps an epoch
    assert not found.finite and not found.complete and not found.failed and len(found.losses) == 2
    assert same(found.model, defended("ft", config=FineTuningConfig(batch=6, epochs=2, horizon=3)).model)


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
    found = defended("fp", model, FinePruningConfig(drop, at_once, SHORT), labels=truth)
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
        defended("fp", nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten()).double())
    with refuses(r"model: expected a last linear layer of 3 outputs, for pruning its inputs, found Linear\(.*"):
        defended("fp", nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Unflatten(1, (3, 2)),
                                               nn.AvgPool1d(2), nn.Flatten()).double())
    with refuses(r"model: expected logits that its last linear layer gives, found others"):
        defended("fp", nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Tanh()).double())


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
    found = defended("clp", model, ChannelLipschitzConfig(deviations))
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
    found = defended("clp", model, ChannelLipschitzConfig(), images=IMAGES.float()).model
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
    model = nn.Sequential(*model[:3], nn.Linear(144, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    assert norms_of_convolutions(model) == [(model[0], model[1])]  # though the second norm's width would fit
    for without in (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 8), nn.Flatten()),
                    nn.Sequential(nn.Conv2d(3, 3, 8), nn.BatchNorm2d(3, affine=False), nn.Flatten()),
                    nn.Sequential(nn.Conv2d(3, 3, 8), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten())):
        with refuses(r"model: expected convolutions followed by batch norms with weights and statistics, found none"):
            defended("clp", without.double())


def test_bad_settings_of_channel_lipschitz_are_named(refuses):
    with refuses(r"ChannelLipschitzConfig.deviations: expected >= 0, found -1"):
        ChannelLipschitzConfig(-1)


# --- ANP -------------------------------------------------------------------------------------------------------

class NoisyNorm(nn.Module):
    """A batch norm with a mask and two kinds of noise, in place of the given one."""

    def __init__(self, norm, statistics):
        super().__init__()
        self.norm, self.statistics = norm, statistics
        self.mask = nn.Parameter(torch.ones_like(norm.weight))
        self.weight_noise, self.bias_noise = (nn.Parameter(torch.zeros_like(norm.weight)) for _ in range(2))

    def forward(self, x):
        weight = self.norm.weight * (self.mask + self.weight_noise)
        bias = self.norm.bias * (1 + self.bias_noise)
        if self.statistics == "batch":
            return batch_norm(x, None, None, weight, bias, training=True, eps=self.norm.eps)
        return batch_norm(x, self.norm.running_mean, self.norm.running_var, weight, bias, eps=self.norm.eps)


def with_noisy_norms(model, statistics):
    """A copy of the model and its norms by name."""
    model, norms = copy.deepcopy(model), {}
    for name, block in model.named_modules():
        for bn in ("bn1", "bn2") if hasattr(block, "bn1") else ():
            norms[f"{name}.{bn}"] = NoisyNorm(getattr(block, bn), statistics)
            setattr(block, bn, norms[f"{name}.{bn}"])
    return model, norms


def masks_by_hand(model, config, epochs, generator, images=IMAGES, labels=LABELS):
    model, norms = with_noisy_norms(model, config.statistics)
    speed = {name: torch.zeros_like(norm.mask) for name, norm in norms.items()}
    kinds = [norm.weight_noise for norm in norms.values()], [norm.bias_noise for norm in norms.values()]
    noises = [*kinds[0], *kinds[1]]
    losses = []
    for _ in range(epochs):
        losses.append(0)
        parts = epoch_batches(len(images), config.batch, generator=generator)
        for index in parts:
            for noise in noises:
                start = torch.rand(noise.shape, generator=generator, dtype=torch.float64)
                noise.data = config.noise * (2 * start - 1)
            for _ in range(config.climbs):
                climb = torch.autograd.grad(cross_entropy(model(images[index]), labels[index]), noises)
                for noise, gradient in zip(noises, climb, strict=True):
                    noise.data += config.noise / config.climbs * gradient.sign()
            loss = (1 - config.clean) * cross_entropy(model(images[index]), labels[index])
            for noise in noises:
                noise.data = torch.zeros_like(noise)
            loss = loss + config.clean * cross_entropy(model(images[index]), labels[index])
            masks = [norm.mask for norm in norms.values()]
            losses[-1] += loss.item() / len(parts)
            for (name, norm), gradient in zip(norms.items(), torch.autograd.grad(loss, masks), strict=True):
                speed[name] = config.momentum * speed[name] + gradient
                norm.mask.data = (norm.mask - config.rate * speed[name]).clamp(0, 1).detach()
    return {name: norm.mask.detach() for name, norm in norms.items()}, losses


@pytest.mark.parametrize("config", [
    AdversarialPruningConfig(rate=0.3, batch=6, steps=5), AdversarialPruningConfig(
        rate=100.0, batch=12, steps=3, climbs=2, clean=0.7, noise=0.2, momentum=0.5, statistics="running")])
def test_masks_agree_with_norms_that_carry_noise(config):
    model = a_model()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # else some shift is undone by the next norm, and rounding is its sign
            module.bias.data -= 0.7
    before = copy.deepcopy(model)
    masks, epochs = learn_masks(model, Training(IMAGES, LABELS, drawn(), None, Deadline()), config)
    by_hand, losses = masks_by_hand(model, config, 3, drawn())
    assert same(model, before) and epochs.losses == pytest.approx(losses)
    assert list(masks) == list(by_hand) and len(set(losses)) == 3
    for name in masks:
        torch.testing.assert_close(masks[name], by_hand[name])
    everything = torch.cat(list(masks.values()))
    assert everything.min() < 0.95 and (everything == 1).any() and everything.max() == 1


def some_masks(model):
    generator = drawn(5)
    return {name: torch.rand(module.weight.shape, generator=generator) for name, module in model.named_modules()
            if isinstance(module, nn.BatchNorm2d)}


def pruned_copy(model, masks, threshold):
    ours = copy.deepcopy(model)
    for name, mask in masks.items():
        for i, value in enumerate(mask.tolist()):
            if value <= threshold:
                ours.get_submodule(name).weight.data[i] = 0
    return ours


def test_masks_at_most_the_threshold_are_cut():
    model = a_model()
    masks = some_masks(model)
    masks["layer2.0.bn1"][:] = torch.tensor([0.5, 0.25])
    expected = pruned_copy(model, masks, 0.5)
    count = prune(model, masks, 0.5)
    assert same(model, expected) and count == sum(int((mask <= 0.5).sum()) for mask in masks.values()) > 0


@pytest.mark.parametrize("drop", [0.01, 0.3, 0.5, 1.0])
def test_the_threshold_is_the_last_before_accuracy_falls(drop):
    model = a_wide_model()
    truth, masks = model(IMAGES).argmax(1), some_masks(model)
    truth[0] = (truth[0] + 1) % 3  # so that the mark is not 1
    config = AdversarialPruningConfig(drop=drop, thresholds=tuple(i / 25 for i in range(20)))
    expected, seen = None, {}
    for threshold in config.thresholds:
        seen[threshold] = clean_accuracy(pruned_copy(model, masks, threshold), IMAGES, truth)
        if (11 / 12 - seen[threshold]) / (11 / 12) >= drop:
            break
        expected = threshold
    before = copy.deepcopy(model)
    assert choose_threshold(model, masks, IMAGES, truth, config, Deadline()) == (expected, seen, True)
    assert same(model, before) and expected is not None
    assert (expected == config.thresholds[-1]) == (drop == 1.0)


def test_masks_are_learned_on_one_part_and_judged_on_the_other():
    images, labels = IMAGES.repeat(4, 1, 1, 1), LABELS.repeat(4)
    images = images + 0.1 * torch.randn(images.shape, generator=drawn(2), dtype=torch.float64)
    config = AdversarialPruningConfig(rate=0.5, batch=28, steps=4, drop=0.9)
    found = defended("anp", config=config, images=images, labels=labels)
    generator, model = started(), a_model()
    learned, judges = split_clean(labels, RatioConfig(), generator=generator)
    masks, losses = masks_by_hand(model, config, 4, generator, images[learned], labels[learned])
    assert len(judges) == 20 and found.losses == pytest.approx(losses)
    threshold, tried, _ = choose_threshold(model, masks, images[judges], labels[judges], config, Deadline())
    assert found.details["threshold"] == threshold
    assert found.details["tried"] == {str(key): value for key, value in tried.items()}
    assert same(found.model, pruned_copy(model, masks, threshold))


def test_the_threshold_that_the_paper_fixes_is_taken_without_judges():
    config = AdversarialPruningConfig(rate=2.0, batch=6, steps=6, noise=0.0)
    found = defended("anp", config=config)  # of 12 images, 6 would judge: too few
    assert found.details["threshold"] == 0.2 and found.details["tried"] == {} and found.details["pruned"] > 0
    generator = started()
    torch.randperm(len(IMAGES), generator=generator)  # drawn to part images that judge, before these are too few
    model, masks = a_model(), masks_by_hand(a_model(), config, 3, generator)[0]
    with_none = choose_threshold(model, masks, IMAGES, LABELS, config, Deadline(1.0, clock=Clock(2.0)))
    assert with_none == (0.2, {}, False) and same(found.model, pruned_copy(model, masks, 0.2))


def test_a_search_of_thresholds_that_time_ends_is_not_complete(monkeypatch):
    clock = Clock(0.0)

    def judged(net, images, labels):
        clock.seconds += 1
        return 1.0

    monkeypatch.setattr(adversarial_pruning, "clean_accuracy", judged)
    config = AdversarialPruningConfig(rate=0.5, batch=48, steps=1)
    many = {"images": IMAGES.repeat(4, 1, 1, 1), "labels": LABELS.repeat(4)}
    cut, whole = (defended("anp", config=config, deadline=Deadline(limit, clock=clock), **many)
                  for limit in (8.0, 99.0))
    assert not cut.complete and not cut.failed and 0 < len(cut.details["tried"]) < 19
    assert whole.complete and len(whole.details["tried"]) == 19


def test_a_pruning_that_costs_too_much_is_not_given_back(monkeypatch):
    monkeypatch.setattr(adversarial_pruning, "clean_accuracy", lambda net, images, labels: float(
        all((m.weight != 0).all() for m in net.modules() if isinstance(m, nn.BatchNorm2d))))
    model = a_model()
    config = AdversarialPruningConfig(rate=5.0, batch=48, steps=6, thresholds=(0.5, 0.9))
    found = defended("anp", model, config, images=IMAGES.repeat(4, 1, 1, 1), labels=LABELS.repeat(4))
    assert found.failed == "no threshold keeps the accuracy" and same(found.model, model)
    assert found.details["threshold"] is None and found.details["tried"] == {"0.5": 0.0}


def test_a_vision_transformer_has_masks_on_its_layer_norms(refuses):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16,
                                  num_classes=3).double()
        nn.init.normal_(model.heads.head.weight)  # zero at first
    config = AdversarialPruningConfig(rate=20.0, batch=6, steps=6, threshold=0.9)
    found = defended("anp", model, config)
    parts = zip(found.model.named_parameters(), model.parameters(), strict=True)
    cut = [name for (name, tensor), given in parts if not torch.equal(tensor, given)]
    assert found.details["pruned"] > 0 and cut and all("ln" in name and name.endswith("weight") for name in cut)
    with refuses(r"model: expected batch, layer or group norms with weights, found none"):
        defended("anp", nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double())


def test_bad_settings_of_adversarial_pruning_are_named(refuses):
    for message, settings in [
            (r" rate, momentum: expected > 0, in \[0, 1\), found \(0, 0.9\)", {"rate": 0}),
            (r" batch, steps: expected > 1, > 0, found \(256, 0\)", {"steps": 0}),
            (r" noise, climbs: expected >= 0, > 0, found \(-1, 1\)", {"noise": -1}),
            (r".clean: expected in \[0, 1\], found 2", {"clean": 2}),
            (r".thresholds: expected rising numbers in \[0, 1\), found \(\)", {"thresholds": ()}),
            (r".thresholds: expected rising numbers in \[0, 1\), found \(0.5, 0.1\)", {"thresholds": (0.5, 0.1)}),
            (r".threshold: expected in \[0, 1\), found 1", {"threshold": 1}),
            (r".fallback: expected in \[0, 1\), found -0.1", {"fallback": -0.1}),
            (r" drop, held_out: expected in \(0, 1\], in \(0, 1\), found \(0, 0.2\)", {"drop": 0}),
            (r".statistics: expected one of batch, running, found x", {"statistics": "x"})]:
        with refuses("AdversarialPruningConfig" + message):
            AdversarialPruningConfig(**settings)


# --- NAD -------------------------------------------------------------------------------------------------------

def maps_by_hand(model, images):
    """(logits, the maps of the third and the fourth stage), image by image, place by place."""
    third = model.layer3(model.layer2(model.layer1(model.conv1(images))))
    fourth = model.layer4(third)
    maps = []
    for features in (third, fourth):
        rows = [torch.stack([one[:, y, x] @ one[:, y, x] for y in range(one.shape[1]) for x in range(one.shape[2])])
                for one in features]
        maps.append(torch.stack([row / ((row @ row).sqrt() + 1e-6) for row in rows]))
    return model.linear(model.avgpool(fourth).flatten(1)), maps


def test_distillation_agrees_with_maps_by_hand():
    config = QUICK["nad"]
    found = defended("nad")
    generator, teacher, student = started(), a_model(), a_model()
    tuned_by_hand(teacher, SHORT, generator)
    teacher.eval()
    student.train()
    descent, losses = Descent(student), []
    for epoch in batches(2, 6, generator):
        losses.append(0)
        for images, labels in epoch:
            with torch.no_grad():
                _, theirs = maps_by_hand(teacher, images)
            logits, ours = maps_by_hand(student, images)
            apart = [(a - b).square().sum() / a.numel() for a, b in zip(ours, theirs, strict=True)]
            loss = cross_entropy(logits, labels) + 500 * apart[0] + 1000 * apart[1]
            descent.step(torch.autograd.grad(loss, descent.parameters), 0.01)
            losses[-1] += loss.item() / len(epoch)
    assert_close(found.model, student)
    assert found.losses == pytest.approx(losses) and found.details["teacher_epochs"] == 3
    plain = defended("nad", config=AttentionDistillationConfig(
        weights=(0.0, 0.0), teacher=config.teacher, student=config.student))
    assert found.losses[-1] > plain.losses[-1]


def test_the_map_of_tokens_is_that_of_places():
    features = torch.randn(2, 5, 3, 4, generator=drawn())
    tokens = features.flatten(2).transpose(1, 2)
    torch.testing.assert_close(attention_map(features), attention_map(tokens))
    torch.testing.assert_close(attention_map(features).norm(dim=1), torch.ones(2))
    assert (attention_map(torch.zeros(1, 2, 3, 3)) == 0).all()


def test_a_student_without_a_finite_epoch_leaves_the_model_unrepaired():
    model = a_model()
    found = defended("nad", model, augment=nan_from(7))  # the teacher takes six steps
    assert found.failed == "no finite epoch of tuning" and same(found.model, model)
    taught = defended("nad", model, augment=nan_from(10))  # two steps an epoch
    assert not taught.failed and not taught.finite and len(taught.losses) == 1 and is_finite(taught.model)


def test_the_hooks_are_gone_afterwards():
    model = a_model()
    found = defended("nad", model)
    assert not any(m._forward_hooks for net in (model, found.model) for m in net.modules())
    found = defended("fp", model)
    assert not any(m._forward_hooks for net in (model, found.model) for m in net.modules())


def test_bad_settings_of_distillation_are_named(refuses):
    with refuses(r"AttentionDistillationConfig.layers: expected different names, found \(\)"):
        AttentionDistillationConfig(layers=())
    with refuses(r"AttentionDistillationConfig.weights: expected 2 of them, >= 0, found \(1.0,\)"):
        AttentionDistillationConfig(weights=(1.0,))
    with refuses(r"AttentionDistillationConfig.layers: expected names of modules of the model, found stage9"):
        defended("nad", config=AttentionDistillationConfig(("stage9",), (1.0,), SHORT, SHORT))
    with refuses(r"AttentionDistillationConfig.layers: expected modules that give \(B, C, H, W\) or \(B, T, C\), "
                 r"found \(6, 3\)"):
        defended("nad", config=AttentionDistillationConfig(("linear",), (1.0,), SHORT, SHORT))
    with refuses(r"AttentionDistillationConfig.layers: expected modules .* found tuple"):
        attention_map((torch.zeros(1),))


# --- FT-SAM ----------------------------------------------------------------------------------------------------

def smoothed(logits, labels, smoothing):
    wanted = torch.full_like(logits, smoothing / (logits.shape[1] - 1))
    wanted[torch.arange(len(labels)), labels] = 1 - smoothing
    return -(wanted * logits.log_softmax(1)).sum(1).mean()


def sharpened_by_hand(model, config, generator):
    """On deep copies: gradient, gradient uphill, step; the statistics by the first pass."""
    descent, losses, taken = Descent(model, config.momentum, config.decay), [], 0
    model.train(config.statistics == "batch")
    for epoch in batches(config.epochs, config.batch, generator):
        losses.append(0)
        for images, labels in epoch:
            uphill = copy.deepcopy(model)
            loss = smoothed(model(images), labels, config.smoothing)
            here = torch.autograd.grad(loss, descent.parameters)
            sizes = [p.detach().abs() if config.adaptive else torch.ones_like(p) for p in descent.parameters]
            norm = math.sqrt(sum((s * g).square().sum().item() for s, g in zip(sizes, here, strict=True)))
            for p, s, g in zip(uphill.parameters(), sizes, here, strict=True):
                p.data += config.radius * s * s * g / norm
            there = torch.autograd.grad(smoothed(uphill(images), labels, config.smoothing), list(uphill.parameters()))
            descent.step(there, config.rate * (1 + math.cos(math.pi * taken / config.horizon)) / 2)
            taken += 1
            losses[-1] += loss.item() / len(epoch)
    return losses


@pytest.mark.parametrize("config", [
    SharpnessTuningConfig(batch=6, epochs=3, horizon=2),  # down, up and down again
    SharpnessTuningConfig(batch=6, epochs=2, horizon=math.inf, adaptive=False, radius=0.3, smoothing=0.0),
    SharpnessTuningConfig(batch=12, epochs=2, statistics="running", momentum=0.5, decay=0.1, smoothing=0.4)])
def test_sharpness_tuning_agrees_with_deep_copies(config):
    found, plain = defended("ft-sam", config=config), a_model()
    losses = sharpened_by_hand(plain, config, started())
    assert_close(found.model, plain)
    assert found.losses == pytest.approx(losses) and len(set(losses)) == len(losses)


def test_the_step_uphill_by_hand():
    weights, gradients = [torch.tensor([2.0, -1.0]), torch.tensor([0.0])], [torch.tensor([3.0, 8.0]), torch.ones(1)]
    adaptive = steepest(weights, gradients, SharpnessTuningConfig(radius=5.0))  # |w g| = |(6, 8, 0)| = 10
    assert [m.tolist() for m in adaptive] == [pytest.approx([6.0, 4.0]), [0.0]]
    plain = steepest(weights, [torch.tensor([3.0, 4.0]), torch.zeros(1)], SharpnessTuningConfig(adaptive=False))
    assert [m.tolist() for m in plain] == [pytest.approx([1.2, 1.6]), [0.0]]
    still = steepest(weights, [torch.zeros(2), torch.zeros(1)], SharpnessTuningConfig())
    assert all((m == 0).all() for m in still)


@pytest.mark.parametrize("name", ["ft", "ft-sam"])
def test_a_parameter_that_is_not_used_stays(name):
    model = a_model()
    model.extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    found = defended(name, model)
    assert found.finite and not found.failed and found.model.extra.tolist() == [1, 1]


def test_bad_settings_of_sharpness_tuning_are_named(refuses):
    for message, settings in [
            (r" rate, momentum, decay: expected > 0, in \[0, 1\), >= 0, found \(0.01, 0.9, -1\)", {"decay": -1}),
            (r" batch, epochs, horizon: expected > 1, > 0, > 0, found \(256, 100, 0\)", {"horizon": 0}),
            (r" radius, smoothing: expected > 0, in \[0, 0.5\], found \(0, 0.1\)", {"radius": 0}),
            (r".statistics: expected one of batch, running, found x", {"statistics": "x"})]:
        with refuses("SharpnessTuningConfig" + message):
            SharpnessTuningConfig(**settings)


# --- by name ---------------------------------------------------------------------------------------------------

def test_every_defense_has_its_name_and_defaults():
    assert list(DEFENSES)[:7] == ["tsbd", "ft", "fp", "clp", "anp", "nad", "ft-sam"]
    for name, (module, config) in DEFENSES.items():
        assert defense_config(name, {}, "x") == config() and callable(module.defend)


def test_tables_fill_the_configs_within():
    found = defense_config("fp", {"drop": 0.2, "tuning": {"epochs": 3, "batch": 6}}, "x")
    assert found == FinePruningConfig(drop=0.2, tuning=SHORT) == defense_config(
        "fp", {"drop": 0.2, "tuning": SHORT}, "x")
    nad = defense_config("nad", {"layers": ["layer4"], "weights": [1.0], "teacher": {"epochs": 2}}, "x")
    assert nad.layers == ("layer4",) and nad.teacher == FineTuningConfig(epochs=2, horizon=100)  # other defaults stay


@pytest.mark.parametrize("name", ["ft", "tsbd"])
def test_a_defense_is_called_by_name(name):
    tables = {"ft": {"epochs": 3, "batch": 6},
              "tsbd": {"neurons": 0.3, "tuning": {"epochs": 1, "steps": 0}, "unlearning": {"epochs": 1}}}
    found = defend_by_name(name, a_model(), IMAGES, LABELS, tables[name], generator=drawn(), augment=Shift(1))
    assert found.method == name and not found.failed
    config = defense_config(name, tables[name], "x")
    assert same(found.model, defended(name, config=config, augment=Shift(1)).model)
    late = defend_by_name(name, a_model(), IMAGES, LABELS, tables[name], generator=drawn(),
                          deadline=Deadline(1.0, clock=Clock(2.0)))
    assert late.failed.startswith("no time to")


def test_unknown_names_and_settings_are_named(refuses):
    with refuses(rf"recipe: expected one of {', '.join(DEFENSES)}, found sft"):
        defense_config("sft", {}, "recipe")
    with refuses(r"recipe clp: expected some of deviations, found u"):
        defense_config("clp", {"u": 3}, "recipe")
    with refuses(r"recipe fp tuning: expected some of rate, .*, found epoch"):
        defense_config("fp", {"tuning": {"epoch": 3}}, "recipe")
    with refuses(r"recipe fp tuning: expected a table of settings, found 3"):
        defense_config("fp", {"tuning": 3}, "recipe")
    with refuses(r"recipe clp: expected settings of the right types, found .*'str'"):
        defense_config("clp", {"deviations": "3"}, "recipe")
    with refuses(r"FineTuningConfig batch, epochs: expected > 1, > 0, found \(256, 0\)"):
        defense_config("ft", {"epochs": 0}, "recipe")
    with refuses(r"defense clp: expected some of deviations, found u"):
        defend_by_name("clp", a_model(), IMAGES, LABELS, {"u": 3}, generator=drawn())
