"""Endless sets of surfaces and objects, some of them disturbed, to train the small backbone on.

Every set has its own materials, colours and amount of natural variation; its images differ by place, light and noise
only, except where a disturbance was put in. Materials are generated, and cut out of photographs where some are given.
Nothing here is shared with `data.defects`: neither code nor seeds.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate, pad

from data.errors import InputError, expect
from data.images import list_images, read_rgb, to_uint8

SIGNIFICANT = 0.04  # mean change of a pixel (of 1) from which it counts as disturbed; about 10 of 255 grey levels
OF_PHOTOS = 0.65    # share of the materials that are cut out of photographs, where there are some
REACH = 12          # pixels around a crack in which it shows
GRAY = 0.01         # mean colours that differ by less are gray

Photos = Sequence[Path]
SMALLEST_PHOTO = 200  # pixels of the shorter side; of a smaller one, pieces would be all blur


def photos_in(folder: Path) -> list[Path]:
    """The images in `folder` and below, those that are too small left out, in sorted order; none is an error."""
    expect(folder.is_dir(), folder, "a folder of photographs", "no such folder")
    found = [path for below in sorted({folder, *(p for p in folder.rglob("*") if p.is_dir())})
             for path in list_images(below) if _large(path)]
    expect(found, folder, f"images of at least {SMALLEST_PHOTO} pixels a side", "none")
    return found


def _large(path: Path) -> bool:
    try:
        with Image.open(path) as image:  # the header only
            return min(image.size) >= SMALLEST_PHOTO
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: expected an image, found {error}") from None


def texture_set(normal: int, disturbed: int, size: int, *, generator: Generator,
                photos: Photos = ()) -> tuple[Tensor, Tensor]:
    """One set of images of the same kind, the disturbed ones last.

    Returns images (B, 3, size, size) float in [0, 1] and changed pixels (B, size, size) bool, B = normal + disturbed.
    """
    count = normal + disturbed
    clean = _surface(count, size, photos, generator)
    spoilt = clean.clone()
    for i in range(normal, count):
        spoilt[i] = _disturbed(clean[i], photos, generator)
    changed = (spoilt - clean).abs().mean(1) > SIGNIFICANT
    return _seen_by_a_camera(spoilt, generator), changed


def _uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _number(generator: Generator, low: float, high: float) -> float:
    return float(_uniform(generator, low, high))


def _chance(generator: Generator, probability: float) -> bool:
    return _number(generator, 0, 1) < probability


def _log_number(generator: Generator, low: float, high: float) -> float:
    return math.exp(_number(generator, math.log(low), math.log(high)))


# --- fields: (B, size, size), zero mean and unit deviation or so ---------------------------------------------------

def _noise_field(count: int, size: int, generator: Generator) -> Tensor:
    """Filtered noise: a random power law or a random band, with or without a preferred direction."""
    fy = torch.fft.fftfreq(size)[:, None]
    fx = torch.fft.rfftfreq(size)[None, :]
    angle = _number(generator, 0, math.pi)
    stretch = 1.0 if _chance(generator, 0.5) else _log_number(generator, 2, 20)
    u = math.cos(angle) * fx + math.sin(angle) * fy
    v = stretch * (math.cos(angle) * fy - math.sin(angle) * fx)
    radius = (u ** 2 + v ** 2).sqrt().clamp_min(1 / size)
    if _chance(generator, 0.5):
        gain = radius ** -_number(generator, 0.6, 2.2)
    else:
        gain = torch.exp(-0.5 * ((radius / _log_number(generator, 0.01, 0.2)).log() / 0.4) ** 2)
    gain[0, 0] = 0
    white = torch.fft.rfft2(torch.randn(count, size, size, generator=generator))
    field = torch.fft.irfft2(white * gain, s=(size, size))
    return field / field.std().clamp_min(1e-6)


def _coordinates(count: int, size: int, generator: Generator, shift: float, turn: float) -> tuple[Tensor, Tensor]:
    """x and y of every pixel from the centre, each image moved and turned a little: two (B, size, size) in pixels."""
    line = torch.arange(size) - (size - 1) / 2
    x, y = line[None, None, :], line[None, :, None]
    dx, dy = _uniform(generator, -shift, shift, 2, count, 1, 1)
    angle = _uniform(generator, -turn, turn, count, 1, 1)
    return (angle.cos() * x + angle.sin() * y + dx, angle.cos() * y - angle.sin() * x + dy)


def _lattice_field(count: int, size: int, generator: Generator) -> Tensor:
    """A repeated cell: dots, lines, a grid, a chequerboard, bricks or waves."""
    period = _log_number(generator, 7, 80)
    aligned = _chance(generator, 0.5)
    x, y = _coordinates(count, size, generator, 3 if aligned else 80, 0.01 if _chance(generator, 0.6) else 0.1)
    angle = 0 if _chance(generator, 0.4) else _number(generator, 0, math.pi)
    u = (math.cos(angle) * x + math.sin(angle) * y) / period
    v = (math.cos(angle) * y - math.sin(angle) * x) / (period * _log_number(generator, 0.6, 1.7))
    kind = int(_number(generator, 0, 6))
    if kind == 3:
        u = u + 0.5 * (v.floor() % 2)
    cu, cv = (u - u.floor() - 0.5), (v - v.floor() - 0.5)  # place in the cell, -0.5 to 0.5
    soft = period * _number(generator, 0.2, 1.0)
    width = _number(generator, 0.08, 0.3)
    if kind == 0:
        return torch.tanh(soft * (width + 0.1 - (cu ** 2 + cv ** 2).sqrt()))
    if kind == 1:
        return torch.tanh(soft * (cu.abs() - width))
    if kind in (2, 3):
        return torch.tanh(soft * (torch.minimum(cu.abs(), cv.abs()) - width / 2))
    if kind == 4:
        return torch.tanh(soft * (cu.abs() - 0.25)) * torch.tanh(soft * (cv.abs() - 0.25))
    return (2 * math.pi * u).sin() + (2 * math.pi * v).sin() * _number(generator, 0, 1)


def _outline(count: int, size: int, generator: Generator) -> Tensor:
    """Soft silhouettes in [0, 1] of one random smooth shape, each image's a little moved and turned."""
    x, y = _coordinates(count, size, generator, _number(generator, 1, 12), _number(generator, 0, 0.15))
    x, y = x * _number(generator, 0.8, 1.5), y * _number(generator, 0.8, 1.5)
    theta, radius = torch.atan2(y, x), (x ** 2 + y ** 2).sqrt()
    edge = torch.full_like(theta, size * _number(generator, 0.25, 0.45))
    for k in range(2, 7):
        edge = edge * (1 + _number(generator, 0, 0.35 / k) * torch.cos(k * theta + _number(generator, 0, 6.3)))
    inner = edge * _number(generator, 0.15, 0.6) if _chance(generator, 0.4) else torch.full_like(edge, -9.0)
    return torch.sigmoid(edge - radius) * torch.sigmoid(radius - inner)


