import pytest
import torch
from torch import nn

from data.preact_resnet import PointConv2d, from_state_dict, new_model

NARROW = (2, 4, 4, 8)


def by_hand(state, x):
    """The network once more, written out from the organizers' description, with functional calls only."""
    f = nn.functional

    def norm(x, name):
        return f.batch_norm(x, state[f"{name}.running_mean"], state[f"{name}.running_var"],
                            state[f"{name}.weight"], state[f"{name}.bias"])

    x = f.conv2d(x, state["conv1.weight"], padding=1)
    for stage in range(1, 5):
        for block in range(2):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            h = norm(x, f"{name}.bn1").relu()
            short = f"{name}.shortcut.0.weight"
            skipped = f.conv2d(h, state[short], stride=stride) if short in state else x
            h = f.conv2d(h, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            h = norm(h, f"{name}.bn2").relu()
            x = f.conv2d(h, state[f"{name}.conv2.weight"], padding=1) + skipped
    return x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


def trained(classes=5, widths=NARROW, channels=3):
    """A network whose running statistics and norms are not the initial ones."""
    model = new_model(classes, widths, channels, seed=0).train()
    generator = torch.Generator().manual_seed(1)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        norm.bias.data.uniform_(-0.5, 0.5, generator=generator)
    with torch.no_grad():
        model(torch.rand(8, channels, 16, 16, generator=generator))
    return model.eval()


@pytest.mark.parametrize("size, channels, widths", [(32, 3, NARROW), (17, 1, (4, 4, 4, 4)), (8, 3, (8, 4, 2, 2))])
def test_it_computes_what_is_written(size, channels, widths):
    model = trained(widths=widths, channels=channels)
    x = torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(model.state_dict(), x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_point_convolution_is_a_strided_one(every):
    """Bug: of fewer than 8 channels, torch's strided one corrupted the memory of some CPUs in training."""
    layer = PointConv2d(4, 6, every)
    strided = nn.Conv2d(4, 6, 1, every, bias=False)
    strided.load_state_dict(layer.state_dict())
    x = torch.randn(3, 4, 7, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), strided(x))


def test_at_full_width_it_is_the_organizers_network():
    model = new_model(10, (64, 128, 256, 512), 3, seed=0)
    parameters = dict(model.named_parameters())
    neurons = [p.shape[0] for name, p in parameters.items() if p.ndim == 4 and "shortcut" not in name]
    assert len(parameters) == 54
    assert sum(neurons) == 3904
    assert sum(p.numel() for p in parameters.values()) == 11_171_146
    assert [name for name in parameters if "shortcut" in name] == [
        f"layer{i}.0.shortcut.0.weight" for i in (2, 3, 4)]
    assert list(parameters)[:5] == ["conv1.weight", "layer1.0.bn1.weight", "layer1.0.bn1.bias",
                                    "layer1.0.conv1.weight", "layer1.0.bn2.weight"]


def test_equal_seeds_give_equal_weights_and_the_global_state_stays():
    before = torch.get_rng_state()
    a, b, c = (new_model(5, NARROW, 3, seed=seed).conv1.weight for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("classes, widths, channels", [(5, NARROW, 3), (43, (3, 3, 7, 5), 1)])
def test_a_state_dict_gives_its_network_back(classes, widths, channels):
    model = trained(classes, widths, channels)
    before = torch.get_rng_state()
    found = from_state_dict(model.state_dict(), "model.pt")
    assert torch.equal(torch.get_rng_state(), before)
    assert not found.training and found.linear.out_features == classes
    x = torch.rand(2, channels, 16, 16)
    assert torch.equal(found(x), model(x))


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize("change, message", [
    (lambda s: without(s, "conv1.weight"), r"model\.pt: expected the key 'conv1\.weight' of a PreActResNet18"),
    (lambda s: without(s, "layer3.1.bn2.running_var"), "expected the key 'layer3.1.bn2.running_var'"),
    (lambda s: s | {"bn.weight": torch.zeros(8)}, "expected only keys of a PreActResNet18, found bn.weight"),
    (lambda s: s | {"layer2.1.conv1.weight": torch.zeros(4, 4, 1, 1)},
     r"model\.pt 'layer2\.1\.conv1\.weight': expected shape \(4, 4, 3, 3\), found \(4, 4, 1, 1\)"),
    (lambda s: s | {"linear.weight": torch.zeros(8)}, "'linear.weight': expected 2 positive dimensions"),
    (lambda s: s | {"conv1.weight": torch.zeros(2, 0, 3, 3)}, "'conv1.weight': expected 4 positive dimensions"),
    (lambda s: s | {"conv1.weight": torch.zeros(2, 3, 3, 3, dtype=torch.int64)},
     "'conv1.weight': expected dtype torch.float32, found torch.int64"),
    (lambda s: {f"module.{k}": v for k, v in s.items()}, "expected the key 'conv1.weight'"),
    (lambda s: s | {"linear.weight": torch.zeros(1, 8), "linear.bias": torch.zeros(1)}, "num_classes: expected >= 2"),
])
def test_another_architecture_is_named(refuses, change, message):
    state = dict(new_model(5, NARROW, 3, seed=0).state_dict())
    with refuses(message):
        from_state_dict(change(state), "model.pt")


def test_a_huge_declared_width_costs_no_memory(refuses):
    state = dict(new_model(5, NARROW, 3, seed=0).state_dict())
    state["layer4.0.conv1.weight"] = torch.zeros(1).expand(1 << 20, 4, 3, 3)
    with refuses("'layer4.0.bn2.weight': expected shape"):
        from_state_dict(state, "model.pt")
