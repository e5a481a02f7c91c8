"""What Python source calls, names and holds, read without running it."""
from __future__ import annotations

import ast
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from submit.import_closure import parsed


@dataclass(frozen=True)
class Source:
    """One module of a package. name: dotted, as others import it."""

    file: Path
    name: str
    aliases: dict[str, str] = field(default_factory=dict, compare=False)  # local name -> what it was imported as

    @cached_property
    def tree(self) -> ast.Module:
        return parsed(self.file)


def read_source(file: Path, name: str) -> Source:
    """The module with its imports; InputError where it is no Python."""
    source = Source(file, name)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                source.aliases[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                source.aliases[alias.asname or alias.name] = f"{node.module or ''}.{alias.name}"
    return source


def dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    """`np.load` as numpy.load, `Path(x).open` as pathlib.Path().open; empty for other expressions."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, aliases)}.{node.attr}"
    if isinstance(node, ast.Call):
        return f"{dotted(node.func, aliases)}()"
    return ""


def names_used(source: Source) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import, name and attribute."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute | ast.Name):
            yield dotted(node, source.aliases), node.lineno
    yield from names_of_imports(source)


def imported_names(source: Source) -> Iterator[tuple[str, int]]:
    """Those of `names_used` that are imports or start with something imported, not with a local variable."""
    for node in ast.walk(source.tree):
        root = node
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(root, ast.Name) and root.id in source.aliases:
            yield dotted(node, source.aliases), node.lineno
    yield from names_of_imports(source)


def names_of_imports(source: Source) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module or ''}.{alias.name}", node.lineno) for alias in node.names)


def literals(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(text, line) of every string that is no docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    skipped = {id(node.body[0].value) for node in ast.walk(tree)
               if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value, node.lineno


def comments(file: Path) -> Iterator[tuple[str, int]]:
    """(text, line) of every comment."""
    with file.open("rb") as stream:
        for token in tokenize.tokenize(stream.readline):
            if token.type == tokenize.COMMENT:
                yield token.string, token.start[0]


def function(source: Source, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The function that the module defines at its top; the last one counts, as in Python."""
    found = [node for node in source.tree.body
             if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name]
    return found[-1] if found else None


def reachable_calls(sources: list[Source], entries: set[str]) -> Iterator[tuple[Source, ast.Call, str]]:
    """Every call in code that may run, with the dotted name of what is called.

    entries: names of the functions that the judge calls. Code may run that stands outside of functions, or in one whose
    name is used in code that may run. Names are compared without their module, so more is followed than is called, and
    less only where a name is put together.
    """
    bodies: dict[str, list] = {}
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                bodies.setdefault(node.name, []).append((source, node))
    waiting = [(source, node) for source in sources for node in _shallow(source.tree)]
    for name in (*entries, *SPECIAL):
        waiting += [(source, inner) for source, body in bodies.pop(name, ()) for inner in _shallow(body)]
    while waiting:
        source, node = waiting.pop()
        if isinstance(node, ast.Call):
            yield source, node, dotted(node.func, source.aliases)
        for other, body in bodies.pop(_name_used(node), ()):
            waiting += [(other, inner) for inner in _shallow(body)]


# Called without their name.
SPECIAL = ("__init__", "__post_init__", "__call__", "__enter__", "__exit__", "__iter__", "__getitem__", "__len__",
           "forward")


def _name_used(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.name if isinstance(node, ast.alias) and node.asname else None  # imported under another name


def _shallow(root: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `root` but those in bodies of functions defined there; their defaults and decorators count."""
    waiting = list(ast.iter_child_nodes(root))
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)]
        else:
            waiting += list(ast.iter_child_nodes(node))