def _plate(count: int, size: int, generator: Generator) -> Tensor:
    """Soft rectangles in [0, 1] about as large as the picture, which cuts each of them elsewhere."""
    x, y = _coordinates(count, size, generator, 0.0, _number(generator, 0, 0.05))
    reach = size / 2 - size * _uniform(generator, -0.08, _number(generator, 0.02, 0.2), 4, count, 1, 1)
    soft = _number(generator, 0.3, 2)
    sides = torch.stack([torch.sigmoid(soft * (end - at)) for end, at in zip(reach, (x, -x, y, -y), strict=True)])
    return sides.prod(0)


# --- materials: (B, 3, size, size), not yet limited to [0, 1] --------------------------------------------------------

def _painted(count: int, size: int, photos: Photos, generator: Generator) -> Tensor:
    """One colour or pieces of a photograph, and up to three fields in random colours."""
    gray = _chance(generator, 0.5)
    if photos and _chance(generator, OF_PHOTOS):
        image = _photographed(count, size, photos, generator)
        fields = int(_chance(generator, 0.4))
    else:
        image = _uniform(generator, 0.2, 0.8, 1, 1 if gray else 3, 1, 1).expand(count, 3, size, size)
        fields = 1 + int(_number(generator, 0, 2.5))
    for _ in range(fields):
        field = (_noise_field if _chance(generator, 0.55) else _lattice_field)(count, size, generator)
        colour = torch.randn(1, 1 if gray else 3, 1, 1, generator=generator)
        colour = colour / colour.norm() * math.sqrt(colour.numel())
        image = image + field[:, None] * colour * _log_number(generator, 0.008, 0.16)
    return image


