"""What the contest asks for: scores of one category's images, from these images alone.

The backbone in `weights/backbone` makes the maps; the one in `weights/image_backbone`, where there is one, makes the
image scores (the report takes DINOv2 for the first and CLIP for the second), else the first makes both.
"""
from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anomaly.backbone import EMBEDDED, Backbone, load_backbone
from anomaly.pipeline import MuscConfig, category_scores, patch_scores
from data.anomaly_tree import SIDE
from data.devices import chosen_device
from data.errors import expect
from data.images import read_rgb, to_uint8

CONFIG = MuscConfig()
FOR_IMAGES = EMBEDDED.with_name("image_backbone")


def predict_category(paths: Sequence[Path | str]) -> tuple[np.ndarray, np.ndarray]:
    """Image scores (N,) float64 and maps (N, 1, 224, 224) float32, in the order of the paths.

    Both in [0, 1] over the category, higher = more anomalous; all 0 where all images are alike. N >= 2.
    Errors: fewer images; an image that cannot be read (named).
    """
    paths = list(paths)
    expect(len(paths) >= 2, "paths", ">= 2 images of a category", len(paths))
    for_maps, for_images = _backbones(chosen_device())
    images = _read(paths, for_maps, for_images)
    mapped = patch_scores(images["maps"], for_maps, CONFIG)
    imaged = mapped if for_images is for_maps else patch_scores(images["images"], for_images, CONFIG)
    scores, maps = category_scores(mapped, imaged, CONFIG, images.get("small"))
    return scores.double().cpu().numpy(), maps.cpu().numpy()


@lru_cache(maxsize=1)
def _backbones(device: torch.device) -> tuple[Backbone, Backbone]:
    """Those for maps and for images; one and the same where only one is there."""
    for_maps = load_backbone(EMBEDDED, device=device)
    return for_maps, load_backbone(FOR_IMAGES, device=device) if FOR_IMAGES.is_dir() else for_maps


def _read(paths: list[Path | str], for_maps: Backbone, for_images: Backbone) -> dict[str, Tensor]:
    """Each file read once and kept in the sizes that are needed only: (N, 3, H, W) uint8 each."""
    def one(path: Path | str) -> dict[str, Tensor]:
        image = read_rgb(path, upright=False)  # as the organizers read it: masks belong to the stored pixels
        sizes = {"maps": for_maps.prepared(image)}
        if for_images is not for_maps:
            sizes["images"] = for_images.prepared(image)
        if CONFIG.foreground != "off":
            sizes["small"] = to_uint8(image.resize((SIDE, SIDE)))
        return sizes

    with ThreadPoolExecutor() as pool:
        read = list(pool.map(one, paths))
    return {use: torch.stack([sizes[use] for sizes in read]) for use in read[0]}
