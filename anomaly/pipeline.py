"""From the images of one category to image scores and anomaly maps, by the stages of MuSc.

Paper: Li et al., MuSc, ICLR 2024, arXiv:2401.16753; image score, degrees and windows as in the report of a contest
entry. Stages: patch features, neighbourhoods (`lnamd`), mutual scores, image score, smoothing (`rscin`), maps.
Departs from them: scores are scaled to [0, 1] over the category, as the contest asks; a net whose class token is not
trained gives image scores without smoothing.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anomaly.backbone import Backbone, Features, extract
from anomaly.foreground import background, without_background
from anomaly.image_score import image_scores, score_maps
from anomaly.lnamd import neighbourhood_features
from anomaly.mutual_scoring import mutual_scores
from anomaly.rscin import smoothed_scores
from data.anomaly_tree import SIDE
from data.errors import expect

ROUNDING = 1e-5  # distance of unit vectors from which two patches differ at all; nets answer twins within 1e-6
CHOICES = {"aggregation": ("lnamd", "snamd"), "precision": ("auto", "float32", "half"),
           "smoothing": ("rscin", "rscon", "none"), "image_score": ("two_highest", "highest"),
           "maps": ("first", "mean"), "foreground": ("off", "on", "rule")}


@dataclass(frozen=True)
class MuscConfig:
    degrees: tuple[int, ...] = (1, 3)  # sides of the neighbourhoods in patches, odd; the report's
    aggregation: str = "lnamd"  # of a neighbourhood: box filter (MuSc), or "snamd": weighted by likeness (MuSc-V2)
    keep: float = 0.3  # share of the other images that count, the nearest first; the paper's
    radius: int | None = None  # patches are compared within so many rows and columns only (aligned objects); None = all
    consistent: bool = False  # leave out images that share a repeated defect (CoDeGraph)
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
    classes: Tensor | None  # (N, C) class features, unit length; None where the net has no trained ones


def patch_scores(images: Tensor, backbone: Backbone, config: MuscConfig) -> PatchScores:
    """Mutual scores of all patches. images: (N, 3, H, W) uint8 of the backbone's input size, N >= 2."""
    expect(len(images) >= 2, "images", ">= 2 images of a category", len(images))
    found = feature_scores(extract(backbone, images), config)
    return found if backbone.config.class_features else replace(found, classes=None)


def feature_scores(features: Features, config: MuscConfig) -> PatchScores:
    """Mutual scores averaged over layers and degrees."""
    total = 0
    for layer in features.layers:
        for degree in config.degrees:
            patches = neighbourhood_features(layer, features.grid, degree)
            total = total + mutual_scores(patches, config.keep, precision=config.precision).double()
    scores = (total / (len(features.layers) * len(config.degrees))).float()
    return PatchScores(torch.where(scores > ROUNDING, scores, 0), features.grid, features.classes)


def category_scores(for_maps: PatchScores, for_images: PatchScores, config: MuscConfig,
                    small: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Image scores (N,) and maps (N, 1, 224, 224), both in [0, 1] over the category.

    The two inputs may come from two backbones, or be the same. Without class features image scores are not
    smoothed: by an untrained token, images would count as alike that are alike in nothing that matters.
    small: (N, 3, 224, 224) uint8 images, needed where the config hides the background.
    """
    images = image_scores(for_images.scores)
    if for_images.classes is not None:
        images = smoothed_scores(images, for_images.classes, config.windows)
    maps = score_maps(for_maps.scores, for_maps.grid, SIDE)
    if config.foreground != "off":
        expect(small is not None, "small", "images of the maps' size, to find the background", None)
        maps = without_background(maps, background(small.to(maps.device)))
    return unit_range(images), unit_range(maps)


def unit_range(values: Tensor) -> Tensor:
    """Values moved and scaled to [0, 1] over all of them; equal values become 0. Order stays."""
    low, high = values.min(), values.max()
    if low == high:
        return torch.zeros_like(values)
    return ((values - low) / (high - low)).clamp(0, 1)
