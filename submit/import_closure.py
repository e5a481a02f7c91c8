"""Which modules of a folder a program needs, found in its source without running it."""
from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.errors import InputError, expect

LARGEST = 10**7  # bytes of a source file that is read
ASSET = re.compile(r"\w[\w.-]*")  # a plain name of a file or folder


@dataclass(frozen=True)
class Place:
    """A line of a file, as `file:line`."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Closure:
    modules: dict[str, Path]      # dotted name -> file, sorted
    # Without what may fail to import, and so is not needed:
    libraries: dict[str, Place]   # top name of what comes from elsewhere, without the standard library -> first use
    missing: dict[str, Place]     # imported from a package of the folder that has no such module


def import_closure(entries: dict[str, Path], root: Path) -> Closure:
    """What `entries` (name -> file) and the modules below `root` that they need import.

    The modules include the entries and the packages that a module lies in.
    """
    modules: dict[str, Path] = {}
    libraries: dict[str, Place] = {}
    missing: dict[str, Place] = {}
    waiting = list(entries.items())
    while waiting:
        name, file = waiting.pop()
        if name in modules:
            continue
        modules[name] = file
        tree = parsed(file)
        optional = _optional_lines(tree)
        for wanted, line, certain in imports(tree, name, file.name == "__init__.py"):
            found = list(_files_of(wanted, root))
            waiting += found
            top = wanted.split(".")[0]
            if line in optional:
                continue
            if not found:
                if top not in sys.stdlib_module_names and top not in entries:
                    libraries.setdefault(top, Place(file, line))
            elif certain and not _module_file(wanted, root):
                missing.setdefault(wanted, Place(file, line))
    return Closure(dict(sorted(modules.items())), dict(sorted(libraries.items())), dict(sorted(missing.items())))


def parsed(file: Path) -> ast.Module:
    """The syntax tree of a source file; one that is no Python is named."""
    size = file.stat().st_size
    expect(size <= LARGEST, f"{file}:1", f"Python source of at most {LARGEST} bytes", f"{size} bytes")
    try:
        return ast.parse(file.read_bytes(), filename=str(file))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        reason = str(getattr(error, "msg", error)) or type(error).__name__
        raise InputError(f"{file}:{line}: expected Python source, found {reason}") from None


def imports(tree: ast.Module, name: str, is_package: bool) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, whether it has to be a module) of every import, also those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, True) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, name, is_package)
            if base:
                yield base, node.lineno, True
            for alias in node.names:  # a module, or a name in one
                if alias.name != "*":
                    yield f"{base}.{alias.name}" if base else alias.name, node.lineno, not base


def _optional_lines(tree: ast.Module) -> set[int]:
    """Lines that may fail to import: the body of a `try` whose handler takes an ImportError."""
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)
             and any(_names(handler.type) & {"ImportError", "ModuleNotFoundError"} for handler in node.handlers)]
    parts = [inner for node in tries for part in node.body for inner in ast.walk(part)]
    return {part.lineno for part in parts if isinstance(part, ast.Import | ast.ImportFrom)}


def _names(node: ast.expr | None) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)} if node is not None else set()


def _absolute(node: ast.ImportFrom, name: str, is_package: bool) -> str:
    """What an `import from` names, with its leading dots resolved."""
    if not node.level:
        return node.module or ""
    parts = name.split(".")
    above = parts[:len(parts) - node.level + is_package]
    return ".".join([*above, *([node.module] if node.module else [])])


def _module_file(name: str, root: Path) -> Path | None:
    path = root.joinpath(*name.split("."))
    candidates = (path / "__init__.py", path.with_name(path.name + ".py"))
    return next((file for file in candidates if file.is_file()), None)


def _files_of(name: str, root: Path) -> Iterator[tuple[str, Path]]:
    """The module of this name below `root`, if there is one, and the packages it lies in."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        file = _module_file(".".join(parts[:end]), root)
        if file:
            yield ".".join(parts[:end]), file


def assets(modules: dict[str, Path]) -> list[Path]:
    """Files that lie beside a module and are named in it, or lie in a folder that is: its weights and tables."""
    found = set()
    for file in modules.values():
        texts = {node.value for node in ast.walk(parsed(file))
                 if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        for path in (file.parent / text for text in texts if ASSET.fullmatch(text)):
            if path.is_file() and path.suffix != ".py":
                found.add(path)
            elif path.is_dir() and not (path / "__init__.py").exists():
                found |= {inner for inner in path.rglob("*") if inner.is_file() and "__pycache__" not in inner.parts}
    return sorted(found)
