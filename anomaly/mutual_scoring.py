"""Patch scores from the other images of the same set.

Paper: Li et al., MuSc, ICLR 2024, arXiv:2401.16753 (mutual scoring over the nearest share of the images).
Departs from it: at least one image is kept, so small sets score too (else NaN below 5 images); every pair of images
is compared once and used from both sides; the root is taken after the search for the nearest patch. Known good
images and those of an earlier batch may judge too, and aligned objects may be compared place by place.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from data.devices import free_bytes, half_is_faster
from data.errors import expect

CPU_BYTES, GPU_BYTES = 8 * 2**20, 2**30  # of products at once: a processor's cache likes few, a GPU takes more
FREE_SHARE = 0.25  # of the free memory: for products at once, and again for distances at once
DOUBTFUL = 3e-3  # squared distance, in squared norms of the patch: below, float32 products were seen 1e-5 off and more
NOISE = 4e-6  # squared distance of unit vectors that 16 bits cannot tell from 0
PARTS = {torch.float16: 2, torch.bfloat16: 3}  # how many numbers of the type add up to a float32 one
PRECISIONS = ("auto", "float32", "half")
REFERENCE_WEIGHT = 0.5  # of the known good images' word against that of the unlabelled ones


@dataclass(frozen=True)
class Window:
    """Patches are compared only with those at most `radius` rows and columns away, on a grid of rows, columns."""

    grid: tuple[int, int]
    radius: int

    def __post_init__(self) -> None:
        expect(min(self.grid) >= 1, "Window.grid", "rows and columns of patches", self.grid)
        expect(self.radius >= 0, "Window.radius", ">= 0 patches", self.radius)

    def near(self, device: torch.device) -> Tensor:
        """(L, L) bool: whether two places may be compared."""
        rows, columns = (torch.arange(side, device=device) for side in self.grid)
        apart = [(line[:, None] - line[None, :]).abs() <= self.radius for line in (rows, columns)]
        return (apart[0][:, None, :, None] & apart[1][None, :, None, :]).flatten(2).flatten(0, 1)


def mutual_scores(patches: Tensor, keep: float = 0.3, *, reference: Tensor | None = None,
                  earlier: Tensor | None = None, window: Window | None = None, precision: str = "float32",
                  max_bytes: int | None = None) -> Tensor:
    """Score every patch by how poorly the other images explain it.

    patches: (N, L, D) float; N >= 2, or >= 1 with other judges. keep: share of the other images that count, the
    nearest first, in (0, 1]; at least one counts. earlier: (E, L, D) of an earlier batch; its images judge like all
    others and are not scored again. reference: (M, L, D) of known good images, not scored either; their word is half of
    the score, so a defect that many images share stays visible. precision: "half" multiplies in 16 bits (bfloat16
    on a CPU, float16 on a GPU), "auto" does so where that is faster. max_bytes: of distances held at once, and of
    products; None = by what is free, below it every pair is compared twice.
    Returns (N, L), same device, float32 (float64 for float64): 0 = common, larger = more anomalous.
    """
    expect(0 < keep <= 1, "keep", "a share in (0, 1]", keep)
    _check(patches, 2 if reference is None and earlier is None else 1)
    judges = _joined(patches, earlier, reference)
    unlabelled = len(judges) - (0 if reference is None else len(reference))
    pairs = _Pairs(judges, window, precision, max_bytes)
    scores = []
    for band in pairs.bands(len(patches), max_bytes):
        distances = pairs.nearest(band)
        words = [nearest_mean(distances[:, unlabelled:], keep)] if reference is not None else []
        if unlabelled > 1:
            words.append(nearest_mean(distances[:, :unlabelled], keep, others=unlabelled - 1))
        scores.append(words[0] if len(words) == 1 else REFERENCE_WEIGHT * words[0] + (1 - REFERENCE_WEIGHT) * words[1])
    return torch.cat(scores)


def nearest_distances(patches: Tensor, *, window: Window | None = None, precision: str = "float32",
                      max_bytes: int | None = None) -> Tensor:
    """Euclidean distance of every patch to the nearest patch of each other image.

    patches: (N, L, D) float. Returns (N, N, L): [i, j, m] for patch m of image i and image j; infinite at i = j.
    max_bytes: of products at once.
    """
    _check(patches, 2)
    return _Pairs(patches, window, precision, max_bytes).nearest(range(len(patches)))


def nearest_mean(distances: Tensor, keep: float, *, others: int | None = None) -> Tensor:
    """(b, L) mean of the smallest share `keep` (one at least) of the `others` in (b, J, L) distances; None = J.

    An infinite distance is one that does not count; a patch without any other keeps infinity.
    """
    kept = max(1, int(keep * (distances.shape[1] if others is None else others)))
    smallest = distances.topk(min(kept, distances.shape[1]), dim=1, largest=False, sorted=False).values
    found = smallest.isfinite()
    return torch.where(found, smallest, 0).sum(1) / found.sum(1)


def _check(patches: Tensor, least: int) -> None:
    expect(patches.ndim == 3, "patches.ndim", 3, patches.ndim)
    expect(len(patches) >= least, "patches.shape[0]", f">= {least} image{'s' * (least > 1)}", len(patches))
    expect(patches.numel() > 0, "patches.shape", "no empty side", tuple(patches.shape))
    expect(patches.is_floating_point(), "patches.dtype", "a floating type", patches.dtype)
    expect(bool(torch.isfinite(patches).all()), "patches", "finite features", "NaN or infinity")


def _joined(patches: Tensor, earlier: Tensor | None, reference: Tensor | None) -> Tensor:
    """All judges, the scored images first and the known good ones last."""
    parts = [patches]
    for name, others in (("earlier", earlier), ("reference", reference)):
        if others is not None:
            expect(others.ndim == 3 and len(others) > 0 and others.shape[1:] == patches.shape[1:], f"{name}.shape",
                   f"(M, {patches.shape[1]}, {patches.shape[2]}) with M >= 1", tuple(others.shape))
            expect(bool(torch.isfinite(others).all()), name, "finite features", "NaN or infinity")
            parts.append(others.to(patches))
    return torch.cat(parts) if len(parts) > 1 else patches


def block_side(patches: int, size: int, most: float) -> int:
    """Images along one side of a block of products of `size` bytes, of which `most` bytes are held at once."""
    return max(1, int((most / (patches ** 2 * size)) ** 0.5))


class _Pairs:
    """The images as two operands whose product is -|x - y|^2 / 2 of their patches."""

    def __init__(self, judges: Tensor, window: Window | None, precision: str, max_bytes: int | None) -> None:
        expect(precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}", precision)
        if window:
            expect(judges.shape[1] == window.grid[0] * window.grid[1], "patches.shape[1]",
                   f"{window.grid[0]} x {window.grid[1]} patches", judges.shape[1])
        judges = judges if judges.dtype in (torch.float32, torch.float64) else judges.float()
        self.judges = judges - judges.mean((0, 1))  # distances stay as they are, products lose less
        self.window, self.scale, kind = window, 1.0, judges.dtype
        on_gpu = judges.device.type != "cpu"  # on `meta`, too: what a GPU does is counted there
        if precision == "half" or (precision == "auto" and half_is_faster(judges.device)):
            kind = torch.float16 if on_gpu else torch.bfloat16
            self.scale = float(self.judges.square().sum(-1).max().sqrt()) or 1.0  # float16 ends at 65504
        self.left, self.right = _extended(self.judges / self.scale if self.scale != 1 else self.judges, kind)
        free = FREE_SHARE * free_bytes(judges.device)
        most = max_bytes or min(GPU_BYTES if on_gpu else CPU_BYTES, free)
        self.side = block_side(judges.shape[1], self.left.element_size(), most)

    def bands(self, count: int, max_bytes: int | None) -> Iterator[range]:
        """The first `count` images in ranges whose distances to all judges are held at once."""
        most = max_bytes or FREE_SHARE * free_bytes(self.judges.device)
        row = self.judges[..., 0].numel() * self.judges.element_size()
        step = max(1, int(most / row))
        return (range(start, min(start + step, count)) for start in range(0, count, step))

    def nearest(self, band: range) -> Tensor:
        """(b, J, L) distances of the patches of the images in `band` to all judges; infinite to the image itself."""
        shape = (len(band), *self.judges.shape[:2])
        closest = self.left.new_empty(shape)  # the largest products
        with _full_sums():
            for top in range(band.start, band.stop, self.side):
                self._fill_rows(closest, band, range(top, min(top + self.side, band.stop)))
        squared = closest.to(self.judges.dtype).mul_(-2).clamp_min_(0)
        if self.left.dtype == torch.float32 and squared.device.type != "meta":  # which has no numbers to look at
            self._mend(squared, band)
        elif self.left.dtype in PARTS:
            squared[squared < NOISE] = 0  # sums of 16-bit products end here: twins are to be at 0
        distances = squared.sqrt_().mul_(self.scale)
        own = torch.arange(len(band), device=distances.device)
        distances[own, own + band.start] = torch.inf
        return distances

    def _fill_rows(self, closest: Tensor, band: range, rows: range) -> None:
        """What `rows` of the band still lack: earlier rows have filled in their side of the pairs within it."""
        outside = [(0, band.start), (band.stop, len(self.judges))]
        for start, stop, twice in [(rows.start, band.stop, True), *((*ends, False) for ends in outside)]:
            for first in range(start, stop, self.side):
                columns = range(first, min(first + self.side, stop))
                there, back = self._block(rows, columns)
                own = slice(rows.start - band.start, rows.stop - band.start)
                closest[own, columns.start:columns.stop] = there
                if twice:
                    closest[columns.start - band.start:columns.stop - band.start, rows.start:rows.stop] = back

    def _block(self, rows: range, columns: range) -> tuple[Tensor, Tensor]:
        """The largest product of each patch of `rows` with each image of `columns`, (b, c, L), and (c, b, L) back."""
        left, right = self.left[rows.start:rows.stop], self.right[columns.start:columns.stop]
        if self.window:
            return _windowed(left, right, self.window)
        (b, length, _), c = left.shape, len(right)
        products = left.flatten(0, 1) @ right.flatten(0, 1).T  # (b * L, c * L)
        there = products.view(b, length, c, length).amax(3).transpose(1, 2)
        return there, products.view(b, length, c * length).amax(1).view(b, c, length).transpose(0, 1)

    def _mend(self, squared: Tensor, band: range) -> None:
        """Measure tiny distances again in float64: there the product form has lost the digits (twin images)."""
        own = self.judges[band.start:band.stop]
        doubtful = squared < DOUBTFUL * own.square().sum(-1)[:, None]  # a near patch has about the same norm
        doubtful[torch.arange(len(band)), torch.arange(band.start, band.stop)] = False
        near = self.window.near(squared.device) if self.window else None
        for i, j in doubtful.any(-1).nonzero().tolist():
            if torch.equal(own[i], self.judges[j]):  # the same image twice
                squared[i, j] = 0
                continue
            rows = doubtful[i, j]
            left, right = _extended(torch.stack([own[i], self.judges[j]]).double(), torch.float64)
            products = left[0, rows] @ right[1].T
            if near is not None:
                products.masked_fill_(~near[rows], -torch.inf)
            squared[i, j, rows] = (products.amax(1) * -2).clamp_min(0).to(squared.dtype)


@contextmanager
def _full_sums() -> Iterator[None]:
    """Half-precision products on a GPU are summed in float32."""
    flags = torch.backends.cuda.matmul
    before, flags.allow_fp16_reduced_precision_reduction = flags.allow_fp16_reduced_precision_reduction, False
    try:
        yield
    finally:
        flags.allow_fp16_reduced_precision_reduction = before


def _extended(patches: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors (N, L, D + a few) of the type whose product is -|x - y|^2 / 2: the norms ride in further columns.

    In 16 bits the norms are those of the rounded patches, in as many parts as float32 takes; so the product's error
    is small against the distance, not against the norms.
    """
    rounded = patches.to(kind)
    rest = rounded.to(patches.dtype).square().sum(-1, keepdim=True) / -2
    parts = []
    for _ in range(PARTS.get(kind, 1)):
        parts.append(rest.to(kind))
        rest = rest - parts[-1].to(patches.dtype)
    ones = [torch.ones_like(part) for part in parts]
    filler = [rounded.new_zeros(1).expand(*rounded.shape[:2], -(rounded.shape[2] + 2 * len(parts)) % 8)]
    return torch.cat([rounded, *parts, *ones, *filler], -1), torch.cat([rounded, *ones, *parts, *filler], -1)


def _windowed(left: Tensor, right: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """As `_Pairs._block`, within the window: one row of patches against the rows around it."""
    (rows, columns), reach = window.grid, window.radius
    queries, others = left.unflatten(1, window.grid), right.unflatten(1, window.grid)  # (., rows, columns, D)
    there = left.new_empty(len(left), len(right), rows, columns)
    back = left.new_full((len(right), len(left), rows, columns), -torch.inf)
    line = torch.arange(columns, device=left.device)
    far = (line[:, None] - line[None, :]).abs() > reach
    for row in range(rows):
        low, high = max(0, row - reach), min(rows, row + reach + 1)
        band = others[:, low:high]  # (c, h, columns, D)
        products = queries[:, row].flatten(0, 1) @ band.flatten(0, 2).T
        products = products.view(len(left), columns, len(right), high - low, columns)
        products.masked_fill_(far[None, :, None, None, :], -torch.inf)
        there[:, :, row] = products.amax((3, 4)).transpose(1, 2)
        found = products.amax(1).transpose(0, 1)  # (c, b, h, columns)
        back[:, :, low:high] = torch.maximum(back[:, :, low:high], found)
    return there.flatten(2), back.flatten(2)
