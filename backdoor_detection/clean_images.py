"""The given clean images as a network takes them, with all that the given transform tells about pixel space.

The folder and the transform come with a model from strangers: labels may be missing, files grey, sizes unequal.
"""
from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import Compose, Normalize, Resize

from data.errors import expect
from data.given_transforms import seeded_transforms, transformed
from data.images import list_images

LIMIT = 512    # images read at most: at 128x128 pixels 100 MB
UNKNOWN = -1   # label of an image whose name does not tell


@dataclass(frozen=True)
class CleanImages:
    """pixels: (N, C, H, W) float32 as the model takes them. labels: (N,) int64, -1 unknown. mean, std: (C,).

    All on the CPU. `pixels * std + mean` lies in [0, 1] wherever the transform normalises last.
    """

    pixels: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def unit(self) -> Tensor:
        """(N, C, H, W): the same images with the normalisation undone, cut to [0, 1]."""
        return (self.pixels * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)


def read_clean_images(folder: Path | str, transformation: Callable, *, size: int | None, channels: int,
                      generator: torch.Generator, limit: int = LIMIT) -> CleanImages:
    """The images of `folder` in the order of their names, at most `limit` of them, each transformed once.

    size: pixels a side that replace the size of every Resize, None to keep it. channels: as the model takes.
    A larger folder is drawn from by `generator`, as many of each label as possible. Images of unequal size
    after the transform are resized to the commonest. The transform stays as it is.
    Raises InputError for a folder without images, an unreadable image, and a transform that fails or gives no
    finite (C, H, W) float tensor of 1, 3 or `channels` channels.
    """
    expect(limit >= 1, "limit", ">= 1 image", limit)
    paths = image_paths(folder)
    labels = [label_of(path) for path in paths]
    chosen = draw_balanced(labels, limit, generator=generator)
    pixels = read_transformed([paths[i] for i in chosen], transformation, size=size, channels=channels,
                              generator=generator)
    mean, std = pixel_scale(transformation, channels)
    return CleanImages(pixels, torch.tensor([labels[i] for i in chosen]), mean, std)


def image_paths(folder: Path | str) -> list[Path]:
    """The images of `folder` sorted by name; InputError where there are none."""
    folder = Path(folder)
    expect(folder.is_dir(), folder, "a folder of clean images", "no such folder")
    paths = list_images(folder)
    expect(paths, folder, "at least one image", "none")
    return paths


def label_of(path: Path) -> int:
    """The label in a name like 12_3.jpg (index, label), else -1."""
    found = re.fullmatch(r"\d+_(\d{1,9})", path.stem)
    return int(found[1]) if found else UNKNOWN


def draw_images(available: int, count: int, *, generator: torch.Generator) -> Tensor:
    """(count,) positions: without replacement where enough images are available, else with."""
    if available >= count:
        return torch.randperm(available, generator=generator)[:count]
    return torch.randint(available, (count,), generator=generator)


def draw_balanced(labels: Sequence[int], limit: int, *, generator: torch.Generator) -> list[int]:
    """min(limit, N) positions, ascending: from each label in turn one, until there are enough."""
    if len(labels) <= limit:
        return list(range(len(labels)))
    taken: Counter[int] = Counter()
    turns = []
    for i in torch.randperm(len(labels), generator=generator).tolist():
        turns.append((taken[labels[i]], i))
        taken[labels[i]] += 1
    turns.sort(key=lambda turn: turn[0])  # stable: within a turn the random order stays
    return sorted(i for _, i in turns[:limit])


def with_size(transformation: Callable, size: int) -> Callable:
    """The transform with every Resize set to (size, size); a copy, and unchanged where there is none."""
    if isinstance(transformation, Compose):
        return Compose([with_size(part, size) for part in transformation.transforms])
    if isinstance(transformation, Resize):
        transformation = copy.copy(transformation)
        transformation.size = (size, size)
    return transformation


def pixel_scale(transformation: Callable, channels: int) -> tuple[Tensor, Tensor]:
    """(channels,) mean and std of the transform's last Normalize, 0 and 1 without one.

    Where `fit_channels` averaged, x * std + mean is the mean of the unnormalised channels weighted by 1 / std,
    which again lies in [0, 1].
    """
    last = _last_normalize(transformation)
    if last is None:
        return torch.zeros(channels), torch.ones(channels)
    mean, std = torch.broadcast_tensors(*(torch.as_tensor(part, dtype=torch.float32).flatten()
                                          for part in (last.mean, last.std)))
    if len(mean) not in (1, channels):
        mean, std = (mean / std).mean() / (1 / std).mean(), 1 / (1 / std).mean()
    return mean.expand(channels).clone(), std.expand(channels).clone()


def _last_normalize(transformation: Callable) -> Normalize | None:
    if isinstance(transformation, Compose):
        found = [_last_normalize(part) for part in transformation.transforms]
        return next((part for part in reversed(found) if part is not None), None)
    return transformation if isinstance(transformation, Normalize) else None


def read_transformed(paths: Sequence[Path], transformation: Callable, *, size: int | None, channels: int,
                     generator: torch.Generator) -> Tensor:
    """(N, channels, H, W) float32: each image read as RGB and transformed once; `read_clean_images` says more."""
    if size is not None:
        transformation = with_size(transformation, size)
    with seeded_transforms(generator=generator):
        tensors = [_transformed(path, transformation) for path in paths]
    return _stacked([fit_channels(tensor, channels, path) for path, tensor in zip(paths, tensors, strict=True)])


def _transformed(path: Path, transformation: Callable) -> Tensor:
    """(C, H, W) float32."""
    tensor = transformed(path, transformation)
    wanted = "a transform that gives a (C, H, W) tensor"
    expect(isinstance(tensor, Tensor), path, wanted, type(tensor).__name__)
    expect(tensor.ndim == 3 and tensor.numel() > 0, path, wanted, f"shape {tuple(tensor.shape)}")
    expect(tensor.is_floating_point(), path, wanted + " of floating point", tensor.dtype)
    expect(tensor.isfinite().all(), path, "a transform that gives finite numbers", "NaN or infinity")
    return tensor.detach().float()


def fit_channels(tensor: Tensor, channels: int, where: object) -> Tensor:
    """(channels, H, W): one channel is repeated, several are averaged to one; else InputError."""
    given = len(tensor)
    if given == channels:
        return tensor
    expect(1 in (given, channels), where, f"{channels} channels, as the model takes", given)
    return tensor.expand(channels, -1, -1) if given == 1 else tensor.mean(0, keepdim=True)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """(N, C, H, W); an image of another size than the commonest (of equals, the first) is resized to it."""
    (common, _), = Counter(tuple(tensor.shape[1:]) for tensor in tensors).most_common(1)
    return torch.stack([tensor if tensor.shape[1:] == common else _resized(tensor, common) for tensor in tensors])


def _resized(tensor: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(tensor[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
