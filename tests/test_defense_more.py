"""The later defenses, each against a plain rewriting of what it says; what all of them owe is asked of all."""
import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torchvision.models import VisionTransformer

from data.preact_resnet import new_model
from defense.adversarial_pruning import AdversarialPruningConfig, learn_masks, prune
from defense.baseline import clean_accuracy
from defense.change_pruning import ChangePruningConfig, change_order
from defense.deadline import Deadline
from defense.defenses import DEFENSES, ORACLES, defense_config
from defense.feature_map_pruning import FeatureMapPruningConfig, least_accurate
from defense.fine_pruning import FinePruningConfig
from defense.fine_tuning import FineTuningConfig
from defense.implicit_unlearning import ImplicitUnlearningConfig, hypergradient
from defense.metrics import accuracy, attack_success
from defense.oracle_pruning import OraclePruningConfig, OracleTest, best_threshold
from defense.reconstructive_pruning import ReconstructivePruningConfig
from defense.shared_unlearning import (
    SharedUnlearningConfig,
    jensen_shannon,
    perturbation_loss,
    shared_perturbation,
    shared_risk,
)
from defense.training import Training, epoch_batches, predicted_classes
from defense.unlearning import UnlearningConfig
from tests.defense_doubles import (
    IMAGES,
    LABELS,
    Clock,
    a_model,
    assert_close,
    assert_model_stays_and_seeds_decide,
    defended_by,
    drawn,
    is_finite,
    nan_from,
    same,
    started,
)

JUDGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(5)).double()
FORGET = UnlearningConfig(rate=0.01, batch=6, epochs=3, stop=0.0, decay=0.1, drops=(1, 2))
QUICK = {"i-bau": ImplicitUnlearningConfig(rounds=1, batch=6, climb=1.0, rate=0.01, iterations=2),
         "rnp": ReconstructivePruningConfig(unlearning=FORGET, rate=5.0, batch=6, epochs=3, threshold=0.9),
         "sau": SharedUnlearningConfig(rounds=2, batch=6, rate=0.01, steps=2),
         "nwc-fp": ChangePruningConfig(FORGET, FinePruningConfig(drop=0.5, at_once=1, tuning=FineTuningConfig(
             batch=6, epochs=3))),
         "fmp": FeatureMapPruningConfig(images=4, tuning=FineTuningConfig(batch=6, epochs=3))}
# What outlasts any deadline.
SLOW = {"i-bau": {"rounds": 10**6, "batch": 6},
        "rnp": {"unlearning": {"batch": 6, "stop": 0.0}, "epochs": 10**6, "batch": 6},
        "sau": {"rounds": 10**6, "batch": 6, "steps": 1},
        "nwc-fp": {"unlearning": {"batch": 6, "stop": 0.0}, "pruning": {"tuning": {"epochs": 10**6, "batch": 6}}},
        "fmp": {"images": 4, "tuning": {"epochs": 10**6, "batch": 6}}}


defended = defended_by(QUICK)


def a_transformer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16,
                                  num_classes=3).double().eval()
        nn.init.normal_(model.heads.head.weight)  # zero at first
    return model


# --- what every defense owes -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", QUICK)
def test_the_given_model_stays_and_seeds_decide(name):
    assert_model_stays_and_seeds_decide(name, defended)


@pytest.mark.parametrize("name", QUICK)
def test_half_precision_and_a_missing_class_work(name):
    images, labels = IMAGES.half()[:8], LABELS[:8] % 2
    half = defended(name, a_model().half(), images=images, labels=labels)
    whole = defended(name, a_model().half().float(), images=images.float(), labels=labels)
    assert half.model.conv1.weight.dtype == torch.float16 and half.details["missing_classes"] == [2]
    assert half.failed == whole.failed and same(half.model, whole.model.half())  # the work is done in float32


@pytest.mark.parametrize("name", QUICK)
def test_no_number_and_no_time_leave_the_model_unrepaired(name):
    model = a_model()
    found = defended(name, model, augment=nan_from(1))
    assert found.failed.startswith("no finite epoch of") and same(found.model, model) and not found.finite
    late = defended(name, model, deadline=Deadline(1.0, clock=Clock(2.0)))
    assert late.failed.startswith("no time to") and same(late.model, model) and not late.complete and late.finite


