"""Endless sets of generated surfaces and objects, some of them disturbed, to train the small backbone on.

Every set has its own texture family, colours and amount of natural variation; its images differ by shift, light and
noise only, except where a disturbance was put in. Nothing here is shared with `data.defects`: neither code nor seeds.
"""
from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn.functional import grid_sample, interpolate

SIGNIFICANT = 0.04  # mean change of a pixel (of 1) from which it counts as disturbed; about 10 of 255 grey levels


def texture_set(normal: int, disturbed: int, size: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
    """One set of images of the same kind, the disturbed ones last.

    Returns images (B, 3, size, size) float in [0, 1] and changed pixels (B, size, size) bool, B = normal + disturbed.
    """
    count = normal + disturbed
    clean = _surface(count, size, generator)
    spoilt = clean.clone()
    for i in range(normal, count):
        spoilt[i] = _disturbed(clean[i], generator)
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


def _painted(count: int, size: int, generator: Generator) -> Tensor:
    """A surface of one to three fields in random colours: (B, 3, size, size), not yet limited to [0, 1]."""
    gray = _chance(generator, 0.5)
    image = _uniform(generator, 0.2, 0.8, 1, 1 if gray else 3, 1, 1).expand(count, 3, size, size)
    for _ in range(1 + int(_number(generator, 0, 2.5))):
        field = (_noise_field if _chance(generator, 0.55) else _lattice_field)(count, size, generator)
        colour = torch.randn(1, 1 if gray else 3, 1, 1, generator=generator)
        colour = colour / colour.norm() * math.sqrt(colour.numel())
        image = image + field[:, None] * colour * _log_number(generator, 0.008, 0.16)
    return image


def _surface(count: int, size: int, generator: Generator) -> Tensor:
    """Clean images of one kind: a surface, or an object of one surface before another."""
    image = _painted(count, size, generator)
    if _chance(generator, 0.45):
        outline = _outline(count, size, generator)[:, None]
        ground = _painted(count, size, generator)
        image = outline * image + (1 - outline) * ground
        if _chance(generator, 0.5):
            part = _outline(count, size // 2, generator)[:, None]
            part = torch.nn.functional.pad(part, (size // 4, size - size // 2 - size // 4) * 2)
            image = part * _painted(count, size, generator) + (1 - part) * image
    return image.clamp(0, 1)


# --- disturbances ---------------------------------------------------------------------------------------------------

def _region(size: int, generator: Generator) -> Tensor:
    """Where a disturbance lies: one soft blob, stroke, speck, rectangle or torn patch, (size, size) in [0, 1]."""
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


def _disturbed(image: Tensor, generator: Generator) -> Tensor:
    """(3, H, W) with one to three disturbances of one kind."""
    size = image.shape[-1]
    kind = int(_number(generator, 0, 6))
    for _ in range(1 + int(_number(generator, 0, 2.2))):
        region = _region(size, generator)
        image = region * _replacement(image, kind, generator) + (1 - region) * image
    return image.clamp(0, 1)


def _replacement(image: Tensor, kind: int, generator: Generator) -> Tensor:
    """What stands where the disturbance lies."""
    size = image.shape[-1]
    if kind == 0:  # darker or brighter
        return image + _log_number(generator, 0.08, 0.5) * (1 if _chance(generator, 0.4) else -1)
    if kind == 1:  # of another colour
        return image + _uniform(generator, -0.4, 0.4, 3, 1, 1)
    if kind == 2:  # another material
        return _painted(1, size, generator)[0]
    if kind == 3:  # a piece from elsewhere, mirrored at times
        moved = image.roll([int(_number(generator, 0.2, 0.8) * size) for _ in range(2)], (1, 2))
        return moved.transpose(1, 2) if _chance(generator, 0.5) else moved
    if kind == 4:  # washed out
        coarse = interpolate(image[None], scale_factor=1 / 16, mode="area")
        return interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)[0]
    return _bent(image, generator)


def _bent(image: Tensor, generator: Generator) -> Tensor:
    """The image pushed aside by a smooth field of up to about 12 pixels."""
    size = image.shape[-1]
    push = torch.randn(1, 2, 6, 6, generator=generator) * _number(generator, 4, 12) * 2 / size
    push = interpolate(push, size=(size, size), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    line = torch.linspace(-1, 1, size)
    grid = torch.stack([line[None, :].expand(size, size), line[:, None].expand(size, size)], -1)
    return grid_sample(image[None], (grid + push)[None], padding_mode="reflection", align_corners=True)[0]


def _seen_by_a_camera(images: Tensor, generator: Generator) -> Tensor:
    """Natural variation, its strength drawn once for the set: exposure, uneven light, gamma, noise."""
    count, size = len(images), images.shape[-1]
    light = _number(generator, 0, 0.25) if _chance(generator, 0.8) else _number(generator, 0.25, 0.6)
    gain = torch.exp(light * torch.randn(count, 1, 1, 1, generator=generator).clamp(-2, 2))
    slopes = torch.randn(count, 1, 3, 3, generator=generator) * _number(generator, 0, 0.12)
    uneven = interpolate(slopes, size=(size, size), mode="bicubic", align_corners=False)
    gamma = torch.exp(_number(generator, 0, 0.2) * torch.randn(count, 1, 1, 1, generator=generator))
    images = (images * gain + uneven).clamp(1e-3, 1) ** gamma
    noise = torch.randn(images.shape, generator=generator) * _number(generator, 0, 0.04)
    if _chance(generator, 0.5):  # the same in all channels, as a gray camera has it
        noise = noise[:, :1]
    return (images + noise).clamp(0, 1)
