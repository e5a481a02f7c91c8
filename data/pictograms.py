"""Small drawings of nameable objects ("red star", "banana"), made from a few primitives.

A kind is a list of steps in a unit square, y downwards, drawn in order:
    ("poly", points, tone)   filled polygon          ("disc", box, tone)          filled ellipse
    ("line", points, tone, width)                    ("arc", box, degrees from, to, tone, width)
A tone is a factor on the object's colour, or an own RGB colour, or HOLE for see-through.
"""
from __future__ import annotations

import zlib
from functools import lru_cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

SPRITE = 19    # pixels; fits a 21-pixel cell of the scene lattice with one pixel of jitter each way
_FINE = 4      # drawn this many times larger, then reduced: smooth edges
HOLE = (0, 0, 0, 0)
DARK, PALE, SKIN = (45, 40, 40), (238, 234, 226), (240, 205, 160)

COLOURS = {"red": (208, 38, 38), "orange": (240, 138, 24), "yellow": (246, 220, 50), "green": (44, 156, 62),
           "blue": (42, 84, 208), "purple": (138, 54, 168), "white": (246, 246, 246), "black": (30, 30, 32)}


def _round(n: int, radii: tuple[float, ...], turn: float = 0.0) -> list[tuple[float, float]]:
    """n points around the middle of the unit square, their radii taken in turn."""
    angles = (turn - pi / 2 + 2 * pi * i / n for i in range(n))
    return [(0.5 + radii[i % len(radii)] * cos(a), 0.5 + radii[i % len(radii)] * sin(a))
            for i, a in enumerate(angles)]


# Kinds that come in every colour: "red star", "blue star", ...
COLOURED = {
    "star": [
        ("poly", _round(10, (0.5, 0.21)), 1.0),
    ],
    "ball": [
        ("disc", (.06, .06, .94, .94), 1.0), ("disc", (.22, .18, .45, .4), 1.6),
    ],
    "ring": [
        ("disc", (.04, .04, .96, .96), 1.0), ("disc", (.3, .3, .7, .7), HOLE),
    ],
    "heart": [
        ("disc", (.02, .08, .54, .58), 1.0), ("disc", (.46, .08, .98, .58), 1.0),
        ("poly", [(.06, .44), (.94, .44), (.5, .97)], 1.0),
    ],
    "moon": [
        ("disc", (.05, .02, .97, .98), 1.0), ("disc", (.33, -.08, 1.15, .82), HOLE),
    ],
    "mug": [
        ("arc", (.5, .3, .98, .76), -100, 100, .8, .1),
        ("poly", [(.08, .16), (.7, .16), (.66, .92), (.12, .92)], 1.0), ("disc", (.08, .08, .7, .26), .55),
    ],
    "mushroom": [
        ("poly", [(.38, .5), (.62, .5), (.68, .97), (.32, .97)], SKIN),
        ("poly", [(.02, .56), (.12, .22), (.34, .06), (.66, .06), (.88, .22), (.98, .56)], 1.0),
        ("disc", (.24, .2, .42, .38), PALE), ("disc", (.58, .26, .78, .46), PALE),
    ],
    "house": [
        ("poly", [(.14, .44), (.86, .44), (.86, .96), (.14, .96)], 1.0),
        ("poly", [(.02, .48), (.5, .03), (.98, .48)], .6),
        ("poly", [(.4, .62), (.6, .62), (.6, .96), (.4, .96)], DARK),
    ],
    "fish": [
        ("poly", [(.62, .5), (.99, .18), (.99, .82)], .75), ("disc", (.02, .22, .78, .78), 1.0),
        ("disc", (.16, .38, .28, .5), PALE), ("disc", (.19, .41, .26, .48), DARK),
    ],
    "key": [
        ("disc", (.02, .28, .46, .72), 1.0), ("disc", (.15, .41, .33, .59), HOLE),
        ("poly", [(.42, .43), (.98, .43), (.98, .78), (.86, .78), (.86, .57), (.74, .57), (.74, .72), (.62, .72),
         (.62, .57), (.42, .57)], 1.0),
    ],
    "umbrella": [
        ("line", [(.5, .3), (.5, .88)], DARK, .07), ("arc", (.5, .76, .74, .98), 0, 180, DARK, .07),
        ("poly", [(.02, .54), (.1, .28), (.3, .09), (.5, .03), (.7, .09), (.9, .28), (.98, .54), (.82, .46), (.66,
         .54), (.5, .46), (.34, .54), (.18, .46)], 1.0),
    ],
    "bell": [
        ("disc", (.4, .76, .6, .98), .6),
        ("poly", [(.4, .04), (.6, .04), (.74, .22), (.78, .6), (.94, .82), (.06, .82), (.22, .6), (.26, .22)], 1.0),
        ("line", [(.1, .8), (.9, .8)], .7, .08),
    ],
    "arrow": [
        ("poly", [(.02, .36), (.5, .36), (.5, .1), (.98, .5), (.5, .9), (.5, .64), (.02, .64)], 1.0),
    ],
    "boat": [
        ("line", [(.5, .05), (.5, .7)], DARK, .06), ("poly", [(.55, .08), (.9, .58), (.55, .58)], PALE),
        ("poly", [(.02, .64), (.98, .64), (.8, .94), (.2, .94)], 1.0),
    ],
}

