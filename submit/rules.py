"""The contest's numbers and names, read from one TOML file a task; nothing else in the kit knows one.

Another contest on the same tasks is another folder of such files (`--rules DIR`).
"""
from __future__ import annotations

import os
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path

from data.errors import expect
from data.toml_files import read_toml

FOLDER = Path(__file__).with_name("rules")
VARIABLE = "KIT_RULES"  # set by --rules
TASKS = ("retrieval", "anomaly", "backdoor")


@dataclass(frozen=True)
class Limits:
    """What a submission may take on the judge's machine. None: the organizers name no limit."""

    memory_gib: float                         # of the host
    processes: int
    written_bytes: int                        # all that it leaves on disk
    gpu_memory_gib: float | None = None
    seconds: float | None = None              # wall clock of the whole run
    seconds_per_sample: float | None = None
    package_bytes: int | None = None          # of the upload
    tuned_constants: int | None = None        # constants chosen on the evaluation set


@dataclass(frozen=True)
class PackageRules:
    """What lies in a submission. Paths are relative to its root, file patterns as in a shell."""

    files: tuple[str, ...]                    # that have to be there
    functions: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # file -> function -> its parameters
    code: str = "."                           # where modules lie that the entry points import
    executable: tuple[str, ...] = ()
    output: tuple[str, ...] = ()              # folders that the judge reads; nothing else may be written
    overwritten: tuple[str, ...] = ()         # what the organizers put in place of ours
    unneeded: tuple[str, ...] = ()            # what has no use on the judge
    file_access: bool = True                  # whether the code may read files other than those it is given
    hidden: tuple[str, ...] = ()              # parts of a path that must not be read: the truth
    evaluation: tuple[str, ...] = ()          # distributions that the organizers' evaluation imports beside our code


@dataclass(frozen=True)
class Rules:
    """What the contest fixes for one task."""

    title: str
    metric: str  # name and unit of the leaderboard's figure
    leaderboard: tuple[float, ...]  # the ten published scores, best first, in the metric's unit
    limits: Limits
    package: PackageRules
    python: str  # version on the judge
    requirements: dict[str, str]  # distribution -> version that goes with the judge's
    weights: dict[str, float] = field(default_factory=dict)  # of each metric in a combined score
    environment: dict[str, str] = field(default_factory=dict)  # variables of the judge
    forbidden: dict[str, list[str]] = field(default_factory=dict)  # kind -> patterns of imported names
    imported_as: dict[str, str] = field(default_factory=dict)  # module -> distribution, where the names differ
    installed: tuple[str, ...] = ()  # distributions that the judge has already, as in `requirements`
    image: str = ""  # the judge's container


def use_rules(folder: Path | None) -> None:
    """Make `folder` the one that rules come from, in this process and those it starts; None: the kit's own."""
    if folder is None:
        os.environ.pop(VARIABLE, None)
    else:
        expect(folder.is_dir(), "--rules", "a folder with one TOML file a task", folder)
        os.environ[VARIABLE] = str(folder.resolve())


def rules(task: str) -> Rules:
    """The rules of `task`: retrieval, anomaly or backdoor."""
    return read_rules(Path(os.environ.get(VARIABLE, FOLDER)) / f"{task}.toml")


@cache
def read_rules(path: Path) -> Rules:
    """The rules in one file. A missing file, a missing or unknown key and a value of another kind are named."""
    expect(path.is_file(), path, "the rules of a task", "no such file")
    content = read_toml(path)
    parts = {"limits": Limits, "package": PackageRules}
    for name, kind in parts.items():
        if name in content:
            content[name] = _record(kind, content[name], f"{path} [{name}]")
    found = _record(Rules, content, str(path))
    board = found.leaderboard
    expect(board and list(board) == sorted(board, reverse=True), f"{path} leaderboard", "scores, best first", board)
    return found


KINDS = {"str": str, "int": int, "float": (int, float), "bool": bool, "tuple": list, "dict": dict, "Limits": Limits,
         "PackageRules": PackageRules}


def _record(kind: type, values: object, where: str) -> object:
    """A dataclass from a TOML table, strictly: each key known, none missing, each of its kind."""
    expect(isinstance(values, dict), where, "a table", type(values).__name__)
    known = {f.name: f for f in fields(kind)}
    unknown = sorted(values.keys() - known)
    expect(not unknown, where, f"keys among {', '.join(known)}", ", ".join(unknown))
    needed = [f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in values]
    expect(not missing, where, f"the keys {', '.join(needed)}", f"no {', '.join(missing)}")
    for name, value in values.items():
        outer = known[name].type.split("[")[0].split(" |")[0]
        fits = isinstance(value, KINDS[outer]) and (outer == "bool" or not isinstance(value, bool))
        expect(fits, f"{where} {name}", outer, repr(value))
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def place(value: float, leaderboard: tuple[float, ...]) -> int | None:
    """The place (from 1) that `value` would have taken, ahead of equals; None below the last one listed."""
    better = sum(score > value for score in leaderboard)
    return better + 1 if better < len(leaderboard) else None
