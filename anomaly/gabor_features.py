"""Patch features without any learning: energies of Gabor filters. The yardstick the backbone has to beat.

Filters follow Daugman (1985): a Gaussian times a wave. Energy is the squared length of the answers to the even and
the odd filter, so a shift of less than a wave changes little.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d, pad

from data.errors import expect

WAVELENGTHS = (4.0, 8.0, 16.0)  # pixels
DIRECTIONS = 6  # evenly over half a turn


def gabor_energies(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, L, D) root mean energies in each cell of the grid, and its mean colour; images (N, 3, H, W) in [0, 1]."""
    expect(images.ndim == 4 and images.shape[1] == 3, "images.shape", "(N, 3, H, W)", tuple(images.shape))
    gray = images.mean(1, keepdim=True)
    parts = [adaptive_avg_pool2d(images, grid)]
    for wavelength in WAVELENGTHS:
        even, odd = _filters(wavelength, images)
        padded = pad(gray, (even.shape[-1] // 2,) * 4, mode="reflect")
        energy = conv2d(padded, even) ** 2 + conv2d(padded, odd) ** 2
        parts.append(adaptive_avg_pool2d(energy, grid).sqrt())
    return torch.cat(parts, 1).flatten(2).transpose(1, 2)


def _filters(wavelength: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Even and odd filters (DIRECTIONS, 1, K, K) with no answer to constant light and unit length."""
    reach = math.ceil(1.5 * wavelength)
    line = torch.arange(-reach, reach + 1, dtype=like.dtype, device=like.device)
    angle = torch.arange(DIRECTIONS, dtype=like.dtype, device=like.device)[:, None, None] * math.pi / DIRECTIONS
    along = angle.cos() * line[None, None, :] + angle.sin() * line[None, :, None]
    window = torch.exp(-(line[None, :, None] ** 2 + line[None, None, :] ** 2) / (2 * (wavelength / 2) ** 2))
    pair = []
    for wave in (torch.cos, torch.sin):
        one = window * wave(2 * math.pi * along / wavelength)
        one = one - window * (one.sum((1, 2), keepdim=True) / window.sum())
        pair.append((one / one.square().sum((1, 2), keepdim=True).sqrt())[:, None])
    return pair[0], pair[1]
