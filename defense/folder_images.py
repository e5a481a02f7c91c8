"""The clean images of the backdoor task as tensors: a folder of `{index}_{label}.jpg` and a given transform."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data.errors import expect
from data.given_transforms import seeded_transforms, transformed
from data.model_zoo import labelled_images


def read_labelled(folder: Path | str, transformation: Callable, num_classes: int, *,
                  generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """((N, C, H, W) float32, (N,) int64) on the CPU, in the order of the names; each image transformed once.

    Raises InputError, with the file's name, for a name without a label, a label that is no class, an unreadable
    image, and a transform that fails or does not give finite floats of one shape.
    """
    folder = Path(folder)
    expect(folder.is_dir(), folder, "a folder of clean images", "no such folder")
    files = labelled_images(folder, num_classes)
    with seeded_transforms(generator=generator):
        tensors = [_transformed(path, transformation) for path, _ in files]
    for (path, _), tensor in zip(files, tensors, strict=True):
        expect(tensor.shape == tensors[0].shape, path, f"the shape {tuple(tensors[0].shape)} of {files[0][0].name}",
               tuple(tensor.shape))
    return torch.stack(tensors), torch.tensor([label for _, label in files])


def _transformed(path: Path, transformation: Callable) -> Tensor:
    tensor = transformed(path, transformation)
    right = isinstance(tensor, Tensor) and tensor.ndim == 3 and tensor.is_floating_point()
    found = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
    expect(right, path, "a transform that gives a (C, H, W) tensor of floating point", found)
    expect(tensor.isfinite().all(), path, "a transform that gives finite numbers", "NaN or infinity")
    return tensor.detach().float()
