"""The two files that the organizers' anomaly evaluation leaves: `results.csv` and `results.json`."""
from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from data.files import write_atomic
from submit.scoring import IMAGE_METRICS, PIXEL_METRICS

COLUMNS = ("Category", *PIXEL_METRICS, *IMAGE_METRICS, "leaderboard_score")  # their order


def write_results(folder: Path, parts: list[dict]) -> None:
    """Write both files into `folder` from the metrics in percent of the categories that have masks.

    The organizers' evaluation cannot read a category without masks, so such a one is left out here too.
    """
    rows = [[part["category"], *(part[name] for name in COLUMNS[1:])] for part in parts if not part["images_only"]]
    if not rows:
        return
    rows.append(["mean", *(sum(column) / len(rows) for column in list(zip(*rows, strict=True))[1:])])
    table = io.StringIO(newline="")
    csv.writer(table).writerows([COLUMNS, *rows])
    metadata = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    write_atomic(folder / "results.csv", table.getvalue())
    write_atomic(folder / "results.json", json.dumps({"result": rows[-1][-1], "metadata": metadata}, indent=4))
