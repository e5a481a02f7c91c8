"""`package`, `check` and `run`: a submission made, looked through, and run as the judge does."""
from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from data.errors import expect
from data.files import write_json
from submit.rules import place, use_rules
from submit.rules import rules as rules_of
from submit.submission import Verdict, plain
from submit.tables import DEV_NOTE, console, print_record

COLUMN, RUN_COLUMN = 13, 15  # characters of a rule's name


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
        if resolve:
            print("asking pip for the requirements: minutes where it downloads them to read what they need",
                  file=sys.stderr)
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


def run(path: Path, *, data: Path | None, task: str | None, tier: str, python: Path | None, runs: Path, seed: int,
        rules: Path | None, command: str, as_json: bool) -> int:
    """Run a folder or zip as the judge does and score it; one line a verdict. Returns how many are broken.

    runs: the folder of this run alone, which is not there yet; nor is it later where the run does not come to its end.
    """
    from submit.checks import opened
    from submit.dev_splits import dev_split
    from submit.judge_run import Judge, run_submission
    from submit.sandbox import best_tier
    from submit.score_run import Outcome, finish_run

    use_rules(rules)
    judge = Judge(best_tier(tier), _interpreter(python), seed)
    expect(Path(judge.python).is_file(), "--python", "an interpreter", judge.python)
    with opened(path, task) as submission:
        task = submission.task
        given = data or dev_split(task, seed)
        try:
            judged = run_submission(submission, given, runs / "predictions" / task, judge)
        except BaseException:  # also an interruption: what is there has no record
            shutil.rmtree(runs, ignore_errors=True)
            raise
    outcome = None if judged.result is None else Outcome(
        task, judged.result, judged.seconds, place(judged.result.value, rules_of(task).leaderboard), data is None,
        judged.problems, None, given, runs / "predictions" / task)
    record = finish_run(runs, [outcome] if outcome else [], command=command, seed=seed, device="auto")
    record["judge"] = {"package": str(path), "tier": judged.tier, "python": judge.python,
                       "verdicts": [asdict(line) for line in judged.lines]}
    write_json(runs / "record.json", record)
    broken = sum(not line.ok for line in judged.lines)
    if as_json:
        print_record(record)
        return broken
    for line in judged.lines:
        print(plain(f"{'ok      ' if line.ok else 'broken  '}{line.rule:<{RUN_COLUMN}} {line.text}"))
    for problem in judged.problems:
        print(plain(f"not given: {problem}"), file=sys.stderr)
    if data is None:
        print(DEV_NOTE)
    print(plain(f"{path}: {task}, {broken} broken; record: {runs / 'record.json'}"))
    return broken


def _interpreter(python: Path | None) -> str:
    """The path of an interpreter: this one, or one by its path or by a name that the shell knows."""
    found = shutil.which(str(python)) if python else None
    return os.path.abspath(found) if found else str(python.absolute()) if python else sys.executable


def result_lines(verdict: Verdict) -> list[str]:
    """One line for each breach of a rule, or one that says what was looked at."""
    if not verdict.broken:
        return [f"ok      {verdict.rule:<{COLUMN}} {verdict.looked_at}"]
    return [f"broken  {verdict.rule:<{COLUMN}} {b.where}: {b.found}; {b.mend}" for b in verdict.broken]


def _of_limit(task: str) -> str:
    limit = rules_of(task).limits.package_bytes
    return f" (limit {limit})" if limit else ""
