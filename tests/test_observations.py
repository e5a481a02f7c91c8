"""Observations against plain loops, on tiny networks; and their plots."""
import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models import VisionTransformer

from data.preact_resnet import new_model
from defense.observations import (
    correlation,
    coverage,
    joined,
    trigger_activation_change,
    unlearning_activeness,
    unlearning_change,
)
from defense.unlearning import UnlearningConfig
from submit.observation_plots import coverage_plot, neurons_plot, save_png, weight_change_plot
from tests.defense_doubles import nan_from

WIDTHS = (2, 2, 2, 2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 3, 8, 8, generator=seeded(1))


@pytest.fixture(scope="module")
def labels():
    return torch.tensor([0, 1, 2, 0, 1, 2])


def network():
    return new_model(3, WIDTHS, 3, seed=0)


class Tokens(nn.Module):
    """Linear layers on (B, T, F) and on (B, F)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.middle, self.head = nn.Linear(8, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.relu(self.middle(torch.relu(self.embed(x.mean(1))).mean(1))))  # rows are the tokens


def convolutions(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and "shortcut" not in name]


def test_weight_change_is_what_one_step_of_ascent_moves(images, labels):
    model = network()
    config = UnlearningConfig(rate=0.01, epochs=1)
    before = copy.deepcopy(model.state_dict())
    found = unlearning_change(model, images, labels, config, generator=seeded())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ours = copy.deepcopy(model).train()
    cross_entropy(ours(images), labels).backward()  # one batch, whatever its order
    for name in convolutions(model):
        gradient = ours.get_parameter(f"{name}.weight").grad
        by_hand = [sum(abs(0.01 * float(g)) for g in row.flatten()) for row in gradient]
        assert found[f"{name}.weight"].tolist() == pytest.approx(by_hand, rel=1e-3, abs=1e-6)
    assert set(found) == {f"{name}.weight" for name in convolutions(model)}


def test_activeness_is_the_mean_over_batches_of_summed_gradients(images, labels):
    model, same = network(), images[:1].expand(4, -1, -1, -1)
    config = UnlearningConfig(rate=0.01, momentum=0.0, batch=2, statistics="running")
    found = unlearning_activeness(model, same, labels[:1].expand(4), config, generator=seeded())
    ours, by_hand = copy.deepcopy(model).eval(), 0  # equal images: the order drawn does not matter
    for _ in range(2):
        ours.zero_grad()
        cross_entropy(ours(same[:2]), labels[:1].expand(2)).backward()
        by_hand = by_hand + ours.layer4[1].conv2.weight.grad.abs().sum((1, 2, 3)) / 2
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter += 0.01 * parameter.grad
    torch.testing.assert_close(found["layer4.1.conv2.weight"], by_hand, rtol=1e-3, atol=1e-6)


def test_poison_unlearning_is_the_same_with_triggered_images(images, labels):
    config = UnlearningConfig(rate=0.01, epochs=2)
    target = torch.zeros(6, dtype=torch.int64)
    clean = unlearning_change(network(), images, labels, config, generator=seeded())
    poison = unlearning_change(network(), images + 1, target, config, generator=seeded())
    again = unlearning_change(network(), images + 1, target, config, generator=seeded())
    assert torch.equal(joined(poison), joined(again)) and not torch.equal(joined(clean), joined(poison))
    assert -1 <= correlation(joined(clean), joined(poison)) <= 1


@pytest.mark.parametrize("layer", ["conv1", "layer2.0.conv2", "layer4.1.conv2"])
def test_activation_change_is_what_a_loop_over_images_finds(images, layer):
    model = network().train()
    found = trigger_activation_change(model, images, images + 0.5)
    assert model.training
    ours, seen = copy.deepcopy(model).eval(), []
    ours.get_submodule(layer).register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    totals = np.zeros(WIDTHS[0])
    with torch.no_grad():
        for image in images:
            for x in (image, image + 0.5):
                ours(x[None])
            for k in range(len(totals)):
                totals[k] += sum(abs(float(v)) for v in (seen[-1][k] - seen[-2][k]).flatten())
    assert found[f"{layer}.weight"].tolist() == pytest.approx((totals / 6).tolist(), rel=1e-4)
    assert not any(module._forward_hooks for module in model.modules())


def test_tokens_are_the_places_of_a_linear_layer(images):
    model, changed = Tokens(), images.flip(0)
    found = trigger_activation_change(model, images, changed)
    with torch.no_grad():
        outputs = [model.embed(x.mean(1)) for x in (images, changed)]  # (B, T, 4)
    expected = (outputs[0] - outputs[1]).abs().sum((0, 1)) / len(images)
    torch.testing.assert_close(found["embed.weight"], expected)
    assert found["middle.weight"].shape == (5,) and "head.weight" not in found


def test_a_transformer_is_compared_by_the_layers_that_have_outputs(images, labels):
    model = VisionTransformer(image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=4, mlp_dim=8,
                              num_classes=3)
    tac = trigger_activation_change(model, images, images + 1)
    change = unlearning_change(model, images, labels, UnlearningConfig(epochs=1), generator=seeded())
    left_out = [name for name in change if name not in tac]
    assert left_out and all("self_attention" in name for name in left_out) and set(tac) < set(change)
    by_hand = [value for name in tac for value in change[name].tolist()]
    assert joined(change, tac).tolist() == by_hand and len(joined(tac)) == len(by_hand)


def test_the_trigger_that_changes_nothing_changes_no_neuron(images):
    assert joined(trigger_activation_change(network(), images, images)).eq(0).all()


def test_correlation_agrees_with_numpy():
    one, other = torch.rand(20, generator=seeded(2)), torch.randn(20, generator=seeded(3))
    assert correlation(one, other) == pytest.approx(np.corrcoef(one, other)[0, 1], abs=1e-6)
    assert correlation(one, -2 * one + 1) == pytest.approx(-1)


def test_coverage_by_hand_with_ties():
    scores, tac = torch.tensor([5.0, 5, 1, 0, 3]), torch.tensor([0.0, 9, 8, 7, 6])
    found = coverage(scores, tac, [0.2, 0.4, 0.6, 1.0])
    assert found.tolist() == pytest.approx([0.0, 0.5, 1 / 3, 1.0])  # tops {0} {1}; {0,1} {1,2}; {0,1,4} {1,2,3}


@pytest.mark.parametrize(("call", "message"), [
    (lambda x: trigger_activation_change(network(), x, x[:2]), "images, triggered: expected as many of both"),
    (lambda x: trigger_activation_change(network(), x[:0], x[:0]), "images, triggered: expected as many of both"),
    (lambda x: correlation(torch.ones(3), torch.rand(3)), "correlation: expected values that differ, found equal ones"),
    (lambda x: correlation(torch.ones(3), torch.ones(2)), r"correlation: expected two of \(M,\)"),
    (lambda x: coverage(torch.ones(3), torch.ones(3), [0.0]), r"shares: expected in \(0, 1\], found 0.0"),
    (lambda x: coverage(torch.ones(3), torch.ones(2), [0.5]), r"scores, tac: expected \(M,\) each"),
    (lambda x: unlearning_change(network(), x, torch.full((6,), 7), UnlearningConfig(), generator=seeded()), "labels"),
    (lambda x: unlearning_change(network(), x, torch.zeros(6, dtype=torch.int64), UnlearningConfig(),
                                 generator=seeded(), augment=nan_from(1)), "unlearning: expected a finite epoch"),
    (lambda x: unlearning_activeness(network(), x, torch.zeros(6, dtype=torch.int64), UnlearningConfig(),
                                     generator=seeded(), augment=nan_from(1)), "unlearning: expected a finite epoch"),
])
def test_what_cannot_be_observed_is_named(images, refuses, call, message):
    with refuses(message):
        call(images)


def test_every_observation_has_a_plot(tmp_path, images, labels):
    config = UnlearningConfig(rate=0.01, epochs=1)
    clean = unlearning_change(network(), images, labels, config, generator=seeded())
    tac = trigger_activation_change(network(), images, images + 1)
    shares = [0.1, 0.5, 1.0]
    figures = {"change": weight_change_plot(clean, tac), "tac": neurons_plot(tac, "TAC"),
               "coverage": coverage_plot({"NWC": coverage(joined(clean), joined(tac), shares)}, shares)}
    for name, figure in figures.items():
        save_png(figure, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.size == (605, 440) and len(set(np.asarray(picture.convert("L")).ravel())) > 5
    drawn = figures["change"].axes[0].collections[0].get_offsets()
    assert len(drawn) == len(joined(clean)) and np.allclose(drawn[:, 0], joined(clean))
    assert [bar.get_height() for bar in figures["tac"].axes[0].patches] == pytest.approx(
        [float(v) for part in tac.values() for v in part.sort(descending=True).values])
    assert list(figures["coverage"].axes[0].lines[0].get_ydata())[-1] == 1.0
