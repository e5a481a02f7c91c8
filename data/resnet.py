"""ResNet18 for small images: the victim of unlearnable examples.

Paper: He et al., Deep Residual Learning for Image Recognition, CVPR 2016 (arXiv:1512.03385).
Departs from it: a 3x3 stem of stride 1 without max pooling, as is usual for 32x32 images; any widths.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from data.errors import expect
from data.preact_resnet import PointConv2d

WIDTHS = (64, 128, 256, 512)  # of the four stages; the stem has the first
BLOCKS = 2                    # a stage


def stem(in_channels: int, width: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU: (B, in_channels, H, W) -> (B, width, H, W)."""
    return nn.Sequential(nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


def block(before: int, width: int, stride: int) -> BasicBlock:
    """Two 3x3 convolutions and what is skipped: (B, before, H, W) -> (B, width, H / stride, W / stride)."""
    if stride == 1 and before == width:
        return BasicBlock(before, width)
    skipped = nn.Sequential(PointConv2d(before, width, stride), nn.BatchNorm2d(width))
    return BasicBlock(before, width, stride, skipped)


class ResNet(nn.Module):
    """Four stages of two blocks; strides 1, 2, 2, 2; average pool; one linear layer."""

    def __init__(self, num_classes: int, widths: tuple[int, ...] = WIDTHS, in_channels: int = 3) -> None:
        super().__init__()
        expect(len(widths) == 4 and min(widths) > 0, "widths", "four positive numbers", widths)
        expect(num_classes >= 2, "num_classes", ">= 2", num_classes)
        self.stem = stem(in_channels, widths[0])
        stages, before = [], widths[0]
        for i, width in enumerate(widths):
            rest = [block(width, width, 1) for _ in range(BLOCKS - 1)]
            stages.append(nn.Sequential(block(before, width, 1 if i == 0 else 2), *rest))
            before = width
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, K) logits."""
        return self.linear(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What the linear layer sees: (B, in_channels, H, W) -> (B, widths[-1])."""
        return self.stages(self.stem(x)).mean((2, 3))


def new_resnet(num_classes: int, widths: tuple[int, ...], in_channels: int, *, seed: int) -> ResNet:
    """A freshly initialised network; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
        torch.manual_seed(seed)
        return ResNet(num_classes, widths, in_channels)
