"""`report`: the page of some runs, and on the terminal their times against the limits."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from submit.report import Limit, newest_score, seconds, write_report
from submit.submission import plain
from submit.tables import print_record


def report(runs: Sequence[Path], out: Path | None, folder: Path, *, force: bool, as_json: bool) -> None:
    """Write the page of `runs`, or of the newest scored run in `folder`; without `out` it lies in the first run."""
    runs = list(runs) or [newest_score(folder)]
    made = write_report(runs, out or (runs[0] if runs[0].is_dir() else runs[0].parent) / "report.html", force=force)
    if as_json:
        print_record({"path": str(made.path), "bytes": made.bytes, "notes": list(made.notes),
                      "limits": [{"what": limit.what, "machine": limit.machine, "seconds": list(limit.seconds),
                                  "limit_s": limit.limit, "verdict": limit.verdict} for limit in made.limits]})
        return
    for limit in made.limits:
        print(plain(limit_line(limit)))
    for note in made.notes:
        print(plain(f"note: {note}"))
    print(plain(f"report: {made.path} ({made.bytes / 2**20:.1f} MiB)"))


def limit_line(limit: Limit) -> str:
    low, high = limit.seconds
    took = seconds(low) if low == high else f"{seconds(low)} - {seconds(high)}"
    return f"{limit.what}: {took} of {seconds(limit.limit)} on {limit.machine}: {limit.verdict}"
