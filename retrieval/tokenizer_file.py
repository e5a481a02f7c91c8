"""Reading a tokenizer's file, which may be anybody's."""
from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from data.errors import InputError


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer of the tokenizers library; a spoiled file is named in one line."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other class
        raise InputError(f"{path}: expected a tokenizer, found {error}") from error
