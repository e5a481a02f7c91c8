"""A submission from the checkout: a folder and a zip that the task's judge accepts.

What goes in is found, not listed: the entry points of `submit/templates/TASK`, the modules that they import, the files
that these modules name. Same inputs, same bytes.
"""
from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from string import Template

import torch
from safetensors.torch import load, save
from torch import Tensor

from data.errors import InputError, expect
from data.files import new_folder, write_atomic
from submit.dev_splits import ROOT
from submit.import_closure import Closure, assets, import_closure
from submit.rules import Rules, rules

TEMPLATES = Path(__file__).with_name("templates")
FILLED = ".in"            # ending of templates with $names
MANIFEST = "MANIFEST.json"
LEFT_OUT = {"card.json"}  # how weights were made; the program does not read it
ENCODER = Path("retrieval/weights/encoder/model.safetensors")  # becomes the retrieval task's weights.pth
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold
HALF_LIMIT = torch.finfo(torch.float16).max
IMPORT_SECONDS = 300      # for importing a package once, on a cold disk


@dataclass(frozen=True)
class Package:
    """What was written: files relative to the folder, bytes of the folder and of the zip."""

    task: str
    folder: Path
    archive: Path
    files: tuple[str, ...]
    bytes: int
    archive_bytes: int


@dataclass(frozen=True)
class Choice:
    """What else can be chosen about a package. weights: folder of nets in place of the embedded ones."""

    preset: str = "embedded"
    weights: Path | None = None
    half: bool = True  # float32 weights as float16

    def named(self) -> dict[str, str | bool]:
        """As a manifest keeps it: a folder of weights without its path, so that equal packages have equal bytes."""
        return {"preset": self.preset, "weights": self.weights is not None, "half": self.half}


def build_package(task: str, out: Path, choice: Choice = Choice(), *, tried: bool = True) -> Package:
    """Write the submission of `task` to the new folder `out` and to `out`.zip.

    tried: import it once in a process that sees nothing else of ours. Errors: something lies at either path; an
    import without a module or a pinned version; a package above its limit.
    """
    expect(out.name, "--out", "a new folder with a name", repr(str(out)))
    archive = out.with_name(out.name + ".zip")
    expect(not archive.exists(), archive, "a path where nothing lies yet", "an existing file")
    rule = rules(task)
    with new_folder(out) as folder:
        contents = _contents(task, rule, choice, folder)
        _write_all(folder, contents, rule)
        size = sum(len(content) for content in contents.values())
        packed = zip_bytes(folder)
        limit = rule.limits.package_bytes
        expect(limit is None or max(size, len(packed)) <= limit, out, f"at most {limit} bytes", max(size, len(packed)))
        if tried:
            try_import(folder, rule)
        write_atomic(archive, packed)
    return Package(task, out, archive, tuple(sorted(contents)), size, len(packed))


def _contents(task: str, rule: Rules, choice: Choice, folder: Path) -> dict[str, bytes]:
    """Every file of the package: path relative to its root -> bytes. `folder` is where entry points are put to read."""
    values = {"image": rule.image, "alarm": _alarm(task), "settings": _settings(choice)}
    contents = _rendered(task, rule, values)
    contents["requirements.txt"] = "".join(f"{name}=={v}\n" for name, v in rule.requirements.items()).encode()
    entries = {}
    for name in (name for name in contents if name.endswith(".py") and name not in rule.package.overwritten):
        entries[Path(name).stem] = folder / name
        write_atomic(folder / name, contents[name])
    closure = import_closure(entries, ROOT)
    _check_closure(closure, rule)
    ours = {name: file for name, file in closure.modules.items() if name not in entries}
    for file in (*ours.values(), *assets(ours)):
        if file.name not in LEFT_OUT:
            inside = file.relative_to(ROOT)
            contents[str(rule.package.code / inside)] = _weights(file, choice) or file.read_bytes()
    if task == "retrieval":
        _replace_nets(contents, choice)
        contents["weights.pth"] = _as_pth(contents.pop(str(ENCODER)))
    else:
        contents |= _preset_nets(task, choice)
    contents[MANIFEST] = _manifest(task, choice, contents)
    return contents


def _rendered(task: str, rule: Rules, values: dict[str, str]) -> dict[str, bytes]:
    """The task's templates, filled, at the root or, for modules that no judge calls, beside our code."""
    contents = {}
    for path in sorted((TEMPLATES / task).iterdir()):
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        name = path.name.removesuffix(FILLED)
        filled = Template(text).substitute(values) if name != path.name else text
        root = name in rule.package.files or not name.endswith(".py")
        contents[name if root else str(Path(rule.package.code) / name)] = filled.encode()
    return contents


def _alarm(task: str) -> str:
    """The detector's threshold, the one constant of the backdoor task that may be tuned."""
    if task != "backdoor":
        return ""
    from backdoor_detection.detection import DetectorConfig

    return repr(DetectorConfig().alarm)


def _settings(choice: Choice) -> str:
    """The line of run.sh that chooses a preset; none for the embedded one."""
    from anomaly.predict import PRESET, WEIGHTS

    return "" if choice.preset == "embedded" else f"export {PRESET}={choice.preset} {WEIGHTS}=weights\n"


def _check_closure(closure: Closure, rule: Rules) -> None:
    """Every import leads to a module of ours or to a library with a pinned version."""
    for name, place in closure.missing.items():
        raise InputError(f"{place}: expected a module {name}, found none")
    for name, place in closure.libraries.items():
        pinned = rule.imported_as.get(name, name)
        expect(pinned in rule.requirements, f"{place}: library {name}", "a version in [requirements] of the rules",
               "none")


