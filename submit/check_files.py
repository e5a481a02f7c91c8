"""Rules about the files of a submission: which, how large, what kind."""
from __future__ import annotations

import ast
import fnmatch
import io
import json
import lzma
import os
import pickletools
import re
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from submit.source_search import function, read_source
from submit.submission import Broken, Submission

TENSOR_CALLS = re.compile(  # what a state dict of torch.save asks for, and an array of numbers
    r"collections OrderedDict|torch\._utils _rebuild_\w+|torch \w+Storage|torch\.storage (Unt|T)ypedStorage|"
    r"torch (Size|device|b?float\d*|u?int\d*|half|bool|complex\d+)|torch\.nn\.parameter Parameter|"
    r"numpy (dtype|ndarray)|numpy\._?core\.multiarray (_reconstruct|scalar)")
PICKLES = (".pth", ".pt", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib", ".npy", ".npz")
NUMPY, HEADER = b"\x93NUMPY", 200  # how its files begin, and bytes that tell the type of the array
CHAIN = 10  # imports that are followed to where a function is defined
MUCH = 64 * 2**20  # bytes of one pickle program; a state dict's is far smaller


def size(package: Submission) -> tuple[str, Iterator[Broken]]:
    """All files together, as uploaded."""
    sizes = {path: path.lstat().st_size for path in package.files}
    total, limit = sum(sizes.values()), package.rules.limits.package_bytes

    def breaches() -> Iterator[Broken]:
        if limit is not None and total > limit:
            largest = max(sizes, key=sizes.get)
            yield Broken(package.inside(largest), f"{total} bytes in all, {sizes[largest]} of them here; limit {limit}",
                         "take out what is not needed, store weights as float16")

    return f"{total} bytes in {len(sizes)} files, limit {limit or 'none'}", breaches()


def files(package: Submission) -> tuple[str, Iterator[Broken]]:
    """What has to lie at the root."""
    wanted = package.rules.package.files

    def breaches() -> Iterator[Broken]:
        for name in wanted:
            if (package.root / name).is_file():
                continue
            deeper = [package.inside(path) for path in package.files if path.name == Path(name).name]
            found = f"only {deeper[0]}" if deeper else "no such file"
            yield Broken(name, found, "move it to the root" if deeper else f"add {name} at the root")

    return ", ".join(wanted), breaches()


def functions(package: Submission) -> tuple[str, Iterator[Broken]]:
    """Names and parameters of what the judge calls."""
    wanted = [(file, name, parameters) for file, kinds in package.rules.package.functions.items()
              for name, parameters in kinds.items()]

    def breaches() -> Iterator[Broken]:
        for file, name, parameters in wanted:
            if (package.root / file).is_file():
                yield from _signature(package, package.root / file, name, parameters)

    shown = "; ".join(f"{name}({', '.join(parameters)})" for _, name, parameters in wanted)
    return shown or "none that the judge calls by name", breaches()


def _signature(package: Submission, file: Path, name: str, parameters: list[str]) -> Iterator[Broken]:
    asked = f"def {name}({', '.join(parameters)})"
    place, node = _definition(package, file, name)
    if node is None:
        yield Broken(package.inside(place), f"no function {name}", f"define it: {asked}")
        return
    arguments = node.args
    own = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    optional = len(arguments.defaults)
    extra = own[len(parameters):]
    needed = [a.arg for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is None]
    if isinstance(node, ast.AsyncFunctionDef) or own[:len(parameters)] != parameters or len(extra) > optional or needed:
        yield Broken(package.inside(place, node.lineno), f"({ast.unparse(arguments)})", f"write {asked}")


def _definition(package: Submission, file: Path, name: str) -> tuple[Path, ast.FunctionDef | None]:
    """Where the function is defined, also if the file only imports it from another module of the package."""
    for _ in range(CHAIN):  # it may be a circle
        source = read_source(file, file.stem)
        node = function(source, name)
        module, _, inner = source.aliases.get(name, "").rpartition(".")
        target = package.code.joinpath(*module.split(".")).with_suffix(".py") if module else None
        if node is not None or target is None or not target.is_file():
            return file, node
        file, name = target, inner
    return file, None


def executable(package: Submission) -> tuple[str, Iterator[Broken]]:
    """Scripts that the judge starts: permission, first line, line ends."""
    wanted = package.rules.package.executable

    def breaches() -> Iterator[Broken]:
        for path in (package.root / name for name in wanted):
            if not path.is_file():
                continue
            name, content = package.inside(path), path.read_bytes()
            if not os.access(path, os.X_OK):
                yield Broken(name, "no permission to execute", f"chmod +x {name}")
            if not content.startswith(b"#!"):
                yield Broken(f"{name}:1", "no line that names its interpreter", "begin with #!/bin/sh")
            if b"\r\n" in content:
                yield Broken(f"{name}:1", "Windows line ends", "save it with plain line ends")

    return ", ".join(wanted) or "none", breaches()


def links(package: Submission) -> tuple[str, Iterator[Broken]]:
    """Nothing that leads out of the package, nothing but files and folders."""

    def breaches() -> Iterator[Broken]:
        root = package.root.resolve()
        for path in package.files:
            if path.is_symlink():
                target = os.readlink(path)
                try:
                    inside = not os.path.isabs(target) and path.resolve(strict=True).is_relative_to(root)
                except (OSError, RuntimeError):  # leads nowhere, or in a circle
                    inside = False
                if not inside:
                    yield Broken(package.inside(path), f"a link to {target}", "put the file itself there")
            elif not stat.S_ISREG(path.lstat().st_mode):
                yield Broken(package.inside(path), "a device, socket or pipe", "take it out")

    return "every file lies in the package", breaches()


def unneeded(package: Submission) -> tuple[str, Iterator[Broken]]:
    """What has no use on the judge: left-overs, its own files, modules that nothing imports."""
    patterns = (*package.rules.package.unneeded, "__pycache__", "*.pyc", ".*", "*~", "*.egg-info", "Thumbs.db")

    def breaches() -> Iterator[Broken]:
        named = set()
        for path in package.files:
            parts = path.relative_to(package.root).parts
            hit = next((i for i, part in enumerate(parts) if _matches(part, patterns, i == 0)), None)
            if hit is not None and parts[:hit + 1] not in named:
                named.add(parts[:hit + 1])
                yield Broken("/".join(parts[:hit + 1]), "a file that the judge does not need", "take it out")
            elif hit is None and _idle(package, path):
                yield Broken(package.inside(path), "a module that nothing imports", "take it out")

    return "no left-overs, every module is imported", breaches()


def _matches(part: str, patterns: tuple[str, ...], at_root: bool) -> bool:
    """Names with no wildcard count at the root alone: `data` there is the judge's."""
    return any(fnmatch.fnmatch(part, pattern) and (at_root or "*" in pattern or pattern == "__pycache__")
               for pattern in patterns if part != ".")


def _idle(package: Submission, path: Path) -> bool:
    replaced = path.relative_to(package.root).parts[0] in package.rules.package.overwritten
    used = path in package.closure.modules.values() or not package.entries
    return path.suffix == ".py" and not replaced and not used


def shadows(package: Submission) -> tuple[str, Iterator[Broken]]:
    """Modules of the package that hide one of the standard library or of a library that it imports."""

    def breaches() -> Iterator[Broken]:
        known = sys.stdlib_module_names | set(package.rules.requirements) | set(package.rules.imported_as)
        for path in sorted(package.code.iterdir()) if package.code.is_dir() else ():
            module = path.stem if path.suffix == ".py" else path.name if (path / "__init__.py").is_file() else None
            if module in known:
                yield Broken(package.inside(path), f"a module named like {module}, which it hides", "rename it")

    return "no module is named like a library", breaches()


def pickles(package: Submission) -> tuple[str, Iterator[Broken]]:
    """Weights that would call something when they are read. Nothing is run: the pickle's program is read."""
    found = [path for path in package.regular if path.suffix.lower() in PICKLES]

    def breaches() -> Iterator[Broken]:
        for path in found:
            problem = _asked_for(path)
            if problem:
                yield Broken(package.inside(path), problem, "store tensors alone: torch.save(model.state_dict()), "
                                                            "or safetensors")

    return f"{len(found)} pickled files of weights", breaches()


def _asked_for(path: Path) -> str:
    """What a pickled file asks for beyond tensors; empty where there is nothing."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                programs = [entry for entry in archive.infolist() if entry.filename.endswith((".pkl", ".pickle"))]
                nested = [e.filename for e in archive.infolist() if e.filename.endswith((".zip", ".pt", ".pth"))]
                if nested:
                    return f"an archive in an archive: {nested[0]}"
                if any(entry.file_size > MUCH for entry in programs):
                    return f"a pickle of more than {MUCH} bytes"
                for entry in archive.infolist():
                    with archive.open(entry) as stream:
                        if problem := _objects(stream.read(HEADER)):
                            return f"{entry.filename}: {problem}"
                return next(filter(None, (_calls(archive.read(entry)) for entry in programs)), "")
        with path.open("rb") as stream:
            content = stream.read(MUCH)
    except (OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError,
            NotImplementedError) as error:
        return f"a file that cannot be read: {error}"
    return _objects(content) if content.startswith(NUMPY) else _calls(content)


def _objects(content: bytes) -> str:
    """What is wrong with the content if it is a numpy file's, whose header says whether a pickle follows."""
    return "an array of Python objects" if content.startswith(NUMPY) and b"'|O'" in content[:HEADER] else ""


def _calls(content: bytes) -> str:
    """The first class or function outside of tensors that a file of one or more pickles names."""
    stream = io.BytesIO(content)
    for number in range(len(content) + 1):
        try:
            named = next((name for name in _globals(stream) if not TENSOR_CALLS.fullmatch(name)), "")
        except Exception as error:  # a broken program can make the reader fail in any way
            return "" if number else f"no whole pickle: {type(error).__name__}"  # raw numbers follow in old files
        if named:
            return f"a pickle that asks for {named.replace(' ', '.')}"
        if stream.tell() >= len(content):
            break
    return ""


def _globals(stream: io.BytesIO) -> Iterator[str]:
    """`module name` of every class or function that the pickle at the stream's position asks for."""
    strings: list[str] = []       # as far as they can be told without running it
    memo: dict[int, str] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            yield argument
        elif opcode.name == "STACK_GLOBAL":
            yield " ".join(strings[-2:]) if len(strings) > 1 else "a name that is put together"
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = strings[-1] if strings else ""
        elif "PUT" in opcode.name:
            memo[int(argument)] = strings[-1] if strings else ""
        elif "GET" in opcode.name:
            strings.append(memo.get(int(argument), ""))
        elif isinstance(argument, str):
            strings.append(argument)
        else:
            strings.append("")    # something else may now lie on the stack


def container(package: Submission) -> tuple[str, Iterator[Broken]]:
    """The Dockerfile builds on the judge's image."""
    image = package.rules.image
    path = package.root / "Dockerfile"

    def breaches() -> Iterator[Broken]:
        if not image or not path.is_file():
            return
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        bases = [(number, line.split()[1]) for number, line in enumerate(lines, 1) if re.match(r"FROM\s+\S", line)]
        number, base = bases[-1] if bases else (1, "nothing")
        if base != image:
            yield Broken(f"Dockerfile:{number}", f"FROM {base}", f"write FROM {image}")

    return image or "none", breaches()


def model_descriptions(package: Submission) -> Iterator[tuple[Path, str]]:
    """(file, architecture) of every config.json of a model."""
    for path in package.regular:
        if path.suffix == ".json" and path.stat().st_size < MUCH:
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                continue
            kinds = content.get("architectures") if isinstance(content, dict) else None
            yield from ((path, kind) for kind in (kinds if isinstance(kinds, list) else ()) if isinstance(kind, str))