@pytest.mark.parametrize("name", QUICK)
def test_the_deadline_is_kept(name):
    clock = Clock(0.0)

    def slow(images, generator):
        clock.seconds += 1
        return images

    found = defended(name, config=defense_config(name, SLOW[name], "x"), augment=slow,
                     deadline=Deadline(12.0, clock=clock))
    assert not found.complete and found.finite and not found.failed and is_finite(found.model) and found.losses
    assert 5 <= found.seconds == clock.seconds <= 12


@pytest.mark.parametrize(("name", "limit"), [("rnp", 6.0), ("nwc-fp", 10.0)])  # 3 seconds to unlearn
def test_unlearning_cut_within_its_first_epoch_has_no_accuracy(name, limit):
    clock = Clock(0.0)

    def slow(images, generator):
        clock.seconds += 1
        return images

    config = replace(QUICK[name], unlearning=replace(FORGET, batch=2))  # six steps an epoch
    found = defended(name, config=config, augment=slow, deadline=Deadline(limit, clock=clock))
    assert found.details["unlearned_accuracy"] is None and found.losses and not found.complete


@pytest.mark.parametrize("name", QUICK)
def test_a_model_without_batch_norm(name):
    model = a_transformer()
    found = defended(name, model)
    assert found.finite and found.complete and not found.failed and not same(found.model, model)


@pytest.mark.parametrize("name", QUICK)
def test_wrong_labels_are_named(name, refuses):
    with refuses(r"labels: expected in \[0, 3\), as the model has classes, found 1 to 3"):
        defended(name, labels=LABELS + 1)


def test_every_defense_has_its_name_and_defaults():
    assert list(DEFENSES)[7:] == ["i-bau", "rnp", "sau", "nwc-fp", "fmp", "anp-oracle"] and {"anp-oracle"} == ORACLES
    for name in list(DEFENSES)[7:]:
        assert defense_config(name, {}, "x") == DEFENSES[name][1]()


class Adam:
    """Written out; the rate may differ from step to step."""

    def __init__(self, parameters, rate):
        self.parameters, self.rate, self.steps = list(parameters), rate, 0
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, gradients):
        self.steps += 1
        for i, (p, g) in enumerate(zip(self.parameters, gradients, strict=True)):
            self.means[i] = 0.9 * self.means[i] + 0.1 * g
            self.squares[i] = 0.999 * self.squares[i] + 0.001 * g * g
            mean, square = self.means[i] / (1 - 0.9**self.steps), self.squares[i] / (1 - 0.999**self.steps)
            p -= self.rate * mean / (square.sqrt() + 1e-8)


# --- i-BAU -----------------------------------------------------------------------------------------------------

def test_the_hypergradient_of_quadratics_is_that_of_the_solution():
    """inner = d'Ad / 2 - d'Bw is least at d(w) = inverse(A) Bw; outer(d(w), w) is then a plain function of w."""
    root, b, c = (torch.randn(3, 3, generator=drawn(i), dtype=torch.float64) for i in range(3))
    a = root @ root.T + torch.eye(3)
    w = torch.randn(3, generator=drawn(3), dtype=torch.float64).requires_grad_()

    def outer(d):
        return (c @ d - w).square().sum() + (d * w).sum()

    (explicit,) = torch.autograd.grad(outer(torch.linalg.solve(a, b @ w)), w)
    solution = torch.linalg.solve(a, b @ w).detach()
    loss, (found,) = hypergradient(outer, lambda d: d @ a @ d / 2 - d @ (b @ w), solution, [w], rate=0.1,
                                   iterations=2000)
    torch.testing.assert_close(found, explicit)
    assert loss == outer(solution) and not loss.requires_grad
    _, (one,) = hypergradient(outer, lambda d: d @ a @ d / 2 - d @ (b @ w), solution, [w], rate=0.1, iterations=1)
    g, direct = torch.autograd.grad(outer(solution.requires_grad_()), [solution, w])
    torch.testing.assert_close(one, direct + 0.1 * b.T @ g)  # the step moves by 0.1 Bw


