"""Images near a network's training data but outside: harsh changes of clean ones.

Each change takes (N, C, H, W) images in [0, 1] and gives as many of the same size in [0, 1]; every image has its
own draw. Draws come from a CPU generator, so all devices change alike.
Sources: CutPaste (Li et al., CVPR 2021, arXiv:2104.04015), random erasing (Zhong et al., AAAI 2020,
arXiv:1708.04896), GridMask (Chen et al., 2020, arXiv:2001.04086), elastic distortion (Simard et al., ICDAR 2003).
Departs from them: strengths are ours, so that the smallest image (16x16) changes visibly.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from data.errors import expect

PARTS = 4               # jigsaw pieces a side
PATCH = (0.02, 0.15)    # CutPaste: share of the image's area, as published
ERASED = (0.1, 0.33)    # random erasing: share of the area; published from 0.02 on, which may be a single pixel
ASPECT = 3.3            # height to width of patches and erased boxes at most; at least its inverse
NODES = 4               # elastic distortion: random displacements a side, smooth between them
BEND = 0.1              # their standard deviation, as a share of the side
STRETCH_CELLS = 5       # grid distortion: strips a side
STRETCH = 0.8           # their widths vary by up to this share
PERIOD = (0.25, 0.5)    # grid mask: distance of its squares as a share of the shorter side; they are half as wide


def near_ood(images: Tensor, count: int, harsh: int, *, generator: torch.Generator) -> Tensor:
    """(count, C, H, W) in [0, 1]: the images in random order, again and again, each after `harsh` distinct changes."""
    expect(images.ndim == 4 and len(images) > 0, "images", "(N, C, H, W), at least one", tuple(images.shape))
    expect(count > 0, "count", "> 0 images", count)
    expect(0 < harsh <= len(CHANGES), "harsh", f"in [1, {len(CHANGES)}] changes an image", harsh)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    changed = images[order[torch.arange(count, device=images.device) % len(images)]].clamp(0, 1)
    picks = torch.rand(count, len(CHANGES), generator=generator).argsort(1)[:, :harsh].to(images.device)
    for pick in picks.unbind(1):
        for i, change in enumerate(CHANGES):
            rows = (pick == i).nonzero()[:, 0]
            if len(rows):
                changed[rows] = change(changed[rows], generator=generator)
    return changed


def quarter_turn(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """A rotation by 90 degrees either way, resized where the image is not square."""
    either = torch.stack([images.rot90(1, (2, 3)), images.rot90(3, (2, 3))])  # (2, N, C, W, H)
    pick = torch.randint(2, (len(images),), generator=generator).to(images.device)
    turned = either[pick, torch.arange(len(images), device=images.device)]
    if turned.shape == images.shape:
        return turned
    return interpolate(turned, images.shape[2:], mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def cut_paste(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """A rectangle of the image is pasted over another place of it."""
    size = _box_sizes(images, PATCH, generator)
    (top, left), (from_top, from_left) = (_places(images, size, generator) for _ in range(2))
    rows, columns = _pixel_places(images)
    inside = _inside(images, top, left, size)
    return _look_up(images, torch.where(inside, rows - top + from_top, rows),
                    torch.where(inside, columns - left + from_left, columns))


def jigsaw(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """Equal pieces change places; what is left over at the right and at the bottom stays."""
    parts = min(PARTS, *images.shape[2:])
    height, width = images.shape[2] // parts, images.shape[3] // parts
    order = torch.rand(len(images), parts * parts, generator=generator).argsort(1).to(images.device)
    rows, columns = _pixel_places(images)
    inside = (rows < parts * height) & (columns < parts * width)
    piece = torch.where(inside, rows // height * parts + columns // width, 0)
    source = order.gather(1, piece.expand(len(images), -1, -1).flatten(1)).view(len(images), *images.shape[2:])
    return _look_up(images, torch.where(inside, source // parts * height + rows % height, rows),
                    torch.where(inside, source % parts * width + columns % width, columns))


def elastic(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """Every pixel comes from a place displaced by smooth noise."""
    coarse = torch.randn(len(images), 2, NODES, NODES, generator=generator).to(images.device)
    displaced = interpolate(coarse, images.shape[2:], mode="bicubic", align_corners=False) * 2 * BEND
    rows, columns = _centres(images)
    return _sample(images, rows + displaced[:, 0], columns + displaced[:, 1])


def grid_distortion(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """Strips of rows and strips of columns become wider or narrower."""
    rows, columns = (_stretched(len(images), side, generator).to(images.device) for side in images.shape[2:])
    return _sample(images, rows[:, :, None], columns[:, None, :])


def erase(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """A rectangle is filled with noise."""
    size = _box_sizes(images, ERASED, generator)
    inside = _inside(images, *_places(images, size, generator), size)
    noise = torch.rand(images.shape, generator=generator).to(images)
    return torch.where(inside[:, None], noise, images)


def grid_mask(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """Black squares at the crossings of a grid."""
    period = _uniform(len(images), PERIOD, generator).to(images.device) * min(images.shape[2:])
    period = period.round().clamp(min=2)[:, None, None]
    shift = torch.rand(2, len(images), 1, 1, generator=generator).to(images.device) * period
    rows, columns = _pixel_places(images)
    black = ((rows + shift[0].floor()) % period < period // 2) & ((columns + shift[1].floor()) % period < period // 2)
    return images.masked_fill(black[:, None], 0)


CHANGES: tuple[Callable[..., Tensor], ...] = (
    quarter_turn, cut_paste, jigsaw, elastic, grid_distortion, erase, grid_mask)


def _uniform(count: int, bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(count, generator=generator)


def _pixel_places(images: Tensor) -> tuple[Tensor, Tensor]:
    """Whole (1, H, 1) rows and (1, 1, W) columns."""
    height, width = images.shape[2:]
    return (torch.arange(height, device=images.device)[None, :, None],
            torch.arange(width, device=images.device)[None, None, :])


def _centres(images: Tensor) -> tuple[Tensor, Tensor]:
    """The same in [-1, 1], as grid_sample counts: the middles of the pixels."""
    rows, columns = _pixel_places(images)
    return (2 * rows + 1) / images.shape[2] - 1, (2 * columns + 1) / images.shape[3] - 1


def _box_sizes(images: Tensor, share: tuple[float, float], generator: torch.Generator) -> Tensor:
    """(2, N, 1, 1) whole heights and widths: area a random share of the image's, aspect log-uniform."""
    height, width = images.shape[2:]
    side = (_uniform(len(images), share, generator) * height * width).sqrt()
    stretch = ASPECT ** _uniform(len(images), (-0.5, 0.5), generator)
    sizes = [(side * stretch).round().clamp(1, height), (side / stretch).round().clamp(1, width)]
    return torch.stack(sizes)[..., None, None].long().to(images.device)


