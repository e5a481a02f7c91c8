"""The two networks of a hidden message: one writes bits into an image, the other reads them.

Paper: Tancik et al., StegaStamp, CVPR 2020 (arXiv:1904.05343).
Departs from it: no spatial transformer in front of the reader; sizes follow 32x32 images, and any image size
works (upsampling goes to the size of the level above instead of doubling); all channels scale with `width`.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, relu


class Embedder(nn.Module):
    """A U-Net over the image and the message, spread over a plane as large as the image."""

    def __init__(self, shape: tuple[int, int, int], bits: int, width: int, residual: float = 0.0) -> None:
        super().__init__()
        channels, height, width_px = shape
        self.plane = (channels, -(-height // 2), -(-width_px // 2))
        self.residual = residual
        self.message = nn.Linear(bits, self.plane[0] * self.plane[1] * self.plane[2])
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        befores = [2 * channels, *sizes[:-1]]
        self.down = nn.ModuleList(nn.Conv2d(before, size, 3, 1 if i == 0 else 2, 1)
                                  for i, (before, size) in enumerate(zip(befores, sizes, strict=True)))
        self.up, self.merge = nn.ModuleList(), nn.ModuleList()
        for level in (3, 2, 1, 0):
            size = sizes[level]
            skipped = size if level else size + 2 * channels  # the finest level sees image and message again
            self.up.append(nn.Conv2d(sizes[level + 1], size, 2))
            self.merge.append(nn.Conv2d(size + skipped, size, 3, 1, 1))
        self.last = nn.Conv2d(width, width, 3, 1, 1)
        self.out = nn.Conv2d(width, channels, 1)
        _start([self.message, *self.down, *self.up, *self.merge, self.last])

    def forward(self, images: Tensor, bits: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] and (B, M) of 0 and 1 -> the images with the message, in [0, 1]."""
        plane = relu(self.message(bits - 0.5)).unflatten(1, self.plane)
        x = torch.cat([images - 0.5, interpolate(plane, images.shape[2:])], 1)
        levels = [x]
        for layer in self.down:
            levels.append(relu(layer(levels[-1])))
        top = levels.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            skip = levels.pop()
            grown = pad(interpolate(top, skip.shape[2:]), (0, 1, 0, 1))  # its 2x2 kernel keeps the size so
            parts = [skip, relu(up(grown))] + ([x] if len(levels) == 1 else [])
            top = relu(merge(torch.cat(parts, 1)))
        change = self.out(relu(self.last(top)))
        if self.residual:
            return (images + self.residual / 255 * change.tanh()).clamp(0, 1)
        return change.sigmoid()


class Reader(nn.Module):
    """Strided convolutions and two linear layers."""

    def __init__(self, shape: tuple[int, int, int], bits: int, width: int) -> None:
        super().__init__()
        sizes = ((width, 2), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 2), (4 * width, 2), (4 * width, 2))
        layers, before, (height, width_px) = [], shape[0], shape[1:]
        for size, stride in sizes:
            layers += [nn.Conv2d(before, size, 3, stride, 1), nn.ReLU()]
            before, height, width_px = size, -(-height // stride), -(-width_px // stride)
        hidden = nn.Linear(before * height * width_px, 16 * width)
        self.layers = nn.Sequential(*layers, nn.Flatten(), hidden, nn.ReLU(), nn.Linear(16 * width, bits))
        _start([*layers[::2], hidden])

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B, M) logits; above 0 reads as 1."""
        return self.layers(images - 0.5)


def _start(layers: list[nn.Module]) -> None:
    """He's weights for layers in front of a ReLU: with torch's smaller ones the message fades on its way."""
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
