"""Image files of any common kind to plain 8-bit RGB, with one clear error for those that cannot be read."""
from __future__ import annotations

import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.errors import InputError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif"})


def read_rgb(path: Path | str, *, upright: bool = True) -> Image.Image:
    """The image as RGB, fully decoded; EXIF orientation is applied unless `upright` is False.

    Gray, gray with alpha, RGBA, palette, 16-bit, 1-bit and CMYK images are converted: alpha is dropped
    (as the organizers' `convert("RGB")` does), 16-bit values keep their upper byte.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image) if upright else image)
    except FileNotFoundError:
        raise InputError(f"{path}: expected an image, found no such file") from None
    except Exception as error:  # decoders of strangers' files fail in many ways: struct.error, RuntimeError, ...
        reason = str(error).replace(f" {str(path)!r}", "")
        raise InputError(f"{path}: expected a readable image, found {reason}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray: "RGB" would clip it at 255
        levels = np.asarray(image, dtype=np.int64)
        image = Image.fromarray((levels >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about the palette's alpha
    return image.convert("RGB")


def to_uint8(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def list_images(folder: Path) -> list[Path]:
    """The image files directly in `folder`, sorted by name; hidden files and other kinds are left out."""
    return sorted(p for p in Path(folder).iterdir()
                  if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def find_unreadable(paths: Iterable[Path]) -> dict[Path, InputError]:
    """The files among `paths` that `read_rgb` refuses, each with its reason. Decodes in threads."""
    distinct = sorted({Path(p) for p in paths})
    with ThreadPoolExecutor() as pool:
        return {p: e for p, e in zip(distinct, pool.map(_reading_error, distinct), strict=True) if e}


def _reading_error(path: Path) -> InputError | None:
    try:
        read_rgb(path)
    except InputError as error:
        return error
    return None