def test_what_is_not_used_has_no_hypergradient():
    d, w, idle = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    _, (found, none) = hypergradient(lambda d: (d * w).sum(), lambda d: d @ d, d, [w, idle], rate=0.1, iterations=3)
    assert none is None and found.tolist() == [1, 1]
    _, (found,) = hypergradient(lambda d: w.sum(), lambda d: d @ d - d @ w, d, [w], rate=0.1, iterations=3)
    assert found.tolist() == [1, 1]  # the outer loss does not see the perturbation


def a_smooth_model():
    """Small enough for whole matrices of derivatives, its curvature nowhere zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(3, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(),
                              nn.Linear(3, 3)).double().eval()
    model[2].running_mean += 0.1
    return model


def implicit_by_hand(model, config, generator):
    """With the whole matrices of derivatives: of the step, in the perturbation and in every weight."""
    adam, losses, first = Adam(model.parameters(), config.rate), [], None
    names = [name for name, _ in model.named_parameters()]
    for _ in range(config.rounds):
        losses.append(0)
        epoch = epoch_batches(12, config.batch, generator=generator)
        for number, index in enumerate(epoch):
            images, labels = IMAGES[index], LABELS[index]
            if number == 0:
                delta = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
                for part in epoch_batches(12, config.batch, generator=generator):
                    delta.requires_grad_()
                    loss = cross_entropy(model(IMAGES[part] + delta), model(IMAGES[part]).argmax(1))
                    (slope,) = torch.autograd.grad(config.penalty * delta.pow(2).sum() - loss, delta)
                    delta = (delta - config.climb * slope).detach()
            first = first or (images, labels)
            carried = torch.randperm(len(images), generator=generator)[:max(1, int(config.share * len(images)))]

            def outer(d, *weights, images=images, labels=labels, carried=carried):
                patched = images.clone()
                patched[carried] += d
                state = dict(zip(names, weights, strict=True))
                return cross_entropy(functional_call(model, state, (patched,)), labels)

            def slope_at(d, *weights, first=first):
                state = dict(zip(names, weights, strict=True))
                loss = cross_entropy(functional_call(model, state, (first[0] + d,)), first[1])
                return torch.autograd.grad(config.penalty * d.pow(2).sum() - loss, d, create_graph=True)[0]

            weights = tuple(p.detach().clone().requires_grad_() for p in model.parameters())
            d = delta.clone().requires_grad_()
            loss = outer(d, *weights)
            g, *direct = torch.autograd.grad(loss, [d, *weights])
            curvature, *mixed = jacobian(slope_at, (d, *weights))
            step = torch.eye(d.numel()) - config.inner_rate * curvature.reshape(d.numel(), d.numel())
            v = sum(torch.matrix_power(step.T, k) @ g.flatten() for k in range(config.iterations))
            adam.step([a - config.inner_rate * (v @ m.reshape(d.numel(), -1)).view_as(a)
                       for a, m in zip(direct, mixed, strict=True)])
            losses[-1] += loss.item() / len(epoch)
    return losses


@pytest.mark.parametrize("config", [ImplicitUnlearningConfig(rounds=2, batch=6, climb=1.0, rate=0.01),
                                    ImplicitUnlearningConfig(
    rounds=1, batch=4, rate=0.1, climb=3.0, penalty=0.1, share=0.6, iterations=2, inner_rate=0.5)])
def test_implicit_unlearning_agrees_with_whole_matrices(config):
    found, plain = defended("i-bau", a_smooth_model(), config), a_smooth_model()
    losses = implicit_by_hand(plain, config, started())
    assert_close(found.model, plain)
    assert found.losses == pytest.approx(losses)


def test_bad_settings_of_implicit_unlearning_are_named(refuses):
    for message, settings in [
            (r" rounds, batch, iterations: expected > 0, > 1, > 0, found \(5, 256, 0\)", {"iterations": 0}),
            (r" rate, climb, inner_rate: expected > 0, found \(0.0001, 0, 0.1\)", {"climb": 0}),
            (r" penalty, share: expected >= 0, in \(0, 1\], found \(0.001, 2\)", {"share": 2})]:
        with refuses("ImplicitUnlearningConfig" + message):
            ImplicitUnlearningConfig(**settings)


# --- RNP -------------------------------------------------------------------------------------------------------

class MaskedNorm(nn.Module):
    """A batch norm whose weight has a mask; by the batch's statistics, or by its own."""

    def __init__(self, norm, statistics):
        super().__init__()
        self.norm, self.statistics = norm, statistics
        self.mask = nn.Parameter(torch.ones_like(norm.weight))

    def forward(self, x):
        mean, var = self.norm.running_mean, self.norm.running_var
        if self.statistics == "batch":
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        mean, scale, weight, bias = (t[:, None, None] for t in (
            mean, (var + self.norm.eps).sqrt(), self.norm.weight * self.mask, self.norm.bias))
        return (x - mean) / scale * weight + bias


