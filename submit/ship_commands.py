"""`package`, `check` and `run`: a submission made, looked through, and run as the judge does."""
from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from submit.rules import rules, use_rules
from submit.tables import console, print_record


def package(task: str, out: Path, *, preset: str, weights: Path | None, half: bool, rules: Path | None,
            as_json: bool) -> None:
    """Write a submission; say where it lies and how large it is."""
    from submit.package import Choice, build_package

    use_rules(rules)
    made = build_package(task, out, Choice(preset, weights, half))
    if as_json:
        print_record(asdict(made) | {"folder": str(made.folder), "archive": str(made.archive)})
        return
    console().print(f"{made.folder}: {len(made.files)} files, {made.bytes} bytes{_of_limit(task)}")
    console().print(f"{made.archive}: {made.archive_bytes} bytes")


def _of_limit(task: str) -> str:
    limit = rules(task).limits.package_bytes
    return f" (limit {limit})" if limit else ""
