"""Every rule of a task, each one function, over a folder or zip that somebody wants to submit."""
from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.errors import InputError
from submit import check_files, check_source
from submit.package import unpack
from submit.rules import rules
from submit.submission import Broken, Rule, Submission, Verdict, read_submission

UNPACKED_LIMIT = 20 * 10**9  # bytes of a zip's content where the contest names no limit

RULES: dict[str, Rule] = {
    "size": check_files.size,
    "files": check_files.files,
    "executable": check_files.executable,
    "links": check_files.links,
    "unneeded": check_files.unneeded,
    "container": check_files.container,
    "weights": check_files.pickles,
    "syntax": check_source.syntax,
    "functions": check_files.functions,
    "modules": check_source.modules,
    "names": check_files.shadows,
    "requirements": check_source.requirements,
    "models": check_source.kinds_of_models,
    "downloads": check_source.downloads,
    "network": check_source.network,
    "file access": check_source.file_access,
    "constants": check_source.tuned_constants,
    "paths": check_source.absolute_paths,
}
RESOLVED = {"resolution": check_source.resolution}  # asks the package index


def check(package: Submission, *, resolve: bool = False) -> list[Verdict]:
    """The verdict of each rule. One that needs source which is no Python is broken by that."""
    return [_verdict(name, rule, package) for name, rule in (RULES | (RESOLVED if resolve else {})).items()]


def _verdict(name: str, rule: Rule, package: Submission) -> Verdict:
    try:
        looked_at, breaches = rule(package)
        return Verdict(name, tuple(breaches), looked_at)
    except InputError as error:
        where, _, found = str(error).partition(": expected ")
        inside = where.removeprefix(f"{package.root}/")
        return Verdict(name, (Broken(inside, f"expected {found}", "the rule cannot be checked before"),), "")


@contextmanager
def opened(path: Path, task: str | None) -> Iterator[Submission]:
    """The submission in a folder or in a zip, which is unpacked for as long as it is looked at."""
    if not path.is_file():
        yield read_submission(path, task)
        return
    limit = (rules(task).limits.package_bytes if task else None) or UNPACKED_LIMIT
    with tempfile.TemporaryDirectory() as scratch:
        unpack(path, Path(scratch) / "package", max(limit, UNPACKED_LIMIT))
        yield read_submission(Path(scratch) / "package", task)
