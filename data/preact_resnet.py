"""The PreActResNet18 of the backdoor task: the network behind every `model.pt`.

Paper: He et al., Identity Mappings in Deep Residual Networks, ECCV 2016 (arXiv:1603.05027).
Departs from it: stem without batch norm, and no norm or ReLU before the pool, so pooled features can be
negative. State-dict names are the organizers' (`layer2.0.shortcut.0.weight`).
"""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from data.errors import InputError, expect

WIDTHS = (64, 128, 256, 512)  # of the four stages; the stem has the first
BLOCKS = 2                    # a stage


class PointConv2d(nn.Conv2d):
    """A 1x1 convolution of stride `every`, without bias: of stride 1 over every so-manieth pixel, which is the same.

    Below 8 channels, oneDNN's gradient of a strided one in channels_last writes beyond its memory on CPUs with AVX2 but
    without AVX-512 (torch 2.14).
    """

    def __init__(self, before: int, width: int, every: int) -> None:
        super().__init__(before, width, 1, bias=False)
        self.every = every

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) -> (B, width, H / every, W / every), rounded up."""
        return super().forward(x[:, :, ::self.every, ::self.every])


class PreActBlock(nn.Module):
    """bn1, ReLU, conv1, bn2, ReLU, conv2, plus the input (or a 1x1 convolution of its activation)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(PointConv2d(before, width, stride))

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) -> (B, width, H / stride, W / stride)."""
        active = relu(self.bn1(x))
        skipped = self.shortcut(active) if hasattr(self, "shortcut") else x
        return self.conv2(relu(self.bn2(self.conv1(active)))) + skipped


class PreActResNet(nn.Module):
    """Four stages of two pre-activation blocks; strides 1, 2, 2, 2; average pool; one linear layer."""

    def __init__(self, num_classes: int, widths: tuple[int, ...] = WIDTHS, in_channels: int = 3) -> None:
        super().__init__()
        expect(len(widths) == 4 and min(widths) > 0, "widths", "four positive numbers", widths)
        expect(num_classes >= 2, "num_classes", ">= 2", num_classes)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        befores = (widths[0], *widths[:-1])
        for i, (before, width) in enumerate(zip(befores, widths, strict=True)):
            first = PreActBlock(before, width, stride=1 if i == 0 else 2)
            rest = [PreActBlock(width, width, stride=1) for _ in range(BLOCKS - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(first, *rest))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) normalised images -> (B, K) logits."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(self.avgpool(x).flatten(1))


def new_model(num_classes: int, widths: tuple[int, ...], in_channels: int, *, seed: int) -> PreActResNet:
    """A freshly initialised network; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
        torch.manual_seed(seed)
        return PreActResNet(num_classes, widths, in_channels)


def from_state_dict(state: Mapping[str, Tensor], where: object) -> PreActResNet:
    """The network that `state` belongs to: widths, channels and classes are read off its shapes.

    Returned on the CPU in evaluation mode. Raises InputError, naming the first key that is missing,
    unexpected or misshapen; `where` (the file) opens the message.
    """
    stem, head = _shape(state, "conv1.weight", 4, where), _shape(state, "linear.weight", 2, where)
    widths = tuple(_shape(state, f"layer{i}.0.conv1.weight", 4, where)[0] for i in range(1, 5))
    with torch.device("meta"):  # shapes only: a false declaration must not cost memory
        expected = PreActResNet(head[0], widths, stem[1]).state_dict()
    _check_keys(state, expected, where)
    with torch.random.fork_rng(devices=[]):
        model = PreActResNet(head[0], widths, stem[1])
    try:
        model.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise InputError(f"{where}: expected the weights of a PreActResNet18, found {error}") from None
    return model.eval()


def _shape(state: Mapping[str, Tensor], key: str, rank: int, where: object) -> tuple[int, ...]:
    expect(key in state, where, f"the key {key!r} of a PreActResNet18", "no such key")
    shape = tuple(state[key].shape)
    expect(len(shape) == rank and min(shape) > 0, f"{where} {key!r}", f"{rank} positive dimensions", shape)
    return shape


def _check_keys(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: object) -> None:
    for key, tensor in expected.items():
        expect(key in state, where, f"the key {key!r} of a PreActResNet18", "no such key")
        expect(state[key].shape == tensor.shape, f"{where} {key!r}",
               f"shape {tuple(tensor.shape)}", tuple(state[key].shape))
        expect(state[key].is_floating_point() == tensor.is_floating_point(), f"{where} {key!r}",
               f"dtype {tensor.dtype}", state[key].dtype)
    extra = next((key for key in state if key not in expected), None)
    expect(extra is None, where, "only keys of a PreActResNet18", extra)
