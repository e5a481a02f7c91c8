"""Which pixels are background, told by colour alone.

Source: the report of a contest entry on zero-shot anomaly detection. The mean colours of a 4 x 4 grid of patches in
the middle of the image, each an eighth of its side, stand for the object. A pixel is background if it is far from
more than 90 % of them and lies outside a central disc.
Departs from it: works at any size; the grid covers the central half of either side.
"""
from __future__ import annotations

import torch
from torch import Tensor

from data.errors import expect

CELLS = 4  # patches along a side of the central grid
FAR = 90.0  # Euclidean distance of colours, 0-255 per channel
MOST = 0.9  # share of the patches that a background pixel is far from
DISC = 4 / 9  # radius of the central disc, in heights; pixels in it are never background


def background(images: Tensor) -> Tensor:
    """(N, H, W) bool, True = background, of (N, 3, H, W) uint8 RGB images at least 8 pixels high and wide."""
    expect(images.ndim == 4 and images.shape[1] == 3 and images.dtype == torch.uint8, "images",
           "(N, 3, H, W) uint8", f"{tuple(images.shape)} {images.dtype}")
    height, width = images.shape[2:]
    expect(min(height, width) >= 8, "images.shape", "at least 8 x 8 pixels", (height, width))
    colours = _central_colours(images)  # (N, 3, 16)
    far = torch.zeros(len(images), height, width, device=images.device)
    pixels = images.float()
    for cell in range(colours.shape[-1]):  # one colour at a time: all at once would be 16 images in memory
        far += (pixels - colours[:, :, cell, None, None]).square().sum(1) > FAR ** 2
    return (far > MOST * colours.shape[-1]) & ~_disc(height, width, images.device)


def _central_colours(images: Tensor) -> Tensor:
    """Mean colours (N, 3, 16) of the patches: 4 rows of 4, the central half of the image."""
    height, width = images.shape[2:]
    tall, wide = height // 8, width // 8
    top, left = (height - CELLS * tall) // 2, (width - CELLS * wide) // 2
    middle = images[:, :, top:top + CELLS * tall, left:left + CELLS * wide].float()
    return middle.unflatten(2, (CELLS, tall)).unflatten(4, (CELLS, wide)).mean((3, 5)).flatten(2)


def _disc(height: int, width: int, device: torch.device) -> Tensor:
    y = torch.arange(height, device=device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=device)[None, :] - (width - 1) / 2
    return x ** 2 + y ** 2 <= (DISC * height) ** 2


def without_background(maps: Tensor, hidden: Tensor) -> Tensor:
    """(N, 1, H, W) maps with the pixels where hidden (N, H, W) is True set to the minimum over all maps."""
    expect(maps.shape == (len(hidden), 1, *hidden.shape[1:]), "maps.shape", f"({len(hidden)}, 1, H, W) as the mask",
           tuple(maps.shape))
    return torch.where(hidden[:, None], maps.min(), maps)
