"""Units of work that stay done: what is finished is found again after an interruption."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO

from data.errors import InputError
from data.files import write_json

try:
    import fcntl
except ImportError:  # Windows has no such locks; two equal runs at once then overwrite each other's equal files
    fcntl = None

LEDGER = "units.json"


class Units:
    """The finished units of the work in `folder`, with their seconds, kept in `units.json` there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = locked(folder.with_suffix(".lock"))
        ledger = folder / LEDGER
        self.seconds: dict[str, float] = json.loads(ledger.read_text()) if ledger.exists() else {}

    def move(self, target: Path) -> None:
        """Give the finished work its place, and the name it was worked on under to others."""
        os.replace(self.folder, target)
        self.close()

    def close(self) -> None:
        """Let other runs have the folder."""
        if self._lock.closed:
            return
        Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()

    def finish(self, name: str, seconds: float) -> None:
        """The unit's files are written: from now on it is found again."""
        self.seconds[name] = round(seconds, 3)
        write_json(self.folder / LEDGER, self.seconds)


def locked(path: Path) -> IO:
    """An open file that nobody else has locked; the lock ends when it is closed, at the latest with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"{path}: expected no other run on the same data, found one at work") from None
    return file