def _photographed(count: int, size: int, photos: Photos, generator: Generator) -> Tensor:
    """Pieces of one photograph, of about the same place or of any, in changed colours."""
    photo = to_uint8(read_rgb(photos[int(_number(generator, 0, len(photos)))])).float() / 255
    pieces = _pieces(photo, count, size, generator).rot90(int(_number(generator, 0, 4)), (2, 3))
    if _chance(generator, 0.5):  # gray, each channel with a weight of its own
        weights = _uniform(generator, 0.1, 1, 3)
        pieces = (pieces * (weights / weights.sum())[:, None, None]).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    elif _chance(generator, 0.5):
        pieces = pieces[:, torch.randperm(3, generator=generator)]
    if _chance(generator, 0.15):
        pieces = 1 - pieces
    colour = pieces.mean((0, 2, 3), keepdim=True)
    tint = 0.5 * (colour - colour.mean())
    return _number(generator, 0.25, 0.75) + (pieces - colour) * _log_number(generator, 0.4, 1.6) + tint


def _pieces(photo: Tensor, count: int, size: int, generator: Generator) -> Tensor:
    """(count, 3, size, size) of a (3, H, W) photograph: a square of it each, a little stretched and turned."""
    height, width = photo.shape[1:]
    whole = torch.tensor([width, height])
    side = _log_number(generator, 0.4, 1.0) * min(height, width)
    stretch = _number(generator, 0, 0.12) if _chance(generator, 0.5) else 0.0
    sides = (side * torch.exp(stretch * torch.randn(count, 2, generator=generator))).clamp_max(min(height, width))
    place = _uniform(generator, 0, 1, count, 2)
    if _chance(generator, 0.5):  # the same place, nearly
        place = (place[:1] + _number(generator, 0, 0.06) * (place - 0.5)).clamp(0, 1)
    angle = _uniform(generator, -1, 1, count) * (_number(generator, 0, 0.1) if _chance(generator, 0.5) else 0)
    zoom, centre = sides / whole, (1 - sides / whole) * (2 * place - 1)
    turned = torch.stack([torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)], 1)
    where = torch.cat([zoom[:, :, None] * turned, centre[:, :, None]], 2)
    grid = affine_grid(where, [count, 3, size, size], align_corners=False)
    return grid_sample(photo.expand(count, -1, -1, -1), grid, padding_mode="reflection", align_corners=False)


