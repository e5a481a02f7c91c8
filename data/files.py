"""Writing files so that nothing is ever half-written, and naming work by its content."""
from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data.errors import expect


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` to `path`: all of it or nothing. A reader never sees a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
        os.chmod(name, 0o644)  # mkstemp gives 0600; results are for everyone to read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON. NaN and infinity are refused: no reader agrees on them."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it appears as `path` when the block ends well, else not at all."""
    expect(not path.exists(), path, "a path where nothing lies yet", "an existing file or folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield scratch
        os.chmod(scratch, 0o755)
        os.replace(scratch, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def fingerprint(*parts: object) -> str:
    """Name (16 hex digits) for work: equal parts, equal name. A Path counts by its bytes, the rest by repr."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else repr(part).encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:16]


def npy_bytes(array: np.ndarray) -> bytes:
    """`array` as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
