"""Scenes of nameable objects, and the retrieval split made of them: image + request -> image.

Query and target share ground, places, kept objects and their drawings; an added object stands where a removed
one stood. Scenes come in families on a grid: two cells of one base scene are varied, the first over ten contents,
the second over two, so each of the twenty scenes has ten others that differ from it by exactly one object.
Every scene of a family is the target of a row: ground and layout never give the answer away.

Held out: a fifth of the pairs of names never stand together in a training scene, and each development scene
holds at least one such pair; drawings and grounds of the parts come from ranges of seeds that do not meet, and
two ground patterns are never trained on.
"""
from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.errors import expect
from data.files import new_folder, write_atomic
from data.pictograms import NAMES, SPRITE, sprite
from data.sentences import write_request

SIDE = 64          # pixels of a scene, each way
LATTICE = 3        # cells each way
CELL = SIDE // LATTICE
FAMILY = (10, 2)   # contents of the first and of the second varied cell
HELD_OUT_SHARE = 0.2
# (added, removed) -> weight among the kinds that lead to a scene from its family. The shares then come out near those
# of the contest, requests for three names left aside: (1, 1) 62 %, (1, 2) or (2, 1) 29 %, one-sided 9 %, (2, 2) 1 %.
EDITS = {(1, 1): 0.60, (1, 2): 0.36, (2, 1): 0.36, (2, 2): 0.04, (1, 0): 0.06, (0, 1): 0.06}
_LOOKS = 1000      # most looks of a part; part p uses the range from p * _LOOKS


@dataclass(frozen=True)
class Part:
    """Where scenes may come from: disjoint parts share neither looks nor random streams."""
    index: int                 # first word of every seed of this part
    held_out: bool             # True: each scene holds a held-out pair; False: none does
    patterns: tuple[str, ...]  # kinds of ground
    looks: int = _LOOKS        # drawings of each name

    @property
    def first_look(self) -> int:
        return self.index * _LOOKS


TRAINING = Part(0, False, ("plain", "slope", "stripes", "checks"), looks=48)  # few enough to stay in memory
VALIDATION = Part(1, False, ("plain", "slope", "stripes", "checks"))
DEVELOPMENT = Part(2, True, ("plain", "slope", "stripes", "checks", "rings", "weave"))


@dataclass(frozen=True)
class Placed:
    """One object: its name, lattice cell (0..8, row by row), offset in pixels, and drawing."""
    name: str
    cell: int
    shift: tuple[int, int]
    look: int