def forgotten_by_hand(model, config, generator, labels=LABELS):
    """The rate falls to a tenth after each of `drops`; the weights decay while the loss rises."""
    model.train()
    parameters, speed = list(model.parameters()), [torch.zeros_like(p) for p in model.parameters()]
    for epoch in range(config.epochs):
        rate = config.rate * 0.1 ** sum(epoch >= drop for drop in config.drops)
        for index in epoch_batches(12, config.batch, generator=generator):
            gradients = torch.autograd.grad(cross_entropy(model(IMAGES[index]), labels[index]), parameters)
            for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
                speed[i] = config.momentum * speed[i] - g + config.decay * p.detach()
                p.data -= rate * speed[i]


def recovered_by_hand(model, config, generator):
    """The masks, learned on norms that carry them."""
    norms = {name: MaskedNorm(module, config.statistics) for name, module in model.named_modules()
             if isinstance(module, nn.BatchNorm2d)}
    for name, norm in norms.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, norm)
    masks, losses = [norm.mask for norm in norms.values()], []
    speed = [torch.zeros_like(mask) for mask in masks]
    for _ in range(config.epochs):
        losses.append(0)
        parts = epoch_batches(12, config.batch, generator=generator)
        for index in parts:
            loss = config.weight * cross_entropy(model(IMAGES[index]), LABELS[index])
            losses[-1] += loss.item() / len(parts)
            for i, gradient in enumerate(torch.autograd.grad(loss, masks)):
                speed[i] = config.momentum * speed[i] + gradient
                masks[i].data = (masks[i] - config.rate * speed[i]).clamp(0, 1).detach()
    return {name: norm.mask.detach() for name, norm in norms.items()}, losses


@pytest.mark.parametrize("config", [QUICK["rnp"], ReconstructivePruningConfig(
    unlearning=FORGET, rate=50.0, momentum=0.5, batch=12, epochs=2, weight=0.7, threshold=0.6, statistics="running")])
def test_what_the_unlearned_network_cannot_use_is_cut_from_the_given_one(config):
    found = defended("rnp", config=config)
    generator, unlearned, plain = started(), a_model(), a_model()
    forgotten_by_hand(unlearned, FORGET, generator)
    masks, losses = recovered_by_hand(unlearned, config, generator)
    cut = {name: mask <= config.threshold for name, mask in masks.items()}
    for name, gone in cut.items():
        plain.get_submodule(name).weight.data[gone] = 0
    count = sum(int(gone.sum()) for gone in cut.values())
    assert 0 < count < found.details["neurons"] == sum(len(mask) for mask in masks.values())
    assert found.losses == pytest.approx(losses) and found.details["pruned"] == count
    assert found.details["unlearning_epochs"] == 3 and same(found.model, plain)


def test_a_network_without_norms_has_no_masks(refuses):
    with refuses(r"model: expected batch, layer or group norms with weights, found none"):
        defended("rnp", nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double())


def test_bad_settings_of_reconstructive_pruning_are_named(refuses):
    for message, settings in [
            (r" rate, momentum, weight: expected > 0, in \[0, 1\), > 0, found \(0.2, 0.9, 0\)", {"weight": 0}),
            (r" batch, epochs: expected > 1, > 0, found \(1, 20\)", {"batch": 1}),
            (r".threshold: expected in \[0, 1\), found 1", {"threshold": 1}),
            (r".statistics: expected one of batch, running, found x", {"statistics": "x"})]:
        with refuses("ReconstructivePruningConfig" + message):
            ReconstructivePruningConfig(**settings)
    with refuses(r"UnlearningConfig decay, drops: expected >= 0, > 0, found \(0.0, \(0,\)\)"):
        UnlearningConfig(drops=(0,))


