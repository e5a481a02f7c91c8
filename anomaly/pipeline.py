"""From the patch features of one category to image scores and anomaly maps, by the stages of MuSc.

Paper: Li et al., MuSc, ICLR 2024, arXiv:2401.16753; image score, degrees and windows as in the report of a contest
entry. Stages: neighbourhoods (`lnamd`, `snamd`), mutual scores, image score, smoothing (`rscin`, `rscon`), maps,
foreground, calibration. Each is a switch of MuscConfig.
Departs from them: scores are scaled to [0, 1] over the category, as the contest asks; a net whose class token is not
trained gives image scores without smoothing by it.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from anomaly.backbone import Features
from anomaly.calibration import calibrated
from anomaly.consistent import shared_defects
from anomaly.foreground import hide_background, hides_background
from anomaly.image_score import highest_of_map, score_maps, two_highest
from anomaly.lnamd import neighbourhood_features
from anomaly.mutual_scoring import PRECISIONS, Window, mutual_scores, nearest_distances, nearest_mean
from anomaly.rscin import smoothed_scores
from anomaly.rscon import salient_features
from anomaly.snamd import neighbour_distance, similarity_weighted_features
from anomaly.tiles import Tiles
from data.anomaly_tree import SIDE
from data.errors import expect

ROUNDING = 1e-5  # distance of unit vectors from which two patches differ at all; nets answer twins within 1e-6
CHOICES = {"aggregation": ("lnamd", "snamd"), "precision": PRECISIONS,
           "smoothing": ("rscin", "rscon", "none"), "image_score": ("two_highest", "highest"),
           "maps": ("first", "mean"), "foreground": ("off", "on", "rule")}


@dataclass(frozen=True)
class MuscConfig:
    degrees: tuple[int, ...] = (1, 3)  # sides of the neighbourhoods in patches, odd; the report's
    aggregation: str = "lnamd"  # of a neighbourhood: box filter (MuSc), or "snamd": weighted by likeness (MuSc-V2)
    keep: float = 0.3  # share of the other images that count, the nearest first; the paper's
    radius: int | None = None  # patches are compared within so many rows and columns only (aligned objects); None = all
    consistent: bool = False  # leave out images that share a repeated defect (CoDeGraph); not with other judges
    precision: str = "auto"  # of the comparison: "float32", "half" (float32 sums), or half where it is faster
    subsets: int = 0  # random groups of images that score each other; 0 = as few as the memory takes
    tiles: int = 1  # images are cut into tiles x tiles inputs of the net, which overlap
    smoothing: str = "rscin"  # of image scores: by class features (MuSc), "rscon": by the worst patch, or "none"
    windows: tuple[int, ...] = (1, 8, 9)  # images over which image scores are smoothed; the report's
    image_score: str = "two_highest"  # the report's rule on patch scores, or "highest": of the map (MuSc)
    maps: str = "first"  # the maps of the net for maps, or the "mean" of both nets' maps
    foreground: str = "off"  # hide the background by its colour: "on", "off", or by a "rule" for each category
    calibrated: bool = False  # spread the scores of the maps for the organizers' AUPRO, order kept

    def __post_init__(self) -> None:
        where = "MuscConfig."
        expect(self.degrees and all(d >= 1 and d % 2 for d in self.degrees), where + "degrees", "odd numbers from 1",
               self.degrees)
        expect(0 < self.keep <= 1, where + "keep", "a share in (0, 1]", self.keep)
        expect(self.radius is None or self.radius >= 0, where + "radius", ">= 0 patches or None", self.radius)
        expect(self.subsets >= 0, where + "subsets", ">= 0", self.subsets)
        expect(self.tiles >= 1, where + "tiles", ">= 1", self.tiles)
        expect(self.windows and min(self.windows) >= 1, where + "windows", "numbers of images from 1", self.windows)
        for name, known in CHOICES.items():
            expect(getattr(self, name) in known, where + name, f"one of {', '.join(known)}", getattr(self, name))


@dataclass(frozen=True)
class PatchScores:
    scores: Tensor  # (N, L) float32, higher = more anomalous
    grid: tuple[int, int]
    size: tuple[int, int]  # pixels of the input they belong to
    alike: Tensor | None  # (N, C) unit vectors whose products say which images look alike; None = not known

    @staticmethod
    def joined(parts: Sequence[PatchScores], places: Sequence[Tensor]) -> PatchScores:
        """The parts of one category, each part's images brought to their places."""
        order = torch.cat(list(places)).argsort().to(parts[0].scores.device)
        alike = None if parts[0].alike is None else torch.cat([part.alike for part in parts])[order]
        return PatchScores(torch.cat([part.scores for part in parts])[order], parts[0].grid, parts[0].size, alike)


