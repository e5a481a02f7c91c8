"""Frozen copies of a network for work on its input or its features; the caller's network stays as it is."""
from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from data.errors import expect

PARTS = ("conv1", "layer1", "layer2", "layer3", "layer4", "avgpool", "linear")  # of a PreActResNet18


class SplitModel:
    """A frozen copy of a PreActResNet18, cut after its first block: trunk(stem(x)) = model(x)."""

    def __init__(self, model: nn.Module) -> None:
        for name in PARTS:
            expect(hasattr(model, name), "model", f"a PreActResNet18 with {name!r}", type(model).__name__)
        expect(not hasattr(model, "bn1"), "model", "a PreActResNet18, without a norm after its stem",
               type(model).__name__)
        net = frozen_copy(model)
        self.stem = nn.Sequential(net.conv1, net.layer1[0])
        self.trunk = nn.Sequential(net.layer1[1:], net.layer2, net.layer3, net.layer4, net.avgpool,
                                   nn.Flatten(), net.linear)


def can_be_split(model: nn.Module) -> bool:
    """Whether `SplitModel` takes it."""
    return all(hasattr(model, name) for name in PARTS) and not hasattr(model, "bn1")


def frozen_copy(model: nn.Module) -> nn.Module:
    """The same function in evaluation mode, its weights without gradient; faster where it is a PreActResNet18."""
    net = copy.deepcopy(model).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    if can_be_split(net):
        for block in net.modules():
            _fold_second_norm(block)
    return net


def check_classes(model: nn.Module, num_classes: int) -> None:
    """InputError unless `num_classes` is at least 2 and, where the model has a last layer `linear`, its outputs."""
    expect(num_classes >= 2, "num_classes", ">= 2", num_classes)
    outputs = getattr(getattr(model, "linear", None), "out_features", num_classes)
    expect(outputs == num_classes, "num_classes", f"{outputs}, as the model puts out", num_classes)


def input_channels(model: nn.Module) -> int:
    """Channels that the model's first convolution takes; 3 where it has none."""
    return next((part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d)), 3)


def stem_width(model: nn.Module, channels: int) -> int:
    """Channels that the model's first convolution gives, in which the most values lie; `channels` without one."""
    return next((part.out_channels for part in model.modules() if isinstance(part, nn.Conv2d)), channels)


def _fold_second_norm(block: nn.Module) -> None:
    """bn2 into the convolution before it: the same function, one pass over the features less."""
    conv, norm = getattr(block, "conv1", None), getattr(block, "bn2", None)
    if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
        block.conv1, block.bn2 = fuse_conv_bn_eval(conv, norm), nn.Identity().eval()