def _places(images: Tensor, size: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(N, 1, 1) top rows and left columns at which boxes of `size` fit."""
    drawn = torch.rand(2, len(images), 1, 1, generator=generator).to(images.device)
    height, width = images.shape[2:]
    return (drawn[0] * (height - size[0] + 1)).long(), (drawn[1] * (width - size[1] + 1)).long()


def _inside(images: Tensor, top: Tensor, left: Tensor, size: Tensor) -> Tensor:
    """(N, H, W): is the pixel in its image's box?"""
    rows, columns = _pixel_places(images)
    return (rows >= top) & (rows < top + size[0]) & (columns >= left) & (columns < left + size[1])


def _look_up(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(N, C, H, W) whose pixel (n, y, x) is the image's at rows[n, y, x], columns[n, y, x]."""
    places = (rows * images.shape[3] + columns).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, places).view_as(images)


def _sample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear values at places in [-1, 1]; beyond the border the image is mirrored."""
    grid = torch.stack(torch.broadcast_tensors(columns, rows), dim=-1)  # (N, H, W, 2), x before y
    return grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False).clamp(0, 1)


def _stretched(count: int, side: int, generator: torch.Generator) -> Tensor:
    """(count, side) ascending places in [-1, 1]: piecewise linear, the strips' widths drawn."""
    widths = 1 + STRETCH * _uniform(count * STRETCH_CELLS, (-1, 1), generator).view(count, STRETCH_CELLS)
    edges = torch.cat([torch.zeros(count, 1), widths.cumsum(1) / widths.sum(1, keepdim=True)], 1) * 2 - 1
    place = (torch.arange(side) + 0.5) / side * STRETCH_CELLS
    strip = place.long()
    return edges[:, strip] + (place - strip) * (edges[:, strip + 1] - edges[:, strip])