# --- SAU -------------------------------------------------------------------------------------------------------

def perturbation_loss_by_hand(logits, before, labels, wrong):
    """Image by image, class by class."""
    total, all_shared = 0, True
    for i, label in enumerate(labels.tolist()):
        p, q = (part[i].softmax(0) for part in logits)
        changed = [part[i].argmax() != then[i] for part, then in zip(logits, before, strict=True)]
        if not (all(changed) and p.argmax() == q.argmax()):
            all_shared = False
            m = (p + q) / 2
            total = total + sum(p[k] * (p[k] / m[k]).log() + q[k] * (q[k] / m[k]).log() for k in range(len(p))) / 2
        for probabilities, done in zip((p, q), changed, strict=True):
            if not done:
                total = total + wrong * probabilities[label].log() / 2
    return total / len(labels), all_shared


def test_the_loss_of_a_perturbation_agrees_with_a_loop():
    logits = tuple(torch.randn(40, 3, generator=drawn(i), dtype=torch.float64) for i in range(2))
    before = tuple(torch.randint(3, (40,), generator=drawn(i)) for i in (2, 3))
    labels = torch.arange(40) % 3
    found, shared = perturbation_loss(logits, before, labels, 0.3)
    wanted, _ = perturbation_loss_by_hand(logits, before, labels, 0.3)
    torch.testing.assert_close(found, wanted)
    assert not shared
    same_answers = (logits[0], logits[0] * 2)
    elsewhere = (logits[0].argmax(1) + 1) % 3
    found, shared = perturbation_loss(same_answers, (elsewhere, elsewhere), labels, 0.3)
    assert shared and found == 0  # all is reached: nothing counts any more


def test_the_divergence_by_hand():
    certain, even = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    half = 0.5 * math.log(1 / 0.75) + 0.25 * math.log(0.5 / 0.75) + 0.25 * math.log(0.5 / 0.25)
    assert jensen_shannon(certain, even).tolist() == pytest.approx([half, math.log(2)])
    assert jensen_shannon(even, even).tolist() == [0, 0]


def test_the_shared_risk_by_hand():
    logits = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9999, 0.0001]]).log().requires_grad_()
    risk = shared_risk(logits, torch.tensor([1, 0, 1]), torch.tensor([True, False, True]))
    assert risk.item() == pytest.approx(-(math.log(0.2) + math.log(0.999)) / 3, rel=1e-4)
    risk.backward()
    assert (logits.grad[0] != 0).all() and (logits.grad[1:] == 0).all()  # not misled; too unlikely to matter


def shared_by_hand(model, config, generator):
    adam, reference, losses = Adam(model.parameters(), config.rate), copy.deepcopy(model), []
    extent = torch.stack([IMAGES[:, c].max() - IMAGES[:, c].min() for c in range(3)])[:, None, None]
    for _ in range(config.rounds):
        losses.append(0)
        parts = epoch_batches(12, config.batch, generator=generator)
        for index in parts:
            images, labels = IMAGES[index], LABELS[index]
            before = [net(images).argmax(1) for net in (model, reference)]
            delta = torch.ones_like(images) * config.radius * extent
            for _ in range(config.steps):
                delta.requires_grad_()
                loss, done = perturbation_loss_by_hand([net(images + delta) for net in (model, reference)], before,
                                                       labels, config.wrong)
                (slope,) = torch.autograd.grad(loss, delta)
                moved = delta.detach() / extent - config.step * slope.sign()
                delta = moved.clamp(-config.radius, config.radius) * extent
                assert not done
            loss = config.clean * cross_entropy(model(images), labels)
            answers, probabilities = reference(images + delta).argmax(1), model(images + delta).softmax(1)
            for i in range(len(images)):
                if answers[i] not in (labels[i], before[1][i]):
                    loss = loss - config.shared * (1 + 1e-6 - probabilities[i, answers[i]]).log() / len(images)
            losses[-1] += loss.item() / len(parts)
            adam.step(torch.autograd.grad(loss, list(model.parameters())))
    return losses


def a_fickle_model(seed=4):
    """Its classes change under perturbations, for many images those of the reference too."""
    model = a_model(seed)
    with torch.no_grad():
        model.linear.bias -= model(IMAGES).mean(0)
    return model


