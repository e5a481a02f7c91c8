"""The one exception for bad input. The command line prints it as one line."""
from __future__ import annotations


class InputError(ValueError):
    """Something the user gave is wrong. The message reads `where: expected X, found Y`."""


def expect(ok: object, where: object, expected: object, found: object) -> None:
    """Raise InputError unless `ok`. `where` names file, row or field; `found` is shown as it is."""
    if not ok:
        raise InputError(f"{where}: expected {expected}, found {found}")
