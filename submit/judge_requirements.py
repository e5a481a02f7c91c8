"""Prints one requirements.txt for all tasks, with the judge's versions: `make test-judge` installs it."""
from __future__ import annotations

from submit.rules import TASKS, rules


def judge_requirements() -> list[str]:
    """Every library that a package of any task asks for; where tasks differ, the oldest version."""
    found: dict[str, set[tuple[int, ...]]] = {}
    for task in TASKS:
        for name, version in rules(task).requirements.items():
            found.setdefault(name, set()).add(tuple(int(part) for part in version.split(".")))
    return [f"{name}=={'.'.join(map(str, min(versions)))}" for name, versions in sorted(found.items())]


if __name__ == "__main__":
    print("\n".join(judge_requirements()))