@pytest.mark.parametrize("config", [QUICK["sau"], SharedUnlearningConfig(
    rounds=1, batch=4, rate=0.05, radius=0.5, step=0.3, steps=3, wrong=0.5, clean=0.7, shared=2.0)])
def test_shared_unlearning_agrees_with_loops(config):
    found, plain = defended("sau", a_fickle_model(), config), a_fickle_model()
    losses = shared_by_hand(plain, config, started())
    assert_close(found.model, plain)
    assert found.losses == pytest.approx(losses)
    without = defended("sau", a_fickle_model(), replace(config, shared=0.0))
    assert found.losses[0] > without.losses[0]  # some answers were shared


def test_a_perturbation_keeps_to_its_radius():
    model, other = a_fickle_model(), a_fickle_model(1)
    extent = torch.tensor([1.0, 2.0, 4.0]).double()[:, None, None]
    config = SharedUnlearningConfig(radius=0.25, step=0.1, steps=4)
    delta = shared_perturbation(model, other, IMAGES, LABELS, extent, config)
    sizes = (delta / extent).abs()
    assert sizes.max() == pytest.approx(0.25) and (sizes < 0.2).any() and not delta.requires_grad


def test_bad_settings_of_shared_unlearning_are_named(refuses):
    for message, settings in [
            (r" rounds, batch, steps: expected > 0, > 1, > 0, found \(0, 256, 5\)", {"rounds": 0}),
            (r" rate, radius, step: expected > 0, found \(0.0001, 0, 0.2\)", {"radius": 0}),
            (r" wrong, clean, shared: expected >= 0, found \(0.01, 1.0, -1\)", {"shared": -1})]:
        with refuses("SharedUnlearningConfig" + message):
            SharedUnlearningConfig(**settings)


# --- NWC-FP ----------------------------------------------------------------------------------------------------

def change_pruned_by_hand(model, labels, config):
    """Positions cut, most changed first, by whole passes of pruned copies; those neurons feed the last layer."""
    unlearned = copy.deepcopy(model)
    forgotten_by_hand(unlearned, FORGET, started(), labels)
    before, after = (net.layer4[1].conv2.weight for net in (model, unlearned))
    moved = [sum(abs(a - b) for a, b in zip(before[i].flatten().tolist(), after[i].flatten().tolist(), strict=True))
             for i in range(len(before))]
    order = sorted(range(len(moved)), key=lambda i: -moved[i])
    mark, borne = clean_accuracy(model, IMAGES, labels), []
    for count in range(config.at_once, len(order), config.at_once):
        trial = copy.deepcopy(model)
        trial.linear.weight.data[:, order[:count]] = 0
        if clean_accuracy(trial, IMAGES, labels) <= (1 - config.drop) * mark:
            break
        borne = order[:count]
    return order, borne


@pytest.mark.parametrize(("drop", "at_once"), [(0.1, 1), (0.6, 2)])
def test_the_most_changed_neurons_are_cut_first(drop, at_once):
    model = new_model(3, (2, 2, 4, 16), 3, seed=1).double().eval()
    with torch.no_grad():
        model.linear.bias -= model(IMAGES).mean(0)
    truth = model(IMAGES).argmax(1)
    pruning = FinePruningConfig(drop, at_once, FineTuningConfig(batch=6, epochs=1))
    found = defended("nwc-fp", model, ChangePruningConfig(FORGET, pruning), labels=truth)
    order, cut = change_pruned_by_hand(model, truth, pruning)
    assert sorted(order) == list(range(16)) != order and 0 < len(cut) < 16
    assert found.details["pruned"] == len(cut) and found.details["inputs"] == 16 and len(found.losses) == 1
    assert (found.model.linear.weight == 0).all(0).nonzero()[:, 0].tolist() == sorted(cut)


def test_of_neurons_that_moved_alike_the_first_leads():
    before, after = nn.Linear(2, 4), nn.Linear(2, 4)
    before.weight.data = before.weight.data.round()
    after.weight.data = before.weight.data + torch.tensor([[0.0, 0], [1, -1], [0, 4], [-1, 1]])
    assert change_order(before, after, "weight").tolist() == [2, 1, 3, 0]


