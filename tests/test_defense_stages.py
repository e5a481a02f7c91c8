"""Each stage of TSBD against a plain rewriting of what it says."""
import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock, ResNet

from data.preact_resnet import new_model
from defense.activeness_tuning import TuningConfig, activeness_aware_finetuning, uphill
from defense.deadline import Deadline
from defense.neurons import neuron_weights
from defense.training import Training, epoch_batches
from defense.unlearning import UnlearningConfig, clean_unlearning
from defense.weight_change import neuron_weight_change, weight_change
from defense.zero_reinitialisation import ReinitialisationConfig, weights_to_zero, zero_reinitialisation

IMAGES = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()  # rounding would grow by steps
LABELS = torch.arange(10) % 3


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def given(seed=0, augment=None):
    return Training(IMAGES, LABELS, drawn(seed), augment, Deadline())


def a_model(seed=0):
    return new_model(3, (2, 2, 4, 4), 3, seed=seed).double()


def a_vit():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTransformer(image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16,
                                 num_classes=3).double()


def batches(epochs, batch, seed=0):
    generator = drawn(seed)
    return [[(IMAGES[i], LABELS[i]) for i in epoch_batches(10, batch, generator=generator)] for _ in range(epochs)]


def accuracy(model):
    hits = copy.deepcopy(model).eval()(IMAGES).argmax(1) == LABELS
    return hits.double().mean().item()


def assert_same(a, b):
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


# --- clean unlearning ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_unlearning_is_gradient_ascent_with_momentum(statistics):
    config = UnlearningConfig(rate=0.02, batch=4, epochs=3, stop=0.0, statistics=statistics)
    model = a_model()
    before = copy.deepcopy(model)
    found = clean_unlearning(model, given(), 3, config)
    plain = copy.deepcopy(model).train(statistics == "batch")  # this net has nothing else that knows its mode
    speed = [torch.zeros_like(p) for p in plain.parameters()]
    losses, accuracies = [], []
    for epoch in batches(3, 4):
        losses.append(0)
        for images, labels in epoch:
            loss = cross_entropy(plain(images), labels)
            gradients = torch.autograd.grad(loss, list(plain.parameters()))
            losses[-1] += loss.item() / len(epoch)
            with torch.no_grad():
                for i, (p, g) in enumerate(zip(plain.parameters(), gradients, strict=True)):
                    speed[i] = 0.9 * speed[i] + g
                    p += 0.02 * speed[i]
        accuracies.append(accuracy(plain))
        if accuracies[-1] == 0:
            break
    assert_same(found.model, plain)
    assert_same(model, before)
    assert found.epochs.losses == pytest.approx(losses) and found.accuracies == pytest.approx(accuracies)
    assert found.epochs.losses[-1] > found.epochs.losses[0]


def test_unlearning_ends_at_chance_for_the_number_of_classes():
    model = a_model()
    while accuracy(model) < 0.6:  # learn the set first
        activeness_aware_finetuning(model, given(), TuningConfig(epochs=20, steps=0, mix=0, rate=0.05))
    found = clean_unlearning(model, given(), 3, UnlearningConfig(rate=0.01))
    assert found.reached and found.epochs.complete
    assert found.accuracies[-1] <= 1 / 3 < min(found.accuracies[:-1])
    cut = clean_unlearning(model, given(), 3, UnlearningConfig(rate=1e-9, epochs=2))
    assert not cut.reached and len(cut.accuracies) == 2


def test_unlearning_that_runs_away_keeps_its_last_finite_state():
    found = clean_unlearning(a_model(), given(), 3, UnlearningConfig(rate=1e12, batch=4, stop=0.0))
    assert not found.epochs.finite and not found.epochs.complete
    assert all(t.isfinite().all() for t in found.model.state_dict().values())


# --- neurons and their change ----------------------------------------------------------------------------------

def test_neurons_of_a_preact_resnet():
    layers = neuron_weights(new_model(10, (64, 128, 256, 512), 3, seed=0), 10)
    assert sum(len(layer) for layer in layers.values()) == 3904
    assert next(iter(layers)) == "conv1.weight" and not any("shortcut" in name or "linear" in name for name in layers)


def test_neurons_of_a_torchvision_resnet():
    layers = neuron_weights(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3), 3)
    assert sum(len(layer) for layer in layers.values()) == 64 + 2 * (64 + 128 + 256 + 512)
    assert not any("downsample" in name or "fc" in name for name in layers)


def test_neurons_of_a_vision_transformer():
    block = "encoder.layers.encoder_layer_0"
    sizes = {name: tuple(layer.shape) for name, layer in neuron_weights(a_vit(), 3).items()}
    assert sizes == {"conv_proj.weight": (8, 3, 4, 4), f"{block}.self_attention.in_proj_weight": (24, 8),
                     f"{block}.self_attention.out_proj.weight": (8, 8), f"{block}.mlp.0.weight": (16, 8),
                     f"{block}.mlp.3.weight": (8, 16)}
    assert list(neuron_weights(a_vit(), 3, "convolutions")) == ["conv_proj.weight"]
    assert "linear.weight" not in neuron_weights(a_model(), 3, "all")
    assert "linear.weight" in neuron_weights(a_model(), 4, "all")  # its neurons are not the classes