def _weights(file: Path, choice: Choice) -> bytes | None:
    """The file as float16 where it holds the float32 weights of a net; None for other files."""
    return as_half(file.read_bytes()) if file.name.endswith("model.safetensors") and choice.half else None


def as_half(content: bytes) -> bytes:
    """Safetensors with float16 in place of float32; a tensor that float16 cannot hold stays."""
    tensors = load(content)
    return save({name: _narrowed(tensor) for name, tensor in sorted(tensors.items())})


def _narrowed(tensor: Tensor) -> Tensor:
    fits = tensor.dtype == torch.float32 and bool((tensor.abs() <= HALF_LIMIT).all())
    return tensor.half() if fits else tensor


def _preset_nets(task: str, choice: Choice) -> dict[str, bytes]:
    """The nets that a preset other than the embedded one needs, in weights/ at the root."""
    if choice.preset == "embedded":
        expect(choice.weights is None, "--weights", "retrieval, or a --preset that needs them", task)
        return {}
    expect(task == "anomaly", "--preset", "anomaly, the task that has presets", task)
    from submit.weights_registry import preset_files

    return {f"weights/{file.relative_to(choice.weights)}": _weights(file, choice) or file.read_bytes()
            for file in preset_files(choice.preset, choice.weights)}


def _replace_nets(contents: dict[str, bytes], choice: Choice) -> None:
    """Encoder and parser of a folder of weights in place of the embedded ones; a part that it lacks stays."""
    expect(choice.preset == "embedded", "--preset", "anomaly, the task that has presets", "retrieval")
    from retrieval.composer import files_read
    from retrieval.parser import FILES
    from submit.weights_registry import retrieval_folders

    for part, folder in retrieval_folders(choice.weights).items():
        place = ENCODER.parent.with_name(part)
        for name in [name for name in contents if Path(name).is_relative_to(place)]:
            del contents[name]
        files = files_read(folder) if part == "encoder" else {name: folder / name for name in FILES}
        for name, file in sorted(files.items()):
            contents[str(place / name)] = _weights(file, choice) or file.read_bytes()


def _as_pth(content: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(sorted(load(content).items())), buffer)
    return buffer.getvalue()


def _manifest(task: str, choice: Choice, contents: dict[str, bytes]) -> bytes:
    """Task, what was chosen, and SHA-256 of every other file."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}
    return (json.dumps({"task": task, "chosen": choice.named(), "sha256": sums}, indent=1) + "\n").encode()


def _write_all(folder: Path, contents: dict[str, bytes], rule: Rules) -> None:
    for name, content in contents.items():
        write_atomic(folder / name, content)
        if name in rule.package.executable:
            os.chmod(folder / name, 0o755)


def zip_bytes(folder: Path) -> bytes:
    """The folder as a zip: files in order of their names, one fixed time, so equal folders give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # Unix, whose permission bits follow
            entry.external_attr = (0o100755 if os.access(path, os.X_OK) else 0o100644) << 16
            archive.writestr(entry, path.read_bytes())
    return buffer.getvalue()


def try_import(folder: Path, rule: Rules, python: str = sys.executable) -> None:
    """Import the entry points in a fresh process with only the package's code and installed libraries on its path."""
    code = folder / rule.package.code
    names = sorted(path.stem for path in code.glob("*.py"))
    program = ("import importlib, sys; sys.dont_write_bytecode = True; sys.path.insert(0, sys.argv[1]); "
               "[importlib.import_module(name) for name in sys.argv[2:]]")
    with tempfile.TemporaryDirectory() as elsewhere:
        try:
            done = subprocess.run([python, "-I", "-c", program, str(code.resolve()), *names], cwd=elsewhere,
                                  capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise InputError(f"{folder}: expected modules that can be imported in {IMPORT_SECONDS} s, found some that "
                             "take longer") from None
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    expect(done.returncode == 0, f"{folder}: {', '.join(names)}", "modules that can be imported alone", reason)


def unpack(archive: Path, folder: Path, limit: int) -> None:
    """Unpack a zip of a stranger into a new folder. Refused: paths that lead out of it, links, more than `limit` bytes
    in all, a path twice."""
    try:
        with zipfile.ZipFile(archive) as packed:
            entries = packed.infolist()
            _check_entries(archive, entries, limit)
            with new_folder(folder) as scratch:
                for entry in entries:
                    _unpack_entry(packed, entry, scratch)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError, EOFError, OSError,
            ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{archive}: expected a whole zip file, found {error}") from None


def _check_entries(archive: Path, entries: list[zipfile.ZipInfo], limit: int) -> None:
    seen = set()
    for entry in entries:
        where, parts = f"{archive} {entry.filename!r}", entry.filename.rstrip("/").split("/")
        inside = not entry.filename.startswith("/") and "\\" not in entry.filename and ".." not in parts
        expect(inside and all(parts), where, "a path inside the package", "one that leads out of it")
        kind = entry.external_attr >> 28
        expect(kind in (0, 4, 8), where, "a file or folder", "a link or device")
        expect(entry.filename not in seen, where, "each path once", "it twice")
        seen.add(entry.filename)
    size = sum(entry.file_size for entry in entries)
    expect(size <= limit, archive, f"at most {limit} bytes unpacked", size)


def _unpack_entry(packed: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path) -> None:
    target = folder / entry.filename
    if entry.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with packed.open(entry) as source, target.open("xb") as file:  # zipfile stops at the size that was declared
        shutil.copyfileobj(source, file)
    os.chmod(target, 0o755 if (entry.external_attr >> 16) & 0o100 else 0o644)
