"""Poisoned and purified training sets as files."""
from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.tensor_files import read_tensors, write_tensors
from defense.purified import Purified
from submit.kept_units import as_json

PURIFIED = ("method", "complete", "failed", "losses", "seconds", "details")


def write_set(path: Path, images: Tensor, record: dict[str, Any]) -> None:
    """(N, C, H, W) images of any type, and what is told about them."""
    write_tensors(path, {"images": images}, as_json(record))


def read_set(path: Path, shape: torch.Size) -> tuple[Tensor, dict[str, Any]] | None:
    """Images of this shape, on the CPU, and their record; None where there is no such file, or a spoiled one."""
    found = read_tensors(path)
    images = found[0].get("images") if found else None
    usable = images is not None and images.shape == shape and images.dtype in (torch.uint8, torch.float32)
    return (images, found[1]) if usable else None


def write_purified(path: Path, found: Purified) -> None:
    """What a victim is trained on; without the perturbations, and not for what changes every batch of the training."""
    write_set(path, found.images, {key: getattr(found, key) for key in PURIFIED})


def remove_stages(folder: Path) -> None:
    """What a countermeasure kept while it worked. A folder in which another process is writing stays."""
    for path in folder.glob("stage*"):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def read_purified(path: Path, like: Tensor) -> Purified | None:
    """On the device of `like`, the images that were purified; None where there is none."""
    found = read_set(path, like.shape)
    if found is None or found[1].keys() != set(PURIFIED):
        return None
    return Purified(images=found[0].to(like.device), **found[1])
