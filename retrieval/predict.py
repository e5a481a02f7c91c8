"""The organizers' two functions: a request and its image, and the images of the database, as unit vectors.

Cosine and argmax between the two, done by the judge, give the answer. Which nets are used: `retrieval.nets`.
"""
from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from data.devices import chosen_device
from data.errors import InputError, expect
from data.images import read_rgb
from retrieval.composer import Composer, load_composer
from retrieval.encoder import EMBEDDED, Encoder, load_encoder
from retrieval.nets import chosen_folder, read_requests


def encode_queries(df: pd.DataFrame) -> np.ndarray:
    """Where the answer to each row should lie: (Q, D) float32, unit length, in the order of the rows.

    df: `query_image`, paths ready to open, and `query_text`. An empty text asks for the query image itself; of one
    that is longer than the parser reads, a warning names the row. No rows give (0, D). Errors: a missing column, an
    image that cannot be read (named with its row).
    """
    _expect_columns(df, "query_image", "query_text")
    requests = read_requests(df["query_text"])
    images = _encode_files(_encoder(chosen_device()), df["query_image"])
    added, removed = [request.add for request in requests], [request.remove for request in requests]
    return _array(_composer(chosen_device()).queries(images, added, removed))


def encode_database(df: pd.DataFrame) -> np.ndarray:
    """The images of the database: (G, D) float32, unit length, in the order of the rows.

    df: `target_image`, paths ready to open; a path that stands in several rows is read once. No rows give (0, D).
    Errors: as for `encode_queries`.
    """
    _expect_columns(df, "target_image")
    images = _encode_files(_encoder(chosen_device()), df["target_image"])
    return _array(_composer(chosen_device()).gallery(images))


def _encoder(device: torch.device) -> Encoder:
    return _loaded(chosen_folder("encoder"), device)[0]


def _composer(device: torch.device) -> Composer:
    return _loaded(chosen_folder("encoder"), device)[1]


@lru_cache(maxsize=1)
def _loaded(folder: Path | None, device: torch.device) -> tuple[Encoder, Composer]:
    # without a folder none is passed on: a submission puts its own loader in place of this one
    encoder = load_encoder(device=device) if folder is None else load_encoder(folder, device=device)
    return encoder, load_composer(folder or EMBEDDED, encoder)


def _encode_files(encoder: Encoder, column: pd.Series) -> Tensor:
    """Raw embeddings (N, D) of the column's images; each distinct path is read and encoded once."""
    which, paths = pd.factorize(column, use_na_sentinel=False)
    first = column.index[~column.duplicated()]

    def opened(item: tuple[object, object]) -> Image.Image:
        row, path = item
        try:
            expect(isinstance(path, str | os.PathLike), repr(path), "the path of an image", "none")
            return read_rgb(path)
        except InputError as error:
            raise InputError(f"row {row} '{column.name}' {error}") from None

    distinct = encoder.encode_images(zip(first, paths, strict=True), opened=opened)
    return distinct[torch.from_numpy(which).to(distinct.device)]


def _expect_columns(df: pd.DataFrame, *names: str) -> None:
    missing = [name for name in names if name not in df.columns]
    expect(not missing, "columns", ", ".join(names), ", ".join(map(str, df.columns)) or "none")


def _array(vectors: Tensor) -> np.ndarray:
    return vectors.cpu().numpy()