def _surface(count: int, size: int, photos: Photos, generator: Generator) -> Tensor:
    """Clean images of one kind: a surface, an object before another surface, or a plate that the picture cuts."""
    image, kind = _painted(count, size, photos, generator), _number(generator, 0, 1)
    if kind < 0.35:
        image = _before(_outline(count, size, generator), image, _painted(count, size, photos, generator))
        if _chance(generator, 0.5):
            part = _outline(count, size // 2, generator)
            part = pad(part, (size // 4, size - size // 2 - size // 4) * 2)
            image = _before(part, _painted(count, size, photos, generator), image)
    elif kind < 0.6:
        flat = torch.full_like(image, _number(generator, 0, 1))
        ground = _painted(count, size, photos, generator) if _chance(generator, 0.5) else flat
        image = _before(_plate(count, size, generator), image, ground)
    return image.clamp(0, 1)


def _before(shape: Tensor, image: Tensor, ground: Tensor) -> Tensor:
    """`image` where the (B, H, W) shape is 1, `ground` where it is 0."""
    return shape[:, None] * image + (1 - shape[:, None]) * ground


# --- disturbances ---------------------------------------------------------------------------------------------------

def _region(size: int, generator: Generator) -> Tensor:
    """Where a disturbance lies: a soft blob, stroke, speck, rectangle, torn patch or crack, (size, size) in [0, 1]."""
    if _chance(generator, 0.22):
        return _crack(size, generator)
    line = torch.arange(size, dtype=torch.float32)
    x, y = line[None, :], line[:, None]
    cx, cy = _uniform(generator, 0.08 * size, 0.92 * size, 2).tolist()
    kind = int(_number(generator, 0, 5))
    if kind == 0:  # a short bent stroke
        angle, bend = _number(generator, 0, math.pi), _number(generator, -0.02, 0.02)
        u = (x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)
        v = (y - cy) * math.cos(angle) - (x - cx) * math.sin(angle) + bend * u ** 2
        half, length = _log_number(generator, 0.8, 4), _log_number(generator, 0.06, 0.5) * size
        return torch.sigmoid(3 * (half - v.abs())) * torch.sigmoid(length / 2 - u.abs())
    if kind == 1:  # a speck
        return torch.sigmoid(2 * (_log_number(generator, 1.5, 7) - ((x - cx) ** 2 + (y - cy) ** 2).sqrt()))
    if kind == 2:  # a turned rectangle
        angle = _number(generator, 0, math.pi)
        a, b = (_log_number(generator, 0.02, 0.15) * size for _ in range(2))
        u = (x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)
        v = (y - cy) * math.cos(angle) - (x - cx) * math.sin(angle)
        return torch.sigmoid(2 * (a - u.abs())) * torch.sigmoid(2 * (b - v.abs()))
    near = torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * (_log_number(generator, 0.03, 0.16) * size) ** 2))
    if kind == 3:  # a blob
        return torch.sigmoid(12 * (near - 0.5))
    coarse = torch.randn(1, 1, 14, 14, generator=generator)
    rough = interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)[0, 0]
    return torch.sigmoid(10 * (near + 0.35 * rough - 0.7))


def _crack(size: int, generator: Generator) -> Tensor:
    """A thin line that turns at random."""
    steps = int(_number(generator, 6, 30))
    length = _log_number(generator, 0.1, 0.7) * size / steps
    turns = torch.randn(steps, generator=generator) * _number(generator, 0.1, 0.7)
    heading = _number(generator, 0, 2 * math.pi) + turns.cumsum(0)
    moves = length * torch.stack([heading.cos(), heading.sin()], 1)
    start = _uniform(generator, 0.1 * size, 0.9 * size, 1, 2)
    distance = _distance_to_path(torch.cat([start, start + moves.cumsum(0)]), size)
    return torch.sigmoid(3 * (_log_number(generator, 0.5, 2.5) - distance))


def _distance_to_path(path: Tensor, size: int) -> Tensor:
    """(size, size) distance in pixels to the line through the (P, 2) points x, y; infinite beyond `REACH`, or so."""
    nearest = torch.full((size, size), math.inf)  # squares
    line = torch.arange(size, dtype=torch.float32)
    for (ax, ay), (bx, by) in zip(path[:-1].tolist(), path[1:].tolist(), strict=True):
        columns, rows = (slice(max(0, int(min(ends)) - REACH), max(0, int(max(ends)) + REACH + 2))
                         for ends in ((ax, bx), (ay, by)))
        x, y = line[None, columns] - ax, line[rows, None] - ay
        dx, dy = bx - ax, by - ay
        along = ((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-12)).clamp(0, 1)
        near = nearest[rows, columns]
        near.copy_(torch.minimum(near, (x - along * dx).square() + (y - along * dy).square()))
    return nearest.sqrt()


def _disturbed(image: Tensor, photos: Photos, generator: Generator) -> Tensor:
    """(3, H, W) with one to three disturbances of one kind; gray ones, mostly, in a gray image."""
    size = image.shape[-1]
    gray = bool((image - image.mean(0)).abs().max() < GRAY) and _chance(generator, 0.9)
    kind = int(_number(generator, 0, 8))
    for _ in range(1 + int(_number(generator, 0, 2.2))):
        region = _region(size, generator)
        found = _replacement(image, region, kind, photos, generator)
        image = region * (found.mean(0, keepdim=True) if gray else found) + (1 - region) * image
    return image.clamp(0, 1)


