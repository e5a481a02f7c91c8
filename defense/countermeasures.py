"""Every countermeasure to unlearnable examples by name: its config class and how it treats a training set.

`defense.diffusion` is one more, for callers that bring a diffusion model.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from data.settings import named_config
from defense import (
    adversarial_training,
    bit_depth,
    dvae,
    grayscale,
    jpeg,
    orthogonal_projection,
    worst_augmentation,
)
from defense.purified import Purified

COUNTERMEASURES: dict[str, tuple[ModuleType, type]] = {
    "dvae": (dvae, dvae.DVAEConfig),
    "jpeg": (jpeg, jpeg.JpegConfig),
    "gray": (grayscale, grayscale.GrayscaleConfig),
    "bdr": (bit_depth, bit_depth.BitDepthConfig),
    "lfu": (orthogonal_projection, orthogonal_projection.ProjectionConfig),
    "at": (adversarial_training, adversarial_training.AdversarialTrainingConfig),
    "ueraser": (worst_augmentation, worst_augmentation.WorstAugmentationConfig),
}

RESUMED = frozenset({"dvae"})  # those that can keep what is done of their work, and go on from it


def countermeasure_config(name: str, parameters: Mapping[str, Any], where: str) -> Any:
    """The countermeasure's frozen config, its defaults where `parameters` say nothing; tables fill the configs within.

    An unknown countermeasure or parameter is named, `where` opens the message.
    """
    return named_config(COUNTERMEASURES, name, parameters, where)


def purify(name: str, images: Tensor, labels: Tensor, parameters: Mapping[str, Any], *,
           generator: torch.Generator, kept: Path | None = None) -> Purified:
    """The (N, C, H, W) uint8 images with (N,) labels as the countermeasure `name` hands them to training.

    kept: a folder for finished parts of work that takes long; another call finds them there. Most write nothing.
    """
    config = countermeasure_config(name, parameters, "countermeasure")
    more = {"kept": kept} if name in RESUMED else {}
    return COUNTERMEASURES[name][0].purify(images, labels, config, generator=generator, **more)