@dataclass(frozen=True)
class Scene:
    """A ground (pattern, seed) and the objects on it, in order of their cells."""
    ground: tuple[str, int]
    objects: tuple[Placed, ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(o.name for o in self.objects)


@dataclass(frozen=True)
class Triplet:
    """A query scene, the target scene, and the names that lead from one to the other."""
    query: Scene
    target: Scene
    add: tuple[str, ...]
    remove: tuple[str, ...]


@lru_cache(maxsize=1)
def held_out_pairs() -> np.ndarray:
    """(names, names) bool, symmetric: pairs that no training or validation scene holds. Always the same."""
    count = len(NAMES)
    draws = np.triu(np.random.default_rng(20).random((count, count)) < HELD_OUT_SHARE, 1)
    return draws | draws.T


def make_family(part: Part, contents: tuple[int, int], *, rng: np.random.Generator) -> list[list[Scene]]:
    """contents[0] rows of contents[1] scenes; neighbours in a row or a column differ by one object.

    One content may be "nothing": then its scenes lack an object the others have.
    """
    kept, first, second = _pick_names(part, contents, rng)
    ground = (part.patterns[rng.integers(len(part.patterns))], int(part.index * 2**32 + rng.integers(2**32)))
    cells = rng.permutation(LATTICE**2)[:len(kept) + 2].tolist()
    shifts = [tuple(s) for s in rng.integers(0, CELL - SPRITE + 1, (len(cells), 2)).tolist()]
    looks = iter((part.first_look + rng.integers(part.looks, size=len(kept) + sum(contents))).tolist())
    stay = [Placed(name, cell, shift, next(looks)) for name, cell, shift in zip(kept, cells, shifts, strict=False)]
    one = [name and Placed(name, cells[-2], shifts[-2], next(looks)) for name in first]
    two = [name and Placed(name, cells[-1], shifts[-1], next(looks)) for name in second]
    return [[Scene(ground, tuple(sorted((o for o in (*stay, a, b) if o), key=lambda o: o.cell))) for b in two]
            for a in one]


def _pick_names(part: Part, contents: tuple[int, int], rng: np.random.Generator):
    """Names (kept, contents of the first cell, of the second); None stands for nothing. No name comes twice."""
    held = held_out_pairs()
    free = np.ones(len(NAMES), dtype=bool)

    def pick(count: int, allowed: np.ndarray) -> list[int]:
        chosen = rng.choice(np.flatnonzero(allowed & free), count, replace=False).tolist()
        free[chosen] = False
        return chosen

    kept = pick(1, free)
    if part.held_out:  # the partner is kept, and every content of the first cell is a partner too
        partner = held[kept[0]]
        kept += pick(1, partner)
        second = pick(contents[1], free)
        first = pick(contents[0], partner)
        kept += pick(rng.integers(2), free)
    else:
        for _ in range(rng.integers(3)):
            kept += pick(1, ~held[kept].any(0))
        second = pick(contents[1], ~held[kept].any(0))
        first = pick(contents[0], ~held[kept + second].any(0))
    chosen = [[NAMES[i] for i in group] for group in (kept, first, second)]
    if rng.random() < 0.5:
        chosen[1][-1] = None
    if rng.random() < 0.8:  # more often than in the first: requests that name two objects need it
        chosen[2][-1] = None
    return chosen


def retrieval_triplets(part: Part = DEVELOPMENT, *, seed: int, queries: int) -> list[Triplet]:
    """As many triplets; every scene of every family is a target, most once. queries >= 20 (one family)."""
    size = FAMILY[0] * FAMILY[1]
    expect(queries >= size, "queries", f">= {size} (one family of scenes)", queries)
    rng = np.random.default_rng([part.index, seed])
    families = [[s for row in make_family(part, FAMILY, rng=rng) for s in row] for _ in range(queries // size)]
    targets = [(family, scene) for family in families for scene in family]
    again = rng.integers(len(targets), size=queries - len(targets)).tolist()
    triplets = [choose_query(*targets[i], rng=rng) for i in (*range(len(targets)), *again)]
    return [triplets[i] for i in rng.permutation(queries)]


def choose_query(family: list[Scene], target: Scene, *, rng: np.random.Generator) -> Triplet:
    """A scene of the family that a request of a common kind turns into `target`."""
    kinds: dict[tuple[int, int], list[Scene]] = {}
    for scene in family:
        kind = len(target.names - scene.names), len(scene.names - target.names)
        cells = {o.cell for o in set(target.objects) ^ set(scene.objects)}
        if kind in EDITS and len(cells) == max(kind):  # else an object would be added beside an emptied place
            kinds.setdefault(kind, []).append(scene)
    weights = np.array([EDITS[kind] for kind in kinds])
    scenes = kinds[list(kinds)[rng.choice(len(kinds), p=weights / weights.sum())]]
    query = scenes[rng.integers(len(scenes))]
    return Triplet(query, target, _in_random_order(target.names - query.names, rng),
                   _in_random_order(query.names - target.names, rng))


def request_texts(triplets: Sequence[Triplet], *, seed: int) -> list[str]:
    """The request of each triplet in free English, in wordings kept apart for testing the parser."""
    generator = torch.Generator().manual_seed(seed)
    return [write_request(t.add, t.remove, split="test", generator=generator) for t in triplets]


def _in_random_order(names: frozenset[str], rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(rng.permutation(sorted(names)).tolist())


def draw_scene(scene: Scene) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8."""
    canvas = draw_ground(*scene.ground).copy()
    for placed in scene.objects:
        colours, cover = sprite(placed.name, placed.look)
        top = placed.cell // LATTICE * CELL + placed.shift[0]
        left = placed.cell % LATTICE * CELL + placed.shift[1]
        window = canvas[top:top + SPRITE, left:left + SPRITE]
        window += cover * (colours - window)
    return (canvas + 0.5).astype(np.uint8)


@lru_cache(maxsize=64)
def draw_ground(pattern: str, seed: int) -> np.ndarray:
    """(SIDE, SIDE, 3) float32 in 0..255: two muted colours mixed by the pattern."""
    rng = np.random.default_rng(seed)
    grey = rng.uniform(95, 185)
    one = grey + rng.uniform(-22, 22, 3)
    two = one + rng.uniform(12, 34) * rng.choice((-1, 1))
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    turn, beat, phase = rng.uniform(0, np.pi), rng.uniform(3, 8), rng.uniform(0, 1)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    wave_a, wave_b = np.sin(2 * np.pi * (beat * along + phase)), np.sin(2 * np.pi * beat * across)
    mix = {"plain": lambda: np.zeros_like(x), "slope": lambda: along, "stripes": lambda: wave_a > 0,
           "checks": lambda: wave_a * wave_b > 0, "weave": lambda: 0.5 + 0.25 * (wave_a + wave_b),
           "rings": lambda: np.sin(2 * np.pi * beat * 2 * np.hypot(x - 0.5, y - phase)) > 0}[pattern]()
    return (one + mix[..., None] * (two - one)).astype(np.float32)


def write_retrieval_split(folder: Path, *, seed: int, queries: int = 300, part: Part = DEVELOPMENT) -> None:
    """Write the organizers' layout: queries.csv (query_image, query_text, target_image) and images/*.png.

    The folder appears whole or not at all; `read_retrieval_set` reads it.
    """
    triplets = retrieval_triplets(part, seed=seed, queries=queries)
    files = {scene: f"scene_{i:05d}.png" for i, scene in
             enumerate(dict.fromkeys(s for t in triplets for s in (t.target, t.query)))}
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("query_image", "query_text", "target_image"))
    for t, text in zip(triplets, request_texts(triplets, seed=seed), strict=True):
        rows.writerow((files[t.query], text, files[t.target]))
    with new_folder(Path(folder)) as scratch:
        (scratch / "images").mkdir()
        for scene, name in files.items():
            Image.fromarray(draw_scene(scene)).save(scratch / "images" / name)
        write_atomic(scratch / "queries.csv", table.getvalue())
