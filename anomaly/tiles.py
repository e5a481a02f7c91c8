"""Large images as overlapping inputs of the net, so that small defects keep their pixels.

A layout of t x t tiles covers a canvas to which every image is resized. Tiles overlap by whole patches, so the
patches of all tiles lie on one grid; where tiles overlap, their scores are averaged.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.errors import expect

OVERLAP = 3  # patches shared by neighbouring tiles: the widest usual neighbourhood but one


@dataclass(frozen=True)
class Tiles:
    """side x side tiles of `grid` patches of `patch` pixels (rows or heights first)."""

    side: int
    grid: tuple[int, int]
    patch: tuple[int, int]

    def __post_init__(self) -> None:
        expect(self.side >= 1, "Tiles.side", ">= 1", self.side)
        expect(self.side == 1 or min(self.grid) > OVERLAP, "Tiles.grid", f"more than {OVERLAP} patches a side",
               self.grid)

    @property
    def steps(self) -> tuple[int, int]:
        """Patches from one tile to the next."""
        return self.grid[0] - OVERLAP, self.grid[1] - OVERLAP

    @property
    def whole(self) -> tuple[int, int]:
        """Rows and columns of patches of the canvas."""
        rows, columns = (size + (self.side - 1) * step for size, step in zip(self.grid, self.steps, strict=True))
        return rows, columns

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width in pixels to which images are resized."""
        return self.whole[0] * self.patch[0], self.whole[1] * self.patch[1]

    def _corners(self) -> list[tuple[int, int]]:
        return [(i * self.steps[0], j * self.steps[1]) for i in range(self.side) for j in range(self.side)]

    def cut(self, images: Tensor) -> Tensor:
        """(N * T, C, h, w) of (N, C, H, W) images of the canvas; T = side * side tiles, those of an image in a row."""
        expect(images.ndim == 4 and tuple(images.shape[2:]) == self.canvas, "images.shape",
               f"(N, C, {self.canvas[0]}, {self.canvas[1]})", tuple(images.shape))
        (rows, columns), (tall, wide) = self.grid, self.patch
        parts = [images[:, :, top * tall:(top + rows) * tall, left * wide:(left + columns) * wide]
                 for top, left in self._corners()]
        return torch.stack(parts, 1).flatten(0, 1)

    def stitched(self, scores: Tensor) -> Tensor:
        """(N, whole rows * columns) of (N, T, L) scores of the patches of each tile."""
        count = self.side ** 2
        expect(scores.ndim == 3 and scores.shape[1:] == (count, self.grid[0] * self.grid[1]), "scores.shape",
               f"(N, {count}, {self.grid[0] * self.grid[1]})", tuple(scores.shape))
        total = scores.new_zeros(len(scores), *self.whole)
        times = scores.new_zeros(self.whole)
        for tile, (top, left) in enumerate(self._corners()):
            at = slice(top, top + self.grid[0]), slice(left, left + self.grid[1])
            total[:, at[0], at[1]] += scores[:, tile].unflatten(1, self.grid)
            times[at] += 1
        return (total / times).flatten(1)