def test_a_last_layer_that_the_layer_before_does_not_feed_is_refused(refuses):
    model = nn.Sequential(nn.Conv2d(3, 2, 7), nn.Flatten(), nn.Linear(8, 3)).double()
    with refuses(r"model '0.weight': expected a neuron for each of the 8 inputs of the last layer, found 2"):
        defended("nwc-fp", model)


# --- ANP by an oracle ------------------------------------------------------------------------------------------

def triggered(images):
    return images + torch.linspace(-4, 4, 8, dtype=torch.float64)


def an_oracle(model, target):
    return OracleTest(JUDGES, predicted_classes(model, JUDGES), triggered, target)


PRUNING = AdversarialPruningConfig(rate=0.1, batch=6, steps=8, thresholds=(0.0, 0.3, 0.6, 0.8, 0.95), drop=0.5)


@pytest.mark.parametrize(("drop", "wanted"), [(0.6, 0.8), (0.5, None)])
def test_the_oracle_takes_the_lowest_attack_success_within_the_limit(drop, wanted):
    model, config = a_fickle_model(), replace(PRUNING, drop=drop)
    truth, hits = predicted_classes(model, JUDGES), predicted_classes(model, triggered(JUDGES))
    target = max(range(3), key=lambda k: attack_success(hits, truth, k))
    found = defended("anp-oracle", model, OraclePruningConfig(config, an_oracle(model, target)))
    masks, _ = learn_masks(a_fickle_model(), Training(IMAGES, LABELS, started(), None, Deadline()), config)
    rows = {}
    for threshold in config.thresholds:
        trial = a_fickle_model()
        prune(trial, masks, threshold)
        rows[threshold] = (accuracy(predicted_classes(trial, JUDGES), truth),
                           attack_success(predicted_classes(trial, triggered(JUDGES)), truth, target))
    given = attack_success(hits, truth, target)
    within = [(asr, t) for t, (acc, asr) in rows.items() if 1 - acc < drop and asr < given]
    assert min(within)[1] == wanted if within else wanted is None
    assert found.details["tried"] == {str(t): list(row) for t, row in rows.items()}
    assert found.details["threshold"] == wanted and found.details["oracle"].startswith("threshold chosen by")
    plain = a_fickle_model()
    count = prune(plain, masks, wanted or 0)
    assert found.details.get("pruned", 0) == count and same(found.model, plain) and bool(found.failed) == (count == 0)


def test_an_oracle_that_finds_nothing_better_has_failed():
    model = a_fickle_model()
    test = replace(an_oracle(model, 0), triggered=JUDGES)  # no trigger: ASR is zero
    found = defended("anp-oracle", model, OraclePruningConfig(PRUNING, test))
    assert found.failed == "no threshold lowers the attack's success" and same(found.model, model)
    assert found.details["threshold"] is None and "oracle" in found.details
    late = defended("anp-oracle", model, OraclePruningConfig(PRUNING, test), deadline=Deadline(1.0, clock=Clock(2.0)))
    assert late.failed == "no time to learn the masks" and "oracle" in late.details
    masks = {"layer1.0.bn1": torch.ones(2)}
    assert best_threshold(model, masks, test, PRUNING, Deadline(1.0, clock=Clock(2.0))) == (None, {})


def test_an_oracle_whose_search_time_ends_is_not_complete(monkeypatch):
    clock, judge = Clock(0.0), OracleTest.judge

    def slow(test, model):
        clock.seconds += 1
        return judge(test, model)

    monkeypatch.setattr(OracleTest, "judge", slow)
    model = a_fickle_model()
    config = OraclePruningConfig(PRUNING, an_oracle(model, 0))
    cut, whole = (defended("anp-oracle", model, config, deadline=Deadline(limit, clock=clock)) for limit in (4.0, 99.0))
    assert not cut.complete and 0 < len(cut.details["tried"]) < 5
    assert whole.complete and len(whole.details["tried"]) == 5


