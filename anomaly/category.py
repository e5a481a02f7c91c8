"""One category from its image files to scores and maps, within the memory there is.

Every file is read once and prepared for each net. Where the features of all images do not fit, random groups of
images score each other; maps, image scores and smoothing are then made over the whole category.
"""
from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from anomaly.backbone import INTERPOLATION, Backbone, Features, extract, extract_all
from anomaly.foreground import background, fitted_masks
from anomaly.pipeline import Judges, MuscConfig, PatchScores, category_scores, feature_scores
from anomaly.tiles import Tiles
from data.anomaly_tree import SIDE
from data.devices import free_bytes
from data.errors import expect
from data.images import read_rgb, to_uint8

FREE_SHARE = 0.5  # of the free memory that a group's features may take; products and distances take their own
COPIES = 4        # of the features of one layer while they are compared
SEED = 0          # of the groups
BATCH = 64        # images at once where the background is told


@dataclass(frozen=True)
class Nets:
    """The net for maps and the one for image scores; one and the same object where one does both."""

    for_maps: Backbone
    for_images: Backbone

    @property
    def each(self) -> tuple[Backbone, ...]:
        return (self.for_maps,) if self.for_images is self.for_maps else (self.for_maps, self.for_images)


def score_category(paths: Sequence[Path | str], nets: Nets, config: MuscConfig, *,
                   reference: Sequence[Path | str] = (), earlier: Sequence[Features] = (),
                   masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Image scores (N,) and maps (N, 1, 224, 224) in [0, 1] over the category, in the order of the paths.

    N >= 2, or >= 1 with other judges; then image scores are not stretched, but mean distances of features, from 0 to 2.
    Maps always are, so those of one image say where in it and not how much. reference: files of known good images; they
    judge and are not scored. earlier: what `category_features` gave for an earlier batch, likewise. masks: (N, H, W)
    bool of any size, True = background, in place of the config's. Errors: too few images; a file that is no image,
    features that are not finite (named); other judges for a config that leaves out repeated defects.
    """
    paths = list(paths)
    least = 1 if reference or earlier else 2
    expect(len(paths) >= least, "paths", f">= {least} image{'s' * (least > 1)} of a category", len(paths))
    expect(len(earlier) in (0, len(nets.each)), "earlier", f"features of {len(nets.each)} nets", len(earlier))
    judged = category_features(reference, nets, config) if reference else (None,) * len(nets.each)
    judges = [Judges(*pair) for pair in zip(judged, earlier or (None,) * len(nets.each), strict=True)]
    groups = _groups(len(paths), nets, config, least)
    found: list[list[PatchScores]] = []
    for group in groups:
        features = category_features([paths[i] for i in group.tolist()], nets, config)
        found.append([feature_scores(own, config, tiles=tiles_of(net, config), judges=theirs)
                      for own, net, theirs in zip(features, nets.each, judges, strict=True)])
        del features
    joined = [PatchScores.joined(parts, groups) for parts in zip(*found, strict=True)]
    if masks is not None:
        config, hidden = replace(config, foreground="on"), fitted_masks(masks, len(paths), (SIDE, SIDE))
    else:
        hidden = None if config.foreground == "off" else backgrounds(paths)
    return category_scores(joined[0], joined[-1], config, hidden, alone=least == 2)


def category_features(paths: Sequence[Path | str], nets: Nets, config: MuscConfig) -> tuple[Features, ...]:
    """Patch features of the images for each net, of all tiles; each file is read once."""
    kept = _kept_dtype(nets)

    def name(index: int) -> Path | str:
        return paths[index // config.tiles ** 2]

    if config.tiles == 1:
        found = extract_all(nets.each, paths, read=_read, dtype=kept, name=name)
    else:
        found = tuple(extract(net, images, dtype=kept, name=name)
                      for net, images in zip(nets.each, _all_tiles(paths, nets, config), strict=True))
    return tuple(features if net.config.class_features else replace(features, classes=None)
                 for net, features in zip(nets.each, found, strict=True))


def _read(path: Path | str) -> Image.Image:
    return read_rgb(path, upright=False)  # as the organizers read it: masks belong to the stored pixels


def _all_tiles(paths: Sequence[Path | str], nets: Nets, config: MuscConfig) -> list[Tensor]:
    """(N * T, 3, h, w) uint8 for each net."""
    layouts = [tiles_of(net, config) for net in nets.each]

    def resized(path: Path | str) -> list[Tensor]:
        image, sizes = _read(path), [layout.canvas[::-1] for layout in layouts]
        return [to_uint8(image.resize(size, INTERPOLATION[net.config.interpolation]))
                for net, size in zip(nets.each, sizes, strict=True)]

    with ThreadPoolExecutor() as pool:
        ready = zip(*pool.map(resized, paths), strict=True)
        return [layout.cut(torch.stack(images)) for layout, images in zip(layouts, ready, strict=True)]


def tiles_of(net: Backbone, config: MuscConfig) -> Tiles:
    """How the config's tiles lie on the patches of the net."""
    height, width = net.config.size
    return Tiles(config.tiles, net.grid, (height // net.grid[0], width // net.grid[1]))


def _groups(count: int, nets: Nets, config: MuscConfig, least: int) -> list[Tensor]:
    """Positions of the images of each group, ascending; as few groups as the memory takes unless the config says."""
    device = next(nets.for_maps.parameters()).device
    needed = _bytes_an_image(nets, config)
    fitting = int(FREE_SHARE * free_bytes(device) / needed)
    number = config.subsets or math.ceil(count / max(fitting, 1))
    if number == 1 or count < 2 * least:
        return [torch.arange(count)]
    expect(number <= count // least, "images", f"memory for the features of {least} images at least",
           f"{needed / 2**20:.0f} MiB an image, {free_bytes(device) / 2**20:.0f} MiB free" if not config.subsets
           else f"{number} groups of {count}")
    if not config.subsets:
        warnings.warn(f"{count} images are scored in {number} random groups: their features would take "
                      f"{count * needed / 2**30:.1f} GiB", stacklevel=3)
    return random_groups(count, number)


def random_groups(count: int, number: int) -> list[Tensor]:
    """Positions 0 to count - 1 in `number` groups of about equal size, each ascending; always the same."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED))
    return [group.sort().values for group in order.tensor_split(number)]


def _bytes_an_image(nets: Nets, config: MuscConfig) -> int:
    """Of its pixels and all its features for each net, and of the copies of a layer while it is compared: one net at a
    time."""
    kept, compared = 0, []
    for net in nets.each:
        layout = tiles_of(net, config)
        values = layout.side ** 2 * layout.grid[0] * layout.grid[1] * net.net.num_features  # of a layer
        kept += 3 * layout.canvas[0] * layout.canvas[1] + _kept_dtype(nets).itemsize * len(net.config.layers) * values
        compared.append(COPIES * torch.float32.itemsize * values)
    return kept + max(compared)


def _kept_dtype(nets: Nets) -> torch.dtype:
    return torch.float16 if next(nets.for_maps.parameters()).is_cuda else torch.float32


def backgrounds(paths: Sequence[Path | str]) -> Tensor:
    """(N, 224, 224) bool, True = background by colour, of the images at the size of the maps."""
    found = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), BATCH):
            small = pool.map(lambda path: to_uint8(_read(path).resize((SIDE, SIDE))), paths[start:start + BATCH])
            found.append(background(torch.stack(list(small))))
    return torch.cat(found)