def _replacement(image: Tensor, region: Tensor, kind: int, photos: Photos, generator: Generator) -> Tensor:
    """What stands where the disturbance lies."""
    size = image.shape[-1]
    if kind == 0:  # of another colour
        return image + _uniform(generator, -0.4, 0.4, 3, 1, 1)
    if kind == 1:  # another material
        return _painted(1, size, photos, generator)[0]
    if kind == 2:  # a piece from elsewhere, mirrored at times
        moved = image.roll([int(_number(generator, 0.2, 0.8) * size) for _ in range(2)], (1, 2))
        return moved.transpose(1, 2) if _chance(generator, 0.5) else moved
    if kind == 3:  # washed out
        coarse = interpolate(image[None], scale_factor=1 / 16, mode="area")
        return interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)[0]
    if kind == 4:  # pushed aside
        return _bent(image, generator)
    if kind == 5:  # a dent: one side brighter, the other darker
        slope = region.roll(1, 0) - region.roll(-1, 0)
        return image + slope / slope.abs().max().clamp_min(1e-6) * _number(generator, -0.5, 0.5)
    return image + _log_number(generator, 0.08, 0.5) * (1 if _chance(generator, 0.35) else -1)  # darker or brighter


def _bent(image: Tensor, generator: Generator) -> Tensor:
    """The image pushed aside by a smooth field of up to about 12 pixels."""
    size = image.shape[-1]
    push = torch.randn(1, 2, 6, 6, generator=generator) * _number(generator, 4, 12) * 2 / size
    push = interpolate(push, size=(size, size), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    line = torch.linspace(-1, 1, size)
    grid = torch.stack([line[None, :].expand(size, size), line[:, None].expand(size, size)], -1)
    return grid_sample(image[None], (grid + push)[None], padding_mode="reflection", align_corners=True)[0]


def _seen_by_a_camera(images: Tensor, generator: Generator) -> Tensor:
    """Natural variation, its strength drawn once for the set: exposure, uneven light, gamma, streaks, noise."""
    count, size = len(images), images.shape[-1]
    strength = _number(generator, 0, 0.25) if _chance(generator, 0.7) else _number(generator, 0.25, 0.5)
    light = strength * torch.randn(count, 1, 1, 1, generator=generator).clamp(-2, 2)
    points = int(_number(generator, 2, 6))
    light = light + _smooth(count, (points, points), size, generator) * _number(generator, 0, 0.3)
    if _chance(generator, 0.5):  # bands
        points = int(_number(generator, 2, 7))
        shape = (1, points) if _chance(generator, 0.5) else (points, 1)
        light = light + _smooth(count, shape, size, generator) * _number(generator, 0, 0.35)
    haze = _smooth(count, (3, 3), size, generator) * _number(generator, 0, 0.08)
    gamma = torch.exp(_number(generator, 0, 0.2) * torch.randn(count, 1, 1, 1, generator=generator))
    images = (images * torch.exp(light) + haze).clamp(1e-3, 1) ** gamma
    if _chance(generator, 0.3):
        images = images + _streaks(count, size, generator)
    noise = torch.randn(images.shape, generator=generator) * _number(generator, 0, 0.04)
    if _chance(generator, 0.5):  # the same in all channels, as a gray camera has it
        noise = noise[:, :1]
    return (images + noise).clamp(0, 1)


def _smooth(count: int, points: tuple[int, int], size: int, generator: Generator) -> Tensor:
    """(count, 1, size, size): random numbers at rows x columns of points, and what lies between."""
    coarse = torch.randn(count, 1, *points, generator=generator)
    return interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)


def _streaks(count: int, size: int, generator: Generator) -> Tensor:
    """(count, 1, size, size) fine lines of one direction, strong here and faint there, other ones in every image."""
    lines = torch.randn(count, 1, 1, size, generator=generator) * _log_number(generator, 0.005, 0.06)
    if _chance(generator, 0.5):  # few and strong
        lines = 3 * lines * (_uniform(generator, 0, 1, count, 1, 1, size) < 0.15)
    lines = lines * torch.sigmoid(3 * _smooth(count, (5, 5), size, generator))
    return lines.transpose(2, 3) if _chance(generator, 0.5) else lines
