"""The contest report's detector, faithful: the baseline that the shipped one is compared with."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from backdoor_detection.clean_images import draw_images, image_paths, read_transformed
from backdoor_detection.margins import ReportConfig, class_margins
from backdoor_detection.outlier import outlier_p_value
from backdoor_detection.split_model import SplitModel, check_classes, input_channels


@dataclass(frozen=True)
class ReportedDetection:
    """p_value: of the largest margin, small = suspicious. margins: (K,) CPU. suspect: its class."""

    backdoored: bool
    p_value: float
    margins: Tensor
    suspect: int


def detect(model: nn.Module, num_classes: int, images_folder: Path | str, transformation: Callable,
           config: ReportConfig, *, generator: torch.Generator) -> ReportedDetection:
    """Judge `model` on its own device. Model, transform and global random state stay as they are.

    generator: on the CPU. Raises InputError for a folder without images, an unreadable image, a transform
    that fails or gives something else, and a class count that is not the model's.
    """
    split = SplitModel(model)
    check_classes(model, num_classes)
    paths = image_paths(images_folder)
    draws = [draw_images(len(paths), config.images, generator=generator) for _ in range(num_classes)]
    used, places = torch.cat(draws).unique(return_inverse=True)
    device = next(model.parameters()).device
    pixels = read_transformed([paths[i] for i in used.tolist()], transformation, size=config.size,
                              channels=input_channels(model), generator=generator)
    with torch.no_grad():
        features = torch.cat([split.stem(part.to(device)) for part in pixels.split(config.images)])
    margins = class_margins(split.trunk, features, places.to(device).split(config.images), config).cpu()
    p_value = outlier_p_value(margins)
    return ReportedDetection(p_value < config.alarm, p_value, margins, int(margins.argmax()))
