"""Settings in TOML files."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from data.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path, what: str = "TOML") -> dict[str, Any]:
    """The tables of an existing file. what: what its text should be, named where it is no TOML in UTF-8."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected {what}, found {error}") from None