def test_neuron_weight_change_agrees_with_loops():
    one, other = (dict(neuron_weights(a_model(seed), 3)) for seed in (0, 1))
    found = neuron_weight_change(weight_change(one, other))
    by_hand = [sum(abs(x - y) for x, y in zip(row.flatten().tolist(), second.flatten().tolist(), strict=True))
               for name in one for row, second in zip(one[name], other[name], strict=True)]
    assert found.tolist() == pytest.approx(by_hand, rel=1e-5) and not found.requires_grad


# --- zero re-initialisation ------------------------------------------------------------------------------------

def zeroed_by_hand(change, neurons, weights, scheme):
    """{(layer, place)} by sorting lists."""
    rows = [(name, i) for name, part in change.items() for i in range(len(part))]
    every = [(name, place) for name, part in change.items() for place in range(part.numel())]
    size = {name: part[0].numel() for name, part in change.items()}
    value = {key: change[key[0]].flatten()[key[1]].item() for key in every}
    if scheme == "V2":
        return set(sorted(every, key=lambda key: -value[key])[:max(1, math.floor(neurons * weights * len(every)))])
    total = {(name, i): change[name][i].sum().item() for name, i in rows}
    chosen = set(sorted(rows, key=lambda row: -total[row])[:max(1, math.floor(neurons * len(rows)))])
    pool = [key for key in every if (key[0], key[1] // size[key[0]]) in chosen]
    share = 1 if scheme == "V1" else weights
    return set(sorted(pool, key=lambda key: -value[key])[:max(1, math.floor(share * len(pool)))])


@pytest.mark.parametrize("scheme", ["V1", "V2", "V3"])
@pytest.mark.parametrize(("neurons", "weights"), [(0.001, 0.001), (0.3, 0.7), (0.51, 0.33), (1, 1)])
def test_the_most_changed_weights_are_zeroed(scheme, neurons, weights):
    change = {"a": torch.randint(0, 9, (5, 2, 3), generator=drawn()).double(),  # with ties
              "b": torch.randint(0, 9, (4, 3), generator=drawn(1)).double()}
    masks = weights_to_zero(change, ReinitialisationConfig(neurons, weights, scheme))
    assert {name: mask.shape for name, mask in masks.items()} == {"a": (5, 2, 3), "b": (4, 3)}
    found = {(name, i) for name, mask in masks.items() for i in mask.flatten().nonzero()[:, 0].tolist()}
    assert found == zeroed_by_hand(change, neurons, weights, scheme)


def test_only_the_masked_weights_change():
    model, plain = a_model(), a_model()
    mask = torch.rand(plain.conv1.weight.shape, generator=drawn()) < 0.5
    zero_reinitialisation(model, {"conv1.weight": mask})
    assert (model.conv1.weight[mask] == 0).all() and torch.equal(model.conv1.weight[~mask], plain.conv1.weight[~mask])
    model.conv1.weight.data = plain.conv1.weight.data
    assert_same(model, plain)
    assert model.conv1.weight.requires_grad


# --- activeness-aware tuning -----------------------------------------------------------------------------------

def tuned_by_hand(model, config, epochs):
    """As the released code does it, on deep copies: gradient, gradient uphill, step; the statistics by one pass."""
    speed = [torch.zeros_like(p) for p in model.parameters()]
    for images, labels in (pair for epoch in batches(epochs, config.batch) for pair in epoch):
        model.train(config.statistics == "batch")
        first, second = copy.deepcopy(model), copy.deepcopy(model)
        here = torch.autograd.grad(cross_entropy(first(images), labels), list(first.parameters()))
        whole = math.sqrt(sum(g.square().sum().item() for g in here))
        with torch.no_grad():
            for p, g in zip(second.parameters(), here, strict=True):
                p += config.radius * g / (g.norm() if config.norm == "per_tensor" else whole)
        there = torch.autograd.grad(cross_entropy(second(images), labels), list(second.parameters()))
        model(images)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                speed[i] = config.momentum * speed[i] + (1 - config.mix) * here[i] + config.mix * there[i]
                p -= config.rate * speed[i]


@pytest.mark.parametrize("config", [
    TuningConfig(batch=4, epochs=2, steps=0), TuningConfig(batch=4, epochs=2, steps=0, norm="global"),
    TuningConfig(batch=4, epochs=2, steps=0, mix=0.0), TuningConfig(batch=4, epochs=2, steps=0, mix=1.0),
    TuningConfig(batch=10, epochs=1, steps=3, statistics="running")])
def test_tuning_agrees_with_deep_copies(config):
    found, plain = a_model(), a_model()
    epochs = activeness_aware_finetuning(found, given(), config)
    assert epochs.finite and epochs.complete and len(epochs.losses) == (3 if config.steps else 2)
    tuned_by_hand(plain, config, len(epochs.losses))
    assert_same(found, plain)
    assert int(found.layer1[0].bn1.num_batches_tracked) == (0 if config.statistics == "running" else epochs.steps)


def test_the_two_lengths_of_the_move():
    gradients = [torch.tensor([3.0, 4.0]), torch.zeros(2), torch.tensor([[12.0]])]
    each = uphill(gradients, TuningConfig(radius=2.0))
    assert [m.flatten().tolist() for m in each] == [pytest.approx([1.2, 1.6]), [0, 0], [2.0]]
    whole = uphill(gradients, TuningConfig(radius=2.0, norm="global"))
    assert [m.flatten().tolist() for m in whole] == [pytest.approx([6 / 13, 8 / 13]), [0, 0], pytest.approx([24 / 13])]
    assert all((m == 0).all() for m in uphill([torch.zeros(2)], TuningConfig(norm="global")))


def test_a_parameter_that_is_not_used_stays():
    model = a_model()
    model.extra = nn.Parameter(torch.ones(2))
    assert activeness_aware_finetuning(model, given(), TuningConfig(batch=4, epochs=1, steps=0)).finite
    assert model.extra.tolist() == [1, 1]


def test_tuning_that_runs_away_keeps_its_last_finite_state():
    model = a_model()
    found = activeness_aware_finetuning(model, given(), TuningConfig(rate=1e30, batch=4))
    assert not found.finite
    assert all(t.isfinite().all() for t in model.state_dict().values())


def test_small_sets_get_as_many_steps():
    config = TuningConfig(batch=256, epochs=20, steps=200)
    assert [config.epochs_of(n) for n in (10, 256, 257, 2560, 5000)] == [200, 200, 100, 20, 20]
    assert [config.steps_of(n) for n in (10, 257, 5000)] == [200, 200, 400]


@pytest.mark.parametrize("make", [a_vit, lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU(),
                                                               nn.Linear(4, 3)).double()])
def test_nets_without_batch_norm(make):
    model = make()
    layers = neuron_weights(model, 3)
    found = clean_unlearning(model, given(), 3, UnlearningConfig(rate=1e-3, epochs=2, stop=0.0))
    change = weight_change(layers, dict(found.model.named_parameters()))
    masks = weights_to_zero(change, ReinitialisationConfig(0.5, 0.5))
    zero_reinitialisation(model, masks)
    assert all((layers[name][mask] == 0).all() for name, mask in masks.items()) and any(m.any() for m in masks.values())
    first = cross_entropy(model(IMAGES), LABELS).item()
    found = activeness_aware_finetuning(model, given(), TuningConfig(steps=30, epochs=1))
    assert found.finite and found.losses[-1] < first


def test_bad_settings_are_named(refuses):
    with refuses(r"UnlearningConfig rate, momentum: expected > 0, in \[0, 1\), found \(0, 0.9\)"):
        UnlearningConfig(rate=0)
    with refuses(r"UnlearningConfig batch, epochs: expected > 1, > 0, found \(1, 1000\)"):
        UnlearningConfig(batch=1)
    with refuses(r"UnlearningConfig.stop: expected None or in \[0, 1\), found 1"):
        UnlearningConfig(stop=1)
    with refuses(r"UnlearningConfig.statistics: expected one of batch, running, found none"):
        UnlearningConfig(statistics="none")
    with refuses(r"TuningConfig rate, momentum: expected > 0, in \[0, 1\), found \(0.01, 1\)"):
        TuningConfig(momentum=1)
    with refuses(r"TuningConfig.batch: expected > 1, found 1"):
        TuningConfig(batch=1)
    with refuses(r"TuningConfig epochs, steps: expected > 0, >= 0, found \(0, 200\)"):
        TuningConfig(epochs=0)
    with refuses(r"TuningConfig radius, mix: expected > 0, in \[0, 1\], found \(0.05, 2\)"):
        TuningConfig(mix=2)
    with refuses(r"TuningConfig.norm: expected one of per_tensor, global, found layer"):
        TuningConfig(norm="layer")
    with refuses(r"TuningConfig.statistics: expected one of batch, running, found x"):
        TuningConfig(statistics="x")
    with refuses(r"ReinitialisationConfig.neurons: expected in \(0, 1\], found 0"):
        ReinitialisationConfig(neurons=0)
    with refuses(r"ReinitialisationConfig.weights: expected in \(0, 1\], found 1.5"):
        ReinitialisationConfig(weights=1.5)
    with refuses(r"ReinitialisationConfig.scheme: expected one of V1, V2, V3, found V4"):
        ReinitialisationConfig(scheme="V4")
    with refuses(r"kinds: expected one of auto, convolutions, all, found linear"):
        neuron_weights(a_model(), 3, "linear")
    for kinds in ("auto", "convolutions"):
        with refuses(r"model: expected convolutions other than shortcuts and the last layer, found none"):
            neuron_weights(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), 3, kinds)
    with refuses(r"model: expected layers other than shortcuts and the last one, found none"):
        neuron_weights(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), 3, "all")
