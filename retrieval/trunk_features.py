"""Features of the frozen image trunk, computed once and kept in a file that is mapped into memory.

What stands behind the pooling and the LayerNorm of the trunk and before its head: F numbers an image (1,024 for
ViTamin-L-384, 4 KB). The trunk runs in eval mode, so the same image always gives the same feature; a random crop, a
change of colour or an unfrozen trunk would break that.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data.errors import InputError, expect
from data.files import fingerprint, write_json
from data.images import read_rgb
from retrieval.encoder import Encoder


def trunk_and_head(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """The frozen part and the linear layer behind it of an open_clip image tower on a timm net."""
    visual = model.visual
    trunk, head = getattr(visual, "trunk", None), getattr(visual, "head", nn.Identity())
    layers = [layer for layer in head.modules() if list(layer.parameters(recurse=False))]
    fits = trunk is not None and len(layers) == 1 and isinstance(layers[0], nn.Linear) and layers[0].bias is None
    expect(fits, "image tower", "a timm trunk and a head of one linear layer without bias", type(visual).__name__)
    return trunk, layers[0]


def trunk_features(encoder: Encoder, images: Sequence | Tensor, folder: Path, *, names: Sequence[object],
                   opened: Callable[..., Image.Image] = lambda image: image) -> Tensor:
    """Features (N, F) float32 on the CPU, mapped from a file in `folder`; a copy in memory changes, the file never.

    images, opened: as for `Encoder.encode_images`. names (N): what tells these images from others, such as
    `file_names(paths)`. The file is named after trunk, preprocessing and names: others get a file of their own. An
    interrupted call goes on with the image after the last block that was written.
    """
    expect(len(names) == len(images) > 0, "names", f"one an image, {len(images)}, at least one", len(names))
    trunk, head = trunk_and_head(encoder.model)
    file = Path(folder) / f"features-{_key(encoder, trunk, names)}.npy"
    done_file = file.with_suffix(".json")
    shape = len(images), head.in_features
    done = _done(file, done_file, shape)
    if done < len(images):
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = np.lib.format.open_memmap(file, "r+" if done else "w+", np.float32, shape)
        for block in encoder.inputs(images[done:], opened=opened):
            with torch.no_grad():
                found = trunk(block).float().cpu().numpy()
            rows[done:done + len(found)] = found
            done += len(found)
            rows.flush()  # before the count that vouches for it
            write_json(done_file, {"done": done, "of": len(images)})
        del rows
    return torch.from_numpy(np.load(file, mmap_mode="c"))  # c: torch wants to be able to write


def file_names(paths: Sequence[str | os.PathLike]) -> list[tuple[str, int, int]]:
    """What tells the image files from others without reading them: path, size, time of the last change."""
    stats = [os.stat(path) for path in paths]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]


def read_row(item: tuple[object, str]) -> Image.Image:
    """The image of (where it is named, path); an error says where."""
    where, path = item
    try:
        return read_rgb(path)
    except InputError as error:
        raise InputError(f"{where} {error}") from None


def first_of_equals(features: Tensor) -> Tensor:
    """For each row (N, F) the index of the first row equal to it: (N,) int64. Copies of an image become one."""
    first: dict[bytes, int] = {}
    return torch.tensor([first.setdefault(row.tobytes(), i) for i, row in enumerate(features.numpy())])


def _key(encoder: Encoder, trunk: nn.Module, names: Sequence[object]) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(chain(trunk.named_parameters(), trunk.named_buffers())):
        digest.update(name.encode() + weight.detach().cpu().float().numpy().tobytes())
    return fingerprint(digest.hexdigest(), asdict(encoder.preprocess), list(names))


def _done(file: Path, done_file: Path, shape: tuple[int, int]) -> int:
    """Images already written; 0 where the two files do not tell, and then the work starts anew."""
    try:
        done = json.loads(done_file.read_text())["done"]
        rows = np.load(file, mmap_mode="r")
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return done if rows.shape == shape and isinstance(done, int) and 0 <= done <= shape[0] else 0
