"""Units of work that stay done: what is finished is found again after an interruption."""
from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from data.files import write_json

LEDGER = "units.json"


class Units:
    """The finished units of the work in `folder`, with their seconds, kept in `units.json` there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ledger = folder / LEDGER
        self.seconds: dict[str, float] = json.loads(ledger.read_text()) if ledger.exists() else {}

    def run(self, name: str, work: Callable[[], None]) -> None:
        """Do `work` unless `name` is finished. `work` writes its files before the ledger names it."""
        if name in self.seconds:
            return
        start = time.perf_counter()
        work()
        self.seconds[name] = round(time.perf_counter() - start, 3)
        write_json(self.folder / LEDGER, self.seconds)