# Kinds with colours of their own: their name is the kind alone.
PLAIN = {
    "banana": [
        ("disc", (.02, -.25, .98, .9), (246, 214, 60)), ("disc", (.02, -.5, .98, .58), HOLE),
        ("disc", (.84, .16, .98, .3), (110, 80, 30)),
    ],
    "carrot": [
        ("poly", [(.3, .3), (.7, .3), (.5, .99)], (240, 130, 30)),
        ("poly", [(.3, .02), (.5, .2), (.7, .02), (.6, .32), (.4, .32)], (60, 160, 60)),
    ],
    "sunflower": [
        ("line", [(.5, .5), (.5, .99)], (50, 140, 50), .09),
        ("poly", [(.5 + (x - .5) * .85, .38 + (y - .5) * .75) for x, y in _round(16, (.5, .3))], (246, 200, 30)),
        ("disc", (.34, .22, .66, .54), (100, 62, 28)),
    ],
    "traffic light": [
        ("poly", [(.28, .02), (.72, .02), (.72, .98), (.28, .98)], DARK),
        ("disc", (.37, .07, .63, .33), (235, 50, 40)), ("disc", (.37, .37, .63, .63), (250, 205, 50)),
        ("disc", (.37, .67, .63, .93), (60, 200, 80)),
    ],
    "watermelon slice": [
        ("poly", [(.02, .3), (.98, .3), (.86, .62), (.66, .82), (.5, .86), (.34, .82), (.14, .62)], (40, 140, 60)),
        ("poly", [(.12, .3), (.88, .3), (.77, .56), (.6, .72), (.4, .72), (.23, .56)], (235, 70, 80)),
        ("disc", (.36, .38, .44, .48), DARK), ("disc", (.56, .38, .64, .48), DARK),
        ("disc", (.46, .54, .54, .64), DARK),
    ],
    "snowman": [
        ("disc", (.2, .46, .8, .99), PALE), ("disc", (.29, .14, .71, .54), PALE),
        ("poly", [(.34, 0), (.66, 0), (.66, .18), (.34, .18)], DARK),
        ("poly", [(.5, .3), (.74, .36), (.5, .4)], (240, 130, 30)), ("disc", (.45, .64, .55, .72), DARK),
    ],
    "cactus": [
        ("line", [(.2, .34), (.2, .56), (.5, .6)], (40, 130, 70), .14),
        ("line", [(.8, .22), (.8, .46), (.5, .5)], (40, 130, 70), .14),
        ("line", [(.5, .06), (.5, .8)], (52, 150, 84), .2),
        ("poly", [(.28, .74), (.72, .74), (.64, .99), (.36, .99)], (190, 96, 58)),
    ],
    "pine tree": [
        ("poly", [(.43, .78), (.57, .78), (.57, .99), (.43, .99)], (110, 72, 40)),
        ("poly", [(.5, .3), (.94, .82), (.06, .82)], (24, 100, 52)),
        ("poly", [(.5, .02), (.82, .46), (.18, .46)], (34, 124, 64)),
    ],
}

NAMES = (*(f"{colour} {kind}" for kind in COLOURED for colour in COLOURS), *PLAIN)


@lru_cache(maxsize=8192)
def sprite(name: str, look: int) -> tuple[np.ndarray, np.ndarray]:
    """One drawing of `name`: colours (SPRITE, SPRITE, 3) in 0..255 and cover (SPRITE, SPRITE, 1) in 0..1, float32.

    `look` chooses tilt, size and shade; the same name and look give the same drawing in every process.
    """
    colour, _, kind = name.partition(" ")
    steps, base = (PLAIN[name], PALE) if name in PLAIN else (COLOURED[kind], COLOURS[colour])
    rng = np.random.default_rng([zlib.crc32(name.encode()), look])
    size, tilt, shade = rng.uniform(0.84, 1.0), rng.uniform(-14, 14), rng.uniform(0.9, 1.1)
    picture = Image.new("RGBA", (SPRITE * _FINE,) * 2, HOLE)
    _draw(ImageDraw.Draw(picture), steps, base, size * 0.9)
    picture = picture.rotate(tilt, Image.Resampling.BICUBIC).resize((SPRITE, SPRITE), Image.Resampling.BOX)
    pixels = np.asarray(picture, dtype=np.float32)
    return (pixels[..., :3] * shade).clip(0, 255), pixels[..., 3:] / 255


def _draw(pen: ImageDraw.ImageDraw, steps: list, base: tuple[int, int, int], size: float) -> None:
    """Draw the steps of one kind, scaled by `size` about the middle, in shades of `base`."""
    side = SPRITE * _FINE

    def place(points):
        return [tuple((0.5 + (c - 0.5) * size) * side for c in point) for point in points]

    def paint(tone):
        if isinstance(tone, float):
            tone = tuple(min(255, int(c * tone)) for c in base)
        return (*tone, 255)[:4]  # HOLE has a fourth number already

    for kind, where, *rest in steps:
        if kind == "poly":
            pen.polygon(place(where), fill=paint(rest[0]))
        elif kind == "line":
            pen.line(place(where), fill=paint(rest[0]), width=round(rest[1] * size * side), joint="curve")
        else:
            (left, top), (right, bottom) = place([where[:2], where[2:]])
            box = (left, top, right, bottom)
            if kind == "disc":
                pen.ellipse(box, fill=paint(rest[0]))
            else:
                pen.arc(box, rest[0], rest[1], fill=paint(rest[2]), width=round(rest[3] * size * side))
