"""`package`, `check` and `run`: a submission made, looked through, and run as the judge does."""
from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from submit.rules import rules, use_rules
from submit.submission import Verdict, plain
from submit.tables import console, print_record

COLUMN = 13  # characters of a rule's name


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


def check(path: Path, *, task: str | None, resolve: bool, rules: Path | None, as_json: bool) -> int:
    """Look a folder or zip through; one line a result. Returns how many breaches there are."""
    from submit.checks import check as look_through
    from submit.checks import opened

    use_rules(rules)
    with opened(path, task) as submission:
        verdicts = look_through(submission, resolve=resolve)
        task = submission.task
    broken = sum(len(verdict.broken) for verdict in verdicts)
    if as_json:
        print_record({"task": task, "path": str(path), "broken": broken, "rules": [asdict(v) for v in verdicts]})
        return broken
    for verdict in verdicts:
        for line in result_lines(verdict):
            print(plain(line))
    print(plain(f"{path}: {task}, {len(verdicts)} rules, {broken} broken"))
    return broken


def result_lines(verdict: Verdict) -> list[str]:
    """One line for each breach of a rule, or one that says what was looked at."""
    if not verdict.broken:
        return [f"ok      {verdict.rule:<{COLUMN}} {verdict.looked_at}"]
    return [f"broken  {verdict.rule:<{COLUMN}} {b.where}: {b.found}; {b.mend}" for b in verdict.broken]


def _of_limit(task: str) -> str:
    limit = rules(task).limits.package_bytes
    return f" (limit {limit})" if limit else ""
