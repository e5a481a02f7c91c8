"""Which pixels are background, told by colour alone.

Source: the report of a contest entry on zero-shot anomaly detection. The mean colours of a 4 x 4 grid of patches in
the middle of the image, each an eighth of its side, stand for the object. A pixel is background if it is far from
more than 90 % of them and lies outside a central disc.
Departs from it: works at any size; the grid covers the central half of either side. The mask is not for every
category: where it is not the same in all images, it hides defects at the rim of an object, or of a strange colour,
and costs far more than it gains elsewhere. `hides_background` says where it is.
"""
from __future__ import annotations

import torch
from torch import Tensor

from data.errors import expect

CELLS = 4  # patches along a side of the central grid
FAR = 90.0  # Euclidean distance of colours, 0-255 per channel
MOST = 0.9  # share of the patches that a background pixel is far from
DISC = 4 / 9  # radius of the central disc, in heights; pixels in it are never background
SHARES = (0.05, 0.7)  # of all pixels: less is not worth hiding, more leaves too little
SAME = 0.95  # least intersection over union of an image's mask with that of the majority
BORDER = 0.5  # least share of the image border that the majority's mask covers
SAMPLE = 2**20  # scores that tell which are the highest, at even steps through the maps
TOP, CONCENTRATED = 0.01, 0.05  # of the highest scores, TOP of all, at most this share may be hidden


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


def hide_background(maps: Tensor, hidden: Tensor) -> None:
    """In place: set the pixels of (N, 1, H, W) maps where hidden (N, H, W) is True to the minimum over all maps."""
    _check_fit(maps, hidden)
    maps.masked_fill_(hidden[:, None], maps.min())


def _check_fit(maps: Tensor, hidden: Tensor) -> None:
    expect(maps.shape == (len(hidden), 1, *hidden.shape[1:]), "maps.shape", f"({len(hidden)}, 1, H, W) as the mask",
           tuple(maps.shape))


def hides_background(hidden: Tensor, maps: Tensor | None = None) -> bool:
    """Whether masks (N, H, W) bool, True = background, may be applied to the category; told without labels.

    They have to be nearly the same in every image, cover half of the border, and hide neither too little nor too much.
    maps: (N, 1, H, W) scores before masking; if given, few of the highest may lie where they would be hidden.
    """
    expect(hidden.ndim == 3 and hidden.dtype == torch.bool and hidden.numel() > 0, "hidden",
           "(N, H, W) bool, not empty", f"{tuple(hidden.shape)} {hidden.dtype}")
    times = torch.zeros(hidden.shape[1:], dtype=torch.int64, device=hidden.device)
    for own in hidden:  # one by one, here and below: sums and scores of many images fill the memory
        times += own
    usual = times * 2 > len(hidden)
    alike = all(int((own & usual).sum()) >= SAME * int((own | usual).sum()) for own in hidden)
    border = torch.cat([usual[0], usual[-1], usual[:, 0], usual[:, -1]]).float().mean()
    share = times.sum() / hidden.numel()
    if not (SHARES[0] <= share <= SHARES[1] and alike and border >= BORDER):
        return False
    return maps is None or _highest_hidden(maps, hidden) <= CONCENTRATED


def _highest_hidden(maps: Tensor, hidden: Tensor) -> float:
    """Share of the highest scores, TOP of all and those equal to the last, that masks would hide."""
    _check_fit(maps, hidden)
    some = maps.flatten()[::-(-maps.numel() // SAMPLE)]
    limit = some.kthvalue(max(1, round((1 - TOP) * len(some)))).values
    counts = [(int((image[0] >= limit).sum()), int(((image[0] >= limit) & own).sum()))
              for image, own in zip(maps, hidden, strict=True)]
    return sum(both for _, both in counts) / sum(high for high, _ in counts)


def fitted_masks(masks: Tensor, count: int, size: tuple[int, int]) -> Tensor:
    """Masks of one's own for `count` images, (N, H, W) bool, True = background, brought to the size of the maps.

    Every pixel takes the nearest one of the mask. A mask that hides a whole image is refused.
    """
    expect(isinstance(masks, Tensor) and masks.dtype == torch.bool, "masks", "a bool tensor, True = background",
           masks.dtype if isinstance(masks, Tensor) else type(masks).__name__)
    expect(masks.ndim == 3 and len(masks) == count and masks.numel() > 0, "masks.shape", f"({count}, H, W)",
           tuple(masks.shape))
    fitted = torch.nn.functional.interpolate(masks[:, None].to(torch.uint8), size=size, mode="nearest-exact")[:, 0] > 0
    whole = fitted.all(2).all(1).nonzero().flatten().tolist()
    expect(not whole, "masks", "something left of every image", f"none of image {whole[0] if whole else ''}")
    return fitted
