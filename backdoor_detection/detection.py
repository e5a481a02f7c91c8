"""From a model and a folder of clean images to a verdict: draw images, move features, test the margins."""
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms import Compose, Resize

from backdoor_detection.margins import ReportConfig, SplitModel, class_margins
from backdoor_detection.outlier import outlier_p_value
from data.devices import chosen_device
from data.errors import InputError, expect
from data.images import list_images, read_rgb

SEED = 0  # of the images drawn for a shipped verdict


@dataclass(frozen=True)
class Detection:
    """p_value: of the largest margin, small = suspicious. margins: (K,) CPU. suspect: its class."""

    backdoored: bool
    p_value: float
    margins: Tensor
    suspect: int


def detect(model: nn.Module, num_classes: int, images_folder: Path | str, transformation: Callable,
           config: ReportConfig, *, generator: torch.Generator) -> Detection:
    """Judge `model` on its own device. Model, transform and global random state stay as they are.

    generator: on the CPU. Raises InputError for a folder without images, an unreadable image, a transform
    that gives unequal shapes, and a class count that is not the model's.
    """
    expect(num_classes >= 2, "num_classes", ">= 2", num_classes)
    split = SplitModel(model)
    outputs = getattr(model.linear, "out_features", num_classes)
    expect(outputs == num_classes, "num_classes", f"{outputs}, as the model puts out", num_classes)
    folder = Path(images_folder)
    expect(folder.is_dir(), folder, "a folder of clean images", "no such folder")
    paths = list_images(folder)
    expect(paths, folder, "at least one image", "none")
    draws = [draw_images(len(paths), config.images, generator=generator) for _ in range(num_classes)]
    used, places = torch.cat(draws).unique(return_inverse=True)
    device = next(model.parameters()).device
    pixels = _read_transformed([paths[i] for i in used.tolist()], with_size(transformation, config.size),
                               generator=generator)
    takes = getattr(model.conv1, "in_channels", pixels.shape[1])
    expect(pixels.shape[1] == takes, folder, f"{takes} channels, as the model takes", pixels.shape[1])
    with torch.no_grad():
        features = torch.cat([split.stem(part.to(device)) for part in pixels.split(config.images)])
    margins = class_margins(split.trunk, features, places.to(device).split(config.images), config).cpu()
    p_value = outlier_p_value(margins)
    return Detection(p_value < config.alarm, p_value, margins, int(margins.argmax()))


def judge(model: nn.Module, num_classes: int, images_folder: Path | str, transformation: Callable) -> Detection:
    """The shipped verdict: the report's numbers, a fixed draw of images, a copy of `model` on the chosen device."""
    generator = torch.Generator().manual_seed(SEED)
    on_device = copy.deepcopy(model).to(chosen_device())
    return detect(on_device, num_classes, images_folder, transformation, ReportConfig(), generator=generator)


def draw_images(available: int, count: int, *, generator: torch.Generator) -> Tensor:
    """(count,) positions: without replacement where enough images are available, else with."""
    if available >= count:
        return torch.randperm(available, generator=generator)[:count]
    return torch.randint(available, (count,), generator=generator)


def with_size(transformation: Callable, size: int) -> Callable:
    """The transform with every Resize set to (size, size); a copy, and unchanged where there is none."""
    if isinstance(transformation, Compose):
        return Compose([with_size(part, size) for part in transformation.transforms])
    if isinstance(transformation, Resize):
        transformation = copy.copy(transformation)
        transformation.size = (size, size)
    return transformation


def _transformed(path: Path, transformation: Callable) -> object:
    """A given transform may fail in any way; it comes from a stranger."""
    image = read_rgb(path)
    try:
        return transformation(image)
    except Exception as error:
        raise InputError(f"{path}: expected a transform that takes this image, "
                         f"found {type(error).__name__}: {error}") from None


def _read_transformed(paths: list[Path], transformation: Callable, *, generator: torch.Generator) -> Tensor:
    """(N, C, H, W) float: each image read as RGB and transformed once."""
    seed = int(torch.randint(1 << 31, (), generator=generator))
    with torch.random.fork_rng(devices=[]):  # a given transform may be random; it draws from the global generator
        torch.manual_seed(seed)
        tensors = [_transformed(path, transformation) for path in paths]
    for path, tensor in zip(paths, tensors, strict=True):
        if not (isinstance(tensor, Tensor) and tensor.ndim == 3):
            raise InputError(f"{path}: expected a transform that gives a (C, H, W) tensor, "
                             f"found {type(tensor).__name__}")
        expect(tensor.shape == tensors[0].shape, path, f"shape {tuple(tensors[0].shape)} after the transform",
               tuple(tensor.shape))
    return torch.stack(tensors)
