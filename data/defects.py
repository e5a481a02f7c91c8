"""A small anomaly set made of nothing but numbers: three categories with defects and masks, as the organizers lay them.

`hide` is a surface (wider than high), `cap` an object before a table, `mesh` a repeated pattern. Good and defective
images differ by light, noise, shift and turn as well, and many defects are faint: the set is meant not to be trivial.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from PIL.Image import Resampling

from data.errors import expect
from data.files import new_folder

Array = np.ndarray
Rng = np.random.Generator
FINE = 4  # shapes are drawn so many times larger, then shrunk: soft edges
VISIBLE = 0.3  # opacity from which a pixel belongs to the mask


def write_anomaly_split(folder: Path, *, seed: int, good: int = 20, defective: int = 20) -> None:
    """Write the three categories to the new `folder`: `good` and `defective` images each, the kinds in turn."""
    expect(good >= 1, "good", ">= 1", good)
    expect(defective >= 0, "defective", ">= 0", defective)
    with new_folder(Path(folder)) as scratch:
        for index, (name, (render, kinds)) in enumerate(sorted(CATEGORIES.items())):
            for number in range(good + defective):
                rng = np.random.default_rng([seed, index, number])
                spoilt = number - good
                kind = "good" if spoilt < 0 else kinds[spoilt % len(kinds)]
                stem = f"{number if spoilt < 0 else spoilt // len(kinds):03d}"
                _write_image(scratch / name, kind, stem, *render(rng, kind))


def _write_image(folder: Path, kind: str, stem: str, image: Array, mask: Array) -> None:
    path = folder / "test" / kind / f"{stem}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8)).save(path, compress_level=1)
    if kind != "good":
        path = folder / "ground_truth" / kind / f"{stem}_mask.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((mask >= VISIBLE).astype(np.uint8) * 255).save(path)


# --- the three categories: (H, W, 3) image in [0, 1] and (H, W) opacity of the defect in [0, 1] ----------------------

def _hide(rng: Rng, kind: str) -> tuple[Array, Array]:
    """Grained brown hide, 256 wide and 208 high."""
    height, width = 208, 256
    grain = _clouds(rng, height, width, 5) + 0.6 * _clouds(rng, height, width, 2)
    tone = 0.5 * _clouds(rng, height, width, 50) + np.abs(grain)
    image = np.array([0.52, 0.34, 0.22]) + tone[..., None] * np.array([-0.05, -0.04, -0.03])
    centre = _place(rng, height, width, 30)
    if kind == "cut":
        alpha = _line(rng, height, width, centre, rng.uniform(30, 90), rng.uniform(1.2, 2.5), 0.25)
        image = _blend(image, alpha, image * rng.uniform(0.35, 0.75))
    elif kind == "stain":
        alpha = _blot(rng, height, width, centre, rng.uniform(10, 24))
        image = _blend(image, alpha, image * rng.uniform(0.6, 0.85) + np.array([0, 0.01, 0.03]))
    elif kind == "smooth":
        alpha = _blot(rng, height, width, centre, rng.uniform(14, 26))
        image = _blend(image, alpha, np.broadcast_to(image.mean((0, 1)), image.shape))
    elif kind == "dye":
        alpha = _blot(rng, height, width, centre, rng.uniform(9, 20))
        image = _blend(image, alpha, image + rng.choice([-1, 1]) * np.array([-0.10, 0.03, 0.12]))
    else:
        alpha = np.zeros((height, width))
    return _photographed(rng, image), alpha


def _cap(rng: Rng, kind: str) -> tuple[Array, Array]:
    """A notched metal cap with a raised ring, turned at will, before a dark table; 240 x 240."""
    side, turn = 240, rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2 + rng.uniform(-7, 7, (2, 1, 1))
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    edge = (82 + 3.0 * np.cos(14 * (angle - turn))) * rng.uniform(0.97, 1.03)
    towards = rng.uniform(-math.pi, math.pi)  # where a defect lies, seen from the middle
    whole, edge = edge, _spoilt_edge(rng, kind, edge, np.angle(np.exp(1j * (angle - towards))))
    alpha = np.abs(_inside(edge - radius) - _inside(whole - radius))
    metal = 0.62 + 0.05 * np.cos(2 * (angle - 0.8)) + 0.015 * _clouds(rng, side, side, 3)
    metal += 0.14 * np.exp(-((radius - 52) / 4) ** 2) - 0.10 * np.exp(-((radius - 60) / 4) ** 2)
    metal -= 0.12 * _inside(9 - np.abs(radius - 25)) * (np.cos(3 * (angle - turn)) > 0.4)  # three stamped arcs
    table = 0.2 + 0.02 * _clouds(rng, side, side, 9) + 0.015 * _clouds(rng, side, side, 2)
    body = _inside(edge - radius)
    image = _blend(table[..., None] * np.array([1, 0.9, 0.8]), body, metal[..., None] * np.array([0.96, 0.98, 1.0]))
    if kind in ("scratch", "rust"):
        reach = rng.uniform(5, 62)
        centre = (side / 2 + reach * math.sin(towards), side / 2 + reach * math.cos(towards))
        if kind == "scratch":
            alpha = _line(rng, side, side, centre, rng.uniform(18, 50), rng.uniform(0.9, 1.8), 0.1)
            image = _blend(image, alpha, image + rng.choice([-1, 1]) * rng.uniform(0.12, 0.25))
        else:
            alpha = _blot(rng, side, side, centre, rng.uniform(4, 11)) * body
            image = _blend(image, alpha, image * np.array([0.85, 0.62, 0.45]))
    return _photographed(rng, image), alpha


def _spoilt_edge(rng: Rng, kind: str, edge: Array, away: Array) -> Array:
    """Distance of the rim from the middle, changed where the angle `away` is near 0 if the cap is bent or broken."""
    width = rng.uniform(0.12, 0.3)
    if kind == "bent":
        return edge + rng.choice([-1, 1]) * rng.uniform(7, 14) * np.exp(-(away / width) ** 2)
    if kind == "broken":
        rough = 0.8 + 0.1 * _clouds(rng, *edge.shape, 6)
        return edge - rng.uniform(12, 30) * (np.abs(away) < width) * rough
    return edge


def _mesh(rng: Rng, kind: str) -> tuple[Array, Array]:
    """A plate with rows of round holes, moved and turned a little; 224 x 224."""
    side, period = 224, 28.0
    turn, move = rng.uniform(-0.04, 0.04), rng.uniform(0, period, 2)
    y, x = np.mgrid[:side, :side].astype(float)
    alpha = np.zeros((side, side))
    if kind == "dented":  # the plate is pushed aside around a point
        cy, cx = _place(rng, side, side, 45)
        push = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * rng.uniform(14, 22) ** 2))
        direction, size = rng.uniform(0, 2 * math.pi), rng.uniform(7, 12)
        x, y = x + size * push * math.cos(direction), y + size * push * math.sin(direction)
        alpha = push * (push > 0.35)
    u = (math.cos(turn) * x + math.sin(turn) * y + move[0]) / period
    v = (math.cos(turn) * y - math.sin(turn) * x + move[1]) / period
    row = np.floor(v)
    u = u + 0.5 * (row % 2)
    far = np.hypot(u - np.floor(u) - 0.5, v - row - 0.5) * period
    hole = _inside(8.5 - far)
    if kind in ("blocked", "torn"):
        hole, alpha = _spoilt_holes(rng, kind, hole, u, v, period)
    plate = 0.58 + 0.012 * _clouds(rng, side, side, 2) + 0.02 * _clouds(rng, side, side, 30)
    plate = plate + 0.12 * np.exp(-((far - 10.5) / 1.5) ** 2)
    image = (hole * 0.12 + (1 - hole) * plate)[..., None] * np.array([0.92, 0.97, 1.0])
    if kind == "paint":
        alpha = _blot(rng, side, side, _place(rng, side, side, 25), rng.uniform(7, 16)) * (1 - hole)
        image = _blend(image, alpha, image * np.array([0.9, 0.82, 0.6]))
    return _photographed(rng, image), alpha


def _spoilt_holes(rng: Rng, kind: str, hole: Array, u: Array, v: Array, period: float) -> tuple[Array, Array]:
    """One hole filled, or the bridge to the next one gone: the holes, and the opacity of the defect."""
    column, row = _cell_near(u, v, rng)
    if kind == "blocked":
        alpha = hole * (np.floor(u) == column) * (np.floor(v) == row)
        return hole - alpha * rng.uniform(0.7, 1.0), alpha
    bridge = _inside(rng.uniform(3, 5) - np.abs(v - row - 0.5) * period)
    bridge = bridge * ((u > column + 0.5) & (u < column + 1.5))
    return np.maximum(hole, bridge), bridge * (1 - hole)


CATEGORIES: dict[str, tuple[Callable[[Rng, str], tuple[Array, Array]], tuple[str, ...]]] = {
    "cap": (_cap, ("bent", "broken", "rust", "scratch")),
    "hide": (_hide, ("cut", "dye", "smooth", "stain")),
    "mesh": (_mesh, ("blocked", "dented", "paint", "torn")),
}


# --- what they are made of -------------------------------------------------------------------------------------------

def _clouds(rng: Rng, height: int, width: int, scale: float) -> Array:
    """Smooth noise (H, W) of mean 0 and deviation 1, its features about `scale` pixels large."""
    rows, columns = int(height / scale) + 4, int(width / scale) + 4
    coarse = Image.fromarray(rng.standard_normal((rows, columns)).astype(np.float32))
    smooth = np.asarray(coarse.resize((width, height), Resampling.BICUBIC), dtype=float)
    return (smooth - smooth.mean()) / smooth.std()


def _inside(distance: Array) -> Array:
    """1 where the distance to an edge is positive, 0 where negative, one pixel of softness."""
    return (distance + 0.5).clip(0, 1)


def _blend(image: Array, alpha: Array, other: Array) -> Array:
    return image + alpha[..., None] * (other - image)


def _place(rng: Rng, height: int, width: int, margin: int) -> tuple[float, float]:
    """Row and column at least `margin` pixels from the border."""
    return rng.uniform(margin, height - margin), rng.uniform(margin, width - margin)


def _blot(rng: Rng, height: int, width: int, centre: tuple[float, float], radius: float) -> Array:
    """A ragged spot (H, W) in [0, 1]."""
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(y - centre[0], x - centre[1])
    return ((radius * (1 + 0.25 * _clouds(rng, height, width, radius)) - distance) / 3 + 0.5).clip(0, 1)


def _line(rng: Rng, height: int, width: int, centre: tuple[float, float], length: float, thickness: float,
          bend: float) -> Array:
    """A bent line (H, W) in [0, 1] through the centre."""
    angle, points = rng.uniform(0, math.pi), []
    for step in np.linspace(-0.5, 0.5, 9):
        points.append((centre[1] + length * step * math.cos(angle), centre[0] + length * step * math.sin(angle)))
        angle += rng.normal(0, bend)
    canvas = Image.new("L", (width * FINE, height * FINE))
    ImageDraw.Draw(canvas).line([(x * FINE, y * FINE) for x, y in points], fill=255,
                                width=max(1, round(thickness * FINE)), joint="curve")
    return np.asarray(canvas.resize((width, height), Resampling.BOX), dtype=float) / 255


def _cell_near(u: Array, v: Array, rng: Rng) -> tuple[float, float]:
    """Column and row of the cell of the pattern that a random inner pixel lies in."""
    y, x = (int(value) for value in _place(rng, *u.shape, 50))
    return float(np.floor(u[y, x])), float(np.floor(v[y, x]))


def _photographed(rng: Rng, image: Array) -> Array:
    """The image under its own light: brightness, a slope, a slow unevenness, and noise of the sensor."""
    height, width = image.shape[:2]
    y, x = np.mgrid[-1:1:height * 1j, -1:1:width * 1j]
    light = rng.uniform(0.88, 1.12) + rng.uniform(-0.07, 0.07) * x + rng.uniform(-0.07, 0.07) * y
    light = light + 0.015 * _clouds(rng, height, width, 60)
    return image * light[..., None] + rng.normal(0, 0.012, image.shape)
