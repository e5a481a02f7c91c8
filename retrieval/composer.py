"""A way of composing with the texts it has encoded, and its files beside an encoder.

Files: `composer.json` (the settings) and, where these need it, `composer.safetensors` (means and bank from training
data). A folder without them composes as published.
"""
from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from data.errors import expect
from data.files import write_atomic, write_json
from data.weight_files import read_json, read_weights
from retrieval.compose import (
    NO_STATISTICS,
    PUBLISHED,
    ComposerConfig,
    Names,
    Statistics,
    compose,
    gallery_vectors,
)
from retrieval.encoder import CONFIGS, VOCABULARY, WEIGHTS, Encoder, one_of
from retrieval.prompts import TextCache

SETTINGS, STATISTICS = "composer.json", "composer.safetensors"


@dataclass(frozen=True)
class Composer:
    """Both sides of the comparison by cosine, with one config and one memory of texts."""
    encode_texts: TextCache
    config: ComposerConfig = PUBLISHED
    statistics: Statistics = NO_STATISTICS

    def queries(self, images: Tensor, added: Names, removed: Names) -> Tensor:
        """Raw query images (Q, D) and the names of their requests -> unit rows (Q, D or D + 2)."""
        return compose(images, added, removed, self.encode_texts, self.config, self.statistics)

    def gallery(self, images: Tensor) -> Tensor:
        """Raw database images (G, D) -> unit rows (G, D or D + 2)."""
        return gallery_vectors(images, self.config, self.statistics)


def load_composer(folder: Path, encoder: Encoder) -> Composer:
    """The composer whose files lie in `folder`, for texts of `encoder` and on its device."""
    config, statistics = read_settings(Path(folder) / SETTINGS), read_statistics(Path(folder) / STATISTICS)
    for name, value in _tensors(statistics).items():
        expect(value.shape[-1] == encoder.width, f"{Path(folder) / STATISTICS} {name}", f"width {encoder.width}, as "
               "the encoder has", value.shape[-1])
    on_device = {name: value.to(encoder.device) for name, value in _tensors(statistics).items()}
    return Composer(TextCache(encoder.encode_texts), config, replace(statistics, **on_device))


def save_composer(folder: Path, config: ComposerConfig, statistics: Statistics = NO_STATISTICS) -> None:
    """Write the files `load_composer` reads into a folder of an encoder; refused where some lie already."""
    for name in (SETTINGS, STATISTICS):
        expect(not (Path(folder) / name).exists(), Path(folder) / name, "a path where nothing lies yet",
               "an existing file")
    tensors = _tensors(statistics)
    if tensors:  # first: settings without what they need would fail, statistics without settings do nothing
        write_atomic(Path(folder) / STATISTICS, save({k: v.cpu().contiguous() for k, v in tensors.items()}))
    write_json(Path(folder) / SETTINGS, asdict(config))


def files_read(folder: Path) -> dict[str, Path]:
    """The files of an encoder's folder that are read, by the names that ours have."""
    found = {CONFIGS[0]: one_of(folder, CONFIGS), WEIGHTS[0]: one_of(folder, WEIGHTS)}
    return found | {name: folder / name for name in (VOCABULARY, SETTINGS, STATISTICS) if (folder / name).is_file()}


def read_settings(file: Path) -> ComposerConfig:
    """The config of a `composer.json`; published where there is none. Errors name the file and the key."""
    if not file.exists():
        return PUBLISHED
    found = read_json(file)
    expect(isinstance(found, dict), file, "a JSON object of settings", type(found).__name__)
    known = [field.name for field in fields(ComposerConfig)]
    for name, value in found.items():
        expect(name in known, file, f"settings out of {', '.join(known)}", name)
        expect(_fits(name, value), f"{file} '{name}'", _KIND[name], repr(value))
    return ComposerConfig(**found)


_KIND = {"prompts": "a list of texts", "hub_sharpness": "a number or null", "add_weight": "a number",
         "remove_weight": "a number"} | dict.fromkeys(("unit", "centre_texts", "centre_images", "project"),
                                                      "true or false")


def _fits(name: str, value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"a list of texts": isinstance(value, list) and all(isinstance(v, str) for v in value), "a number": number,
            "a number or null": number or value is None, "true or false": isinstance(value, bool)}[_KIND[name]]


def read_statistics(file: Path) -> Statistics:
    """Means and bank of a `composer.safetensors`; none where there is no file."""
    if not file.exists():
        return NO_STATISTICS
    found = read_weights(file)
    shapes = {"text_mean": 1, "image_mean": 1, "bank": 2}
    for name, value in found.items():
        expect(name in shapes, file, f"tensors out of {', '.join(shapes)}", name)
        expect(value.ndim == shapes[name] and value.dtype == torch.float32 and bool(value.isfinite().all()),
               f"{file} {name}", f"finite float32 of {shapes[name]} axes", f"{tuple(value.shape)} {value.dtype}")
    return Statistics(**found)


def _tensors(statistics: Statistics) -> dict[str, Tensor]:
    return {field.name: value for field in fields(Statistics) if (value := getattr(statistics, field.name)) is not None}