@dataclass(frozen=True)
class Judges:
    """Further images' features: known good ones, and those of an earlier batch; of the same net and tiles."""

    reference: Features | None = None
    earlier: Features | None = None

    def of(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        return tuple(None if f is None else f.layers[layer] for f in (self.reference, self.earlier))


def feature_scores(features: Features, config: MuscConfig, *, tiles: Tiles | None = None,
                   judges: Judges | None = None) -> PatchScores:
    """Mutual scores averaged over layers and degrees.

    features: of N images, or of N * T tiles of N images in the order of `Tiles.cut`.
    """
    tiles, judges = tiles or Tiles(1, features.grid, (1, 1)), judges or Judges()
    expect(not (config.consistent and (judges.reference or judges.earlier)), "MuscConfig.consistent",
           "False where reference or earlier images judge too", True)
    total, passes = 0.0, 0
    for layer in range(len(features.layers)):
        own = features.layers[layer]
        reference, earlier = judges.of(layer)
        tau = _distance_unit(own, features.grid) if config.aggregation == "snamd" else None
        for degrees in ((config.degrees,) if config.aggregation == "snamd" else ((d,) for d in config.degrees)):
            patches, *others = (None if x is None else
                                _of_images(aggregated(x, features.grid, degrees, config, tau=tau), tiles)
                                for x in (own, reference, earlier))
            total = total + _scores(patches, *others, config, tiles).double()
            passes += 1
    scores = (total / passes).float()  # (N, T, L)
    alike = _alike(features, scores, config, tiles)
    whole = tiles.stitched(torch.where(scores > ROUNDING, scores, 0))
    return PatchScores(whole, tiles.whole, tiles.canvas, alike)


def aggregated(layer: Tensor, grid: tuple[int, int], degrees: Sequence[int], config: MuscConfig, *,
               tau: float | None = None) -> Tensor:
    """(N, L, D) float32 features of neighbourhoods, of unit length, of one layer; SNAMD joins the degrees itself.

    tau: the distance that SNAMD weighs by, the same for all that are compared; None = of this layer.
    """
    layer = layer.float()  # GPUs keep features in 16 bits, in which sums over an image would lose digits
    if config.aggregation == "snamd":
        return similarity_weighted_features(layer, grid, degrees, tau=tau)
    (degree,) = degrees
    return neighbourhood_features(layer, grid, degree)


def _distance_unit(layer: Tensor, grid: tuple[int, int]) -> float:
    """What SNAMD measures distances in: the median of the images that are scored, never 0."""
    return max(neighbour_distance(layer.float(), grid), torch.finfo(torch.float32).tiny)


def _of_images(patches: Tensor, tiles: Tiles) -> Tensor:
    """(N, T, L, D) of (N * T, L, D)."""
    return patches.unflatten(0, (-1, tiles.side ** 2))


def _scores(patches: Tensor, reference: Tensor | None, earlier: Tensor | None, config: MuscConfig,
            tiles: Tiles) -> Tensor:
    """(N, T, L). Tiles are one pool of patches, or each place its own where patches are compared place by place."""
    if config.radius is None:
        pooled = [None if x is None else x.flatten(1, 2) for x in (patches, reference, earlier)]
        return _pool_scores(*pooled, config, None).unflatten(1, patches.shape[1:3])
    window = Window(tiles.grid, config.radius)
    places = [[None if x is None else x[:, t] for x in (patches, reference, earlier)] for t in range(patches.shape[1])]
    return torch.stack([_pool_scores(*place, config, window) for place in places], 1)


def _pool_scores(patches: Tensor, reference: Tensor | None, earlier: Tensor | None, config: MuscConfig,
                 window: Window | None) -> Tensor:
    if not config.consistent or len(patches) < 3:
        return mutual_scores(patches, config.keep, reference=reference, earlier=earlier, window=window,
                             precision=config.precision)
    distances = nearest_distances(patches, window=window, precision=config.precision)
    distances[shared_defects(distances, config.keep)] = torch.inf
    return nearest_mean(distances, config.keep, others=len(patches) - 1)


def _alike(features: Features, scores: Tensor, config: MuscConfig, tiles: Tiles) -> Tensor | None:
    """What tells which images look alike: class features, or the features of the worst patch (RsCon)."""
    if config.smoothing == "rscon":
        layer = features.layers[max(0, len(features.layers) - 2)]  # the second-deepest, as published
        degrees = config.degrees if config.aggregation == "snamd" else config.degrees[:1]
        patches = _of_images(aggregated(layer, features.grid, degrees, config), tiles)
        return salient_features(patches.flatten(1, 2), scores.flatten(1))
    if config.smoothing == "rscin" and features.classes is not None:
        return normalize(_of_images(features.classes, tiles).mean(1), dim=-1)
    return None


def category_scores(for_maps: PatchScores, for_images: PatchScores, config: MuscConfig,
                    hidden: Tensor | None = None, *, alone: bool = True) -> tuple[Tensor, Tensor]:
    """Image scores (N,) and maps (N, 1, 224, 224), both in [0, 1] over the category.

    The two inputs may come from two nets, or be the same. hidden: (N, 224, 224) bool, True where pixels are
    background and get the lowest score; with foreground = "rule" only where that is likely to help. alone: the images
    had no other judges; else image scores stay the distances they are.
    """
    images = IMAGE_RULES[config.image_score](for_images)
    if for_images.alike is not None:
        images = smoothed_scores(images, for_images.alike, config.windows)
    maps = score_maps(for_maps.scores, for_maps.grid, SIDE)
    if config.maps == "mean" and for_images is not for_maps:
        maps = _standard(maps).add_(_standard(score_maps(for_images.scores, for_images.grid, SIDE)))
    if hidden is not None and (config.foreground != "rule" or hides_background(hidden, maps.to(hidden.device))):
        hide_background(maps, hidden.to(maps.device))
    constant = bool(maps.min() == maps.max())  # which would end the organizers' evaluation
    maps = calibrated(maps, in_place=True) if config.calibrated or constant else unit_range(maps)
    return unit_range(images) if alone else images, maps


IMAGE_RULES = {"two_highest": lambda found: two_highest(found.scores),
               "highest": lambda found: highest_of_map(found.scores, found.grid, found.size)}


def _standard(maps: Tensor) -> Tensor:
    """In place: mean 0 and deviation 1 over the category; constant maps become 0."""
    return maps.sub_(maps.mean()).div_(maps.std().clamp_min(1e-12))


def unit_range(values: Tensor) -> Tensor:
    """Values moved and scaled, in place, to [0, 1] over all of them; equal values become 0. Order stays."""
    low, high = values.min(), values.max()
    if low == high:
        return values.zero_()
    return values.sub_(low).div_(high - low).clamp_(0, 1)
