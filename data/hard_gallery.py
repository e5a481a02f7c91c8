"""A gallery in which ground and layout never betray the target: its query image and scenes one object away.

Each request has a base scene of its own. Its target stands beside the query image and four neighbours on the same
ground, kept objects in place: two with a wrong object, one with an object missing, one with an object too many.
Requests name up to three objects a side, in about the shares of the contest's test texts.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.errors import expect
from data.pictograms import NAMES, SPRITE
from data.scenes import CELL, LATTICE, Part, Placed, Scene, Triplet, held_out_pairs

# (added, removed) -> share; of those with three names on a side the parts are guessed
KINDS = {(1, 1): 0.57, (2, 1): 0.135, (1, 2): 0.135, (2, 2): 0.01, (1, 0): 0.04, (0, 1): 0.04,
         (3, 1): 0.02, (1, 3): 0.02, (3, 2): 0.01, (2, 3): 0.01, (3, 3): 0.01}
NEIGHBOURS = ("wrong", "wrong", "missing", "more")


@dataclass(frozen=True)
class HardQuery:
    """A request, and the four scenes that are wrong by one object, in the order of NEIGHBOURS."""
    triplet: Triplet
    neighbours: tuple[Scene, ...]

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """The six scenes this request puts into the gallery, the target first, then the query image."""
        return self.triplet.target, self.triplet.query, *self.neighbours


def hard_queries(part: Part, *, seed: int, queries: int) -> list[HardQuery]:
    """As many requests; in a part of held-out pairs every query image and target holds one, else no scene does."""
    expect(queries >= 1, "queries", ">= 1", queries)
    rng = np.random.default_rng([part.index, seed, 6])  # 6: a stream of its own beside the families'
    shares = np.array(list(KINDS.values()))
    kinds = rng.choice(len(shares), size=queries, p=shares / shares.sum())
    return [_draw(part, list(KINDS)[kind], rng) for kind in kinds]


def hard_gallery(asked: Sequence[HardQuery]) -> list[Scene]:
    """All scenes once: the targets of all requests first, in order, then what stands around them."""
    return list(dict.fromkeys([*(a.triplet.target for a in asked), *(s for a in asked for s in a.scenes[1:])]))


def _draw(part: Part, kind: tuple[int, int], rng: np.random.Generator) -> HardQuery:
    kept, add, remove = _pick_names(part, kind, rng)
    ground = (part.patterns[rng.integers(len(part.patterns))], int(part.index * 2**32 + rng.integers(2**32)))
    cells = iter(rng.permutation(LATTICE**2).tolist())
    stay = [_place(part, name, next(cells), rng=rng) for name in kept]
    out = [_place(part, name, next(cells), rng=rng) for name in remove]
    stands = [(o.cell, o.shift) for o in out]  # an added object stands where a removed one stood
    into = [_place(part, name, *(stands[i] if i < len(stands) else (next(cells),)), rng=rng)
            for i, name in enumerate(add)]
    query, target = _scene(ground, stay + out), _scene(ground, stay + into)
    found: list[Scene] = []
    for what in NEIGHBOURS:
        scene = target
        while scene in (target, query, *found):
            scene = _neighbour(part, target, what, rng)
        found.append(scene)
    return HardQuery(Triplet(query, target, tuple(add), tuple(remove)), tuple(found))


def _pick_names(part: Part, kind: tuple[int, int], rng: np.random.Generator) -> tuple[list[str], ...]:
    """Names (kept, added, removed); kept ones make the held-out pair where the part asks for it."""
    added, removed = kind
    chosen = [int(rng.integers(len(NAMES)))]
    if part.held_out:
        chosen.append(int(rng.choice(np.flatnonzero(held_out_pairs()[chosen[0]]))))
    kept = len(chosen) + int(rng.integers(2 if part.held_out else 3))
    while len(chosen) < kept + added + removed:
        chosen.append(_another(part, chosen, rng))
    names = [NAMES[i] for i in chosen]
    return names[:kept], names[kept:kept + added], names[kept + added:]


def _another(part: Part, chosen: Sequence[int], rng: np.random.Generator) -> int:
    """A name not yet chosen and, outside the held-out part, in no held-out pair with the chosen."""
    free = np.ones(len(NAMES), dtype=bool)
    free[list(chosen)] = False
    if not part.held_out:
        free &= ~held_out_pairs()[list(chosen)].any(0)
    return int(rng.choice(np.flatnonzero(free)))


def _neighbour(part: Part, target: Scene, what: str, rng: np.random.Generator) -> Scene:
    """The target with one object exchanged for another name, left out, or added in a free cell."""
    objects = list(target.objects)
    here = int(rng.integers(len(objects)))
    if what == "missing":
        return _scene(target.ground, objects[:here] + objects[here + 1:])
    name = NAMES[_another(part, [NAMES.index(o.name) for o in objects], rng)]
    if what == "wrong":
        look = _look(part, rng)
        return _scene(target.ground, [*objects[:here], replace(objects[here], name=name, look=look),
                                      *objects[here + 1:]])
    free = sorted(set(range(LATTICE**2)) - {o.cell for o in objects})
    return _scene(target.ground, [*objects, _place(part, name, int(rng.choice(free)), rng=rng)])


def _scene(ground: tuple[str, int], objects: list[Placed]) -> Scene:
    return Scene(ground, tuple(sorted(objects, key=lambda o: o.cell)))


def _place(part: Part, name: str, cell: int, shift: tuple[int, int] | None = None, *, rng: np.random.Generator
           ) -> Placed:
    if shift is None:
        shift = tuple(rng.integers(0, CELL - SPRITE + 1, 2).tolist())
    return Placed(name, cell, shift, _look(part, rng))


def _look(part: Part, rng: np.random.Generator) -> int:
    return int(part.first_look + rng.integers(part.looks))