def test_an_oracle_without_its_images_is_refused(refuses):
    with refuses(r"OraclePruningConfig.test: expected an OracleTest, the triggered test images, found none"):
        defended("anp-oracle", config=OraclePruningConfig())
    test = an_oracle(a_model(), 0)
    with refuses(r"OracleTest.triggered: expected \(40, 3, 8, 8\) as the images, found \(4, 3, 8, 8\)"):
        replace(test, triggered=JUDGES[:4]).like(a_model())
    with refuses(r"OracleTest.labels: expected one for each of 40 images, found \(3,\)"):
        replace(test, labels=torch.arange(3)).like(a_model())
    assert test.like(a_model().float()).triggered.dtype == torch.float32


# --- FMP -------------------------------------------------------------------------------------------------------

def a_chain():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6),
                              nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)).double().eval()
    with torch.no_grad():
        model[-1].bias -= model(IMAGES).mean(0)
    return model


def accuracies_by_hand(model, layer, config, truth):
    """Map by map, channel by channel; the layer is the last of the first `layer` + 1 modules of the chain."""
    generator = started()
    index = torch.randperm(12, generator=generator)[:config.images]
    signs = torch.randint(2, IMAGES[index].shape, generator=generator) * 2 - 1
    head, found = model[:layer + 1], []
    for m in range(head[-1].out_channels):
        start = IMAGES[index].clone()
        for c in range(3):
            low, high = IMAGES[:, c].min(), IMAGES[:, c].max()
            start[:, c] = (start[:, c] + config.noise * (high - low) * signs[:, c]).clamp(low, high)
        start.requires_grad_()
        apart = nn.functional.mse_loss(head(start)[:, m], head(IMAGES[index])[:, m].detach())
        (slope,) = torch.autograd.grad(apart, start)
        moved = start.detach().clone()
        for c in range(3):
            low, high = IMAGES[:, c].min(), IMAGES[:, c].max()
            moved[:, c] = (moved[:, c] + config.step * (high - low) * slope[:, c].sign()).clamp(low, high)
        found.append((model(moved).argmax(1) == truth[index]).double().mean().item())
    return found


def test_maps_that_are_easily_turned_are_cut():
    model = a_chain()
    truth = model(IMAGES).argmax(1)
    config = FeatureMapPruningConfig(images=10, noise=0.05, step=0.15, share=0.3,
                                     tuning=FineTuningConfig(rate=1e-12, batch=12, epochs=1, statistics="running"))
    found = defended("fmp", model, config, labels=truth)
    plain = a_chain()
    for layer, count in ((0, 2), (3, 1)):  # 0.3 of 8 and of 6, rounded down
        accuracies = accuracies_by_hand(a_chain(), layer, config, truth)
        assert len(set(accuracies)) > 2
        cut = sorted(range(len(accuracies)), key=lambda m: accuracies[m])[:count]
        for m in cut:
            plain[layer].weight.data[m] = 0
            plain[layer + 1].weight.data[m] = 0
    assert_close(found.model, plain)  # tuned by next to nothing
    assert found.details["pruned"] == 3 and found.details["layers"] == 2


def test_of_maps_alike_the_first_is_cut_and_one_at_least():
    accuracies = torch.tensor([0.5, 0.25, 0.25, 1.0])
    assert least_accurate(accuracies, 1 / 64).tolist() == [1]
    assert least_accurate(accuracies, 0.75).tolist() == [1, 2, 0]


def test_layers_without_time_are_left():
    clock = Clock(0.0)
    model = a_chain()
    model[3].register_forward_pre_hook(lambda module, inputs: setattr(clock, "seconds", clock.seconds + 1.0))
    found = defended("fmp", model, replace(QUICK["fmp"], images=2), deadline=Deadline(12.0, clock=clock))
    assert found.details["layers"] == 1 and not found.complete and found.losses and found.seconds <= 12


def test_a_model_without_convolutions_has_no_maps(refuses):
    with refuses(r"model: expected convolutions, whose feature maps are pruned, found none"):
        defended("fmp", nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double())


def test_bad_settings_of_map_pruning_are_named(refuses):
    for message, settings in [(r".images: expected > 0, found 0", {"images": 0}),
                              (r" noise, step: expected > 0, found \(0, 0.0039.*\)", {"noise": 0}),
                              (r".share: expected in \(0, 1\), found 1", {"share": 1})]:
        with refuses("FeatureMapPruningConfig" + message):
            FeatureMapPruningConfig(**settings)
