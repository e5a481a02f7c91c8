"""A folder that somebody wants to submit, as the rules see it, and what a rule says about it."""
from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data.errors import InputError, expect
from submit.import_closure import Closure, Place, import_closure
from submit.rules import TASKS, Rules, rules
from submit.source_search import Source, read_source

GIT = (".git", ".gitattributes", ".gitignore")


@dataclass(frozen=True)
class Broken:
    """One breach: where it is (relative to the package), what was found there, how to mend it."""

    where: str
    found: str
    mend: str


@dataclass(frozen=True)
class Verdict:
    """What one rule says: the breaches, or what it looked at."""

    rule: str
    broken: tuple[Broken, ...]
    looked_at: str


@dataclass(frozen=True)
class Submission:
    root: Path
    task: str
    rules: Rules

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Everything that is no folder, links not followed, sorted; without what git keeps at the root of a clone."""
        found = [Path(parent, name) for parent, folders, names in os.walk(self.root)
                 for name in (*names, *(f for f in folders if Path(parent, f).is_symlink()))]
        return tuple(sorted(path for path in found if path.relative_to(self.root).parts[0] not in GIT))

    @property
    def code(self) -> Path:
        return self.root / self.rules.package.code

    @cached_property
    def regular(self) -> tuple[Path, ...]:
        """The files that are neither links nor devices: those that may be opened."""
        return tuple(path for path in self.files if not path.is_symlink() and path.is_file())

    @cached_property
    def scripts(self) -> tuple[Path, ...]:
        return tuple(path for path in self.regular if path.suffix in (".sh", ".bash"))

    @cached_property
    def entries(self) -> dict[str, Path]:
        """The modules that run first: those the judge calls, and those that a script starts."""
        called = [self.root / name for name in (*self.rules.package.functions, *self.rules.package.files)
                  if name.endswith(".py")]
        called += [self.root / name for script in self.scripts for name in started(script)]
        wanted = {path.resolve() for path in called}
        found = [path for path in self.regular if path.resolve() in wanted]
        return {path.stem: path for path in found}

    @cached_property
    def closure(self) -> Closure:
        return import_closure(self.entries, self.code)

    @cached_property
    def sources(self) -> list[Source]:
        """The modules that the entries need."""
        return [read_source(file, name) for name, file in self.closure.modules.items()]

    def inside(self, path: Path | Place, line: int | None = None) -> str:
        """`path` relative to the package, with its line."""
        if isinstance(path, Place):
            path, line = path.file, path.line
        name = path.relative_to(self.root).as_posix()
        return f"{name}:{line}" if line else name


Rule = Callable[[Submission], tuple[str, Iterator[Broken]]]


def started(script: Path) -> list[str]:
    """Python files that a shell script starts: `python3 a/b.py`, `python3 -m a.b`."""
    found = []
    for line in script.read_text(encoding="utf-8", errors="replace").splitlines():
        found += re.findall(r"python[\d.]*\s+(?:-[uBEsS]\s+)*([\w./-]+\.py)", line.split("#")[0])
        found += [name.replace(".", "/") + ".py"
                  for name in re.findall(r"python[\d.]*\s+-m\s+([\w.]+)", line.split("#")[0])]
    return found


def read_submission(folder: Path, task: str | None) -> Submission:
    """The package in `folder`. task None: the one whose files lie there."""
    expect(folder.is_dir(), folder, "a folder of a submission, or its zip", "no such folder")
    return Submission(folder, task or _task_of(folder), rules(task or _task_of(folder)))


def _task_of(folder: Path) -> str:
    """The task of which most of the files lie in `folder`, some even if they lie deeper."""
    shares = {}
    for task in TASKS:
        own = [name for name in rules(task).package.files if name != "requirements.txt"]
        shares[task] = sum(any(folder.rglob(name)) for name in own) / len(own)
    best = max(shares.values())
    found = [task for task, share in shares.items() if share == best]
    if best == 0 or len(found) > 1:
        raise InputError(f"{folder}: expected the files of one task, found {' and '.join(found) if best else 'none'} "
                         "(--task says which it is)")
    return found[0]


def plain(text: str) -> str:
    """Text of strangers on one line of a terminal: what does not print is written out."""
    encoding = sys.stdout.encoding or "utf-8"
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)
