"""The nets in use: the embedded ones, or those of a folder laid out as `retrieval/weights`: DIR/encoder, DIR/parser.

The organizers' signatures have no room for a folder: $KIT_RETRIEVAL_WEIGHTS names it, which
`python -m submit score retrieval --weights DIR` sets. A part that the folder lacks is the embedded one.
"""
from __future__ import annotations

import os
import re
import warnings
from functools import lru_cache
from pathlib import Path

import pandas as pd
import torch

from data.devices import chosen_device
from data.errors import expect
from retrieval.parser import Modification, Parser, load_parser, parse

WEIGHTS = "KIT_RETRIEVAL_WEIGHTS"
PARTS = ("encoder", "parser")


def weight_folders(weights: Path | None) -> dict[str, Path]:
    """The parts that a folder of weights holds, each with its own folder. Errors: it holds none of them."""
    if weights is None:
        return {}
    found = {part: weights / part for part in PARTS if (weights / part).is_dir()}
    expect(found, weights, "a folder encoder/ or parser/ in it", "neither")
    return found


def chosen_folder(part: str) -> Path | None:
    """Where the weights of a part lie that $KIT_RETRIEVAL_WEIGHTS names; None = the embedded ones."""
    named = os.environ.get(WEIGHTS)
    return weight_folders(Path(named) if named else None).get(part)


def read_requests(texts: pd.Series) -> list[Modification]:
    """What each row's text asks for; an empty one, or none, asks for nothing. Warnings name rows as the index does."""
    asked = [position for position, text in enumerate(texts) if not pd.isna(text) and str(text).strip()]
    found = [Modification()] * len(texts)
    if asked:
        parsed = _parsed([str(texts.iloc[i]) for i in asked], [texts.index[i] for i in asked])
        for position, request in zip(asked, parsed, strict=True):
            found[position] = request
    return found


def _parsed(texts: list[str], rows: list[object]) -> list[Modification]:
    folder = chosen_folder("parser")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = parse(texts) if folder is None else _parser(folder, chosen_device()).parse(texts)
    for warning in caught:  # the parser counts the texts it is given, from 0
        message = re.sub(r"(?<=^text in row )\d+", lambda match: str(rows[int(match[0])]), str(warning.message))
        warnings.warn(message, warning.category, stacklevel=4)
    return found


@lru_cache(maxsize=1)
def _parser(folder: Path, device: torch.device) -> Parser:
    return load_parser(folder, device)
