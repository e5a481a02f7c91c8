"""Rules about what a submission's source says, and about the libraries it asks for. Nothing is run."""
from __future__ import annotations

import ast
import difflib
import fnmatch
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from data.errors import InputError
from submit.check_files import model_descriptions
from submit.import_closure import parsed
from submit.source_search import (
    comments,
    dotted,
    imported_names,
    literals,
    names_of_imports,
    names_used,
    reachable_calls,
)
from submit.submission import Broken, Submission

NEWER = {"tomllib": (3, 11)}  # modules of the standard library that came after Python 3.10
GIVEN_IMAGES = ("PIL.Image.open", "cv2.imread", "torchvision.io.read_image")  # how the images of a task are read
READS = ("*.read_text", "*.read_bytes", "numpy.load", "numpy.loadtxt", "numpy.genfromtxt", "numpy.fromfile",
         "numpy.memmap", "torch.load", "torch.jit.load", "safetensors.*load_file", "safetensors.safe_open",
         "pandas.read_*", "joblib.load", "scipy.io.loadmat", "sqlite3.connect", "os.open", "io.open")
WRITES = ("*.write_text", "*.write_bytes", "*.touch", "*.mkdir", "*.unlink", "*.rmdir", "*.symlink_to", "*.hardlink_to",
          "*.to_csv", "*.to_parquet", "*.to_pickle", "*.savefig", "*.save_pretrained", "os.mkdir", "os.makedirs",
          "os.remove", "os.unlink", "os.rename", "os.replace", "os.link", "os.symlink", "os.truncate", "shutil.copy*",
          "shutil.move", "shutil.rmtree", "numpy.save*", "torch.save", "torch.jit.save", "safetensors.*save_file",
          "joblib.dump", "pickle.dump", "json.dump", "tempfile.*", "logging.FileHandler", "h5py.File")
NETWORK = ("socket", "socket.*", "ssl", "ssl.*", "requests", "requests.*", "urllib.request", "urllib.request.*",
           "urllib3", "urllib3.*", "http.client", "http.client.*", "httpx", "httpx.*", "aiohttp", "aiohttp.*",
           "ftplib", "ftplib.*", "smtplib", "smtplib.*", "telnetlib", "telnetlib.*", "paramiko", "paramiko.*", "wget",
           "wget.*", "gdown", "gdown.*", "boto3", "boto3.*", "websocket", "websocket.*", "websockets", "websockets.*")
FETCHING = re.compile(r"\b(curl|wget|git\s+clone|gdown|aria2c|scp|rsync|huggingface-cli\s+download|hf\s+download|"
                      r"(?:pip3?|conda|apt|apt-get)\s+(?:install|update|download))\b")
FETCHED = ("torch.hub.*", "torch.utils.model_zoo.*", "*.load_state_dict_from_url", "huggingface_hub.*_download",
           "kagglehub.*", "datasets.load_dataset", "nltk.download", "gensim.downloader.*")
PRETRAINED = ("timm.create_model", "timm.*.create_model", "torchvision.models.*", "open_clip.create_model*")
NAMED_WEIGHTS = re.compile(r"Weights\b")  # torchvision's, as in ResNet18_Weights.DEFAULT
HOME = re.compile(r"(/[\w.@+-]+){2,}/?|[A-Za-z]:[\\/]\w.*|~/.*")
SYSTEM = ("/proc/", "/sys/", "/dev/", "/usr/bin/env", "/bin/sh", "/bin/bash")
TUNED = re.compile(r"#\s*tuned\b", re.IGNORECASE)
THRESHOLD = re.compile(r"thresh|cut_?off|tuned", re.IGNORECASE)
RESOLVE_SECONDS = 600  # for pip to look a whole list up


def syntax(package: Submission) -> tuple[str, Iterator[Broken]]:
    """Every source file is Python of the judge's version."""
    found = [path for path in package.regular if path.suffix == ".py"]
    version = tuple(int(part) for part in package.rules.python.split(".")[:2])

    def breaches() -> Iterator[Broken]:
        for path in found:
            try:
                parsed(path)
                ast.parse(path.read_bytes(), feature_version=version)
            except (InputError, SyntaxError) as error:
                line = getattr(error, "lineno", None) or int(re.findall(r":(\d+): expected", str(error))[0])
                reason = getattr(error, "msg", None) or str(error).rpartition("found ")[2]
                yield Broken(package.inside(path, line), reason, f"write it for Python {package.rules.python}")

    return f"{len(found)} modules, Python {package.rules.python}", breaches()


def modules(package: Submission) -> tuple[str, Iterator[Broken]]:
    """Every import leads to a module of the package, the standard library or a library that is asked for."""
    closure = package.closure

    def breaches() -> Iterator[Broken]:
        asked = {canonicalize_name(name) for name in (*_asked(package), *package.rules.installed)}
        version = tuple(int(part) for part in package.rules.python.split(".")[:2])
        for name, place in closure.missing.items():
            yield Broken(package.inside(place), f"import of {name}, no such module", "add it to the package")
        for name, place in closure.libraries.items():
            if not asked & {canonicalize_name(d) for d in _distributions(package, name)}:
                yield Broken(package.inside(place), f"import of {name}, in neither the package nor requirements.txt",
                             f"add {_distributions(package, name)[0]} to requirements.txt")
        for source in package.sources:
            for name, line in names_of_imports(source):
                if NEWER.get(name.split(".")[0], version) > version:
                    yield Broken(package.inside(source.file, line), f"import of {name}, not in Python "
                                 f"{package.rules.python}", "use a library that is there")

    return f"{len(closure.modules)} modules, {len(closure.libraries)} libraries", breaches()


def _asked(package: Submission) -> list[str]:
    return [requirement.name for _, _, requirement in _requirement_lines(package) if requirement]


@cache
def _known_modules() -> dict[str, list[str]]:
    """Modules of this machine and the distributions they come from; finding them takes most of a second."""
    return dict(metadata.packages_distributions())


def _distributions(package: Submission, module: str) -> list[str]:
    """Distributions that a module may come from, the likeliest first."""
    named = package.rules.imported_as.get(module)
    return [*([named] if named else []), *_known_modules().get(module, ()), module]


def _requirement_lines(package: Submission) -> Iterator[tuple[int, str, Requirement | None]]:
    """(line number, text, requirement or None where it is none) of requirements.txt."""
    path = package.root / "requirements.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        text = re.sub(r"(^|\s)#.*", "", line).strip()
        if text:
            try:
                yield number, text, Requirement(text)
            except InvalidRequirement:
                yield number, text, None


def requirements(package: Submission) -> tuple[str, Iterator[Broken]]:
    """Each is a known library, pinned, and the judge's version where the judge has it; what the organizers' evaluation
    imports in the same place is among them."""
    lines = list(_requirement_lines(package))
    unknown = [r.name for _, _, r in lines if r and not _known(package, r.name) and not _meant(package, r.name)]

    def breaches() -> Iterator[Broken]:
        seen = set()
        for number, text, requirement in lines:
            problem, mend = _requirement_problem(package, text, requirement, seen)
            if problem:
                yield Broken(f"requirements.txt:{number}", problem, mend)
        for name in package.rules.package.evaluation:
            if canonicalize_name(name) not in {canonicalize_name(asked) for asked in _asked(package)}:
                yield Broken("requirements.txt", f"no {name}, which the organizers' evaluation imports",
                             f"add {name}=={package.rules.requirements.get(name, 'VERSION')}")

    note = f"; not known offline, --resolve asks pip: {', '.join(unknown)}" if unknown else ""
    return f"{len(lines)} pinned{note}", breaches()


def _requirement_problem(package: Submission, text: str, requirement: Requirement | None,
                         seen: set[str]) -> tuple[str, str]:
    if requirement is None or requirement.url:
        return f"{text}: no name with a version", "write name==version"
    name = canonicalize_name(requirement.name)
    if name in seen:
        return f"{text}: asked for twice", "keep one"
    seen.add(name)
    if not _known(package, name) and _meant(package, name):
        return f"{text}: no known library", f"write {_meant(package, name)}"
    fixed = _fixed(requirement)
    ours = {canonicalize_name(n): v for n, v in package.rules.requirements.items()}
    if fixed is None:
        return f"{text}: no fixed version", f"write {requirement.name}=={ours.get(name, 'VERSION')}"
    judges = ours[name] if name in {canonicalize_name(n) for n in package.rules.installed} else fixed
    if Version(fixed).public != Version(judges).public:
        return f"{text}: the judge has {judges}", f"write {requirement.name}=={judges}"
    return "", ""


def _fixed(requirement: Requirement) -> str | None:
    """The one version that a requirement allows."""
    exact = [spec.version for spec in requirement.specifier if spec.operator == "==" and "*" not in spec.version]
    try:
        return str(Version(exact[0])) if len(requirement.specifier) == len(exact) == 1 else None
    except InvalidVersion:
        return None


def _known(package: Submission, name: str) -> bool:
    """Whether the rules or this machine know a distribution of the name."""
    known = {canonicalize_name(n) for n in package.rules.requirements}
    try:
        return canonicalize_name(name) in known or bool(metadata.distribution(name))
    except metadata.PackageNotFoundError:
        return False


def _meant(package: Submission, name: str) -> str:
    """The library that somebody may have meant by `name`: one that is imported as that, or spelled nearly so."""
    imported = {"sklearn": "scikit-learn", "cv2": "opencv-python-headless", "yaml": "PyYAML",
                **package.rules.imported_as}
    for module, distribution in imported.items():
        if canonicalize_name(module) == canonicalize_name(name):
            return distribution
    return next(iter(difflib.get_close_matches(canonicalize_name(name), package.rules.requirements, 1, 0.85)), "")


def resolution(package: Submission) -> tuple[str, Iterator[Broken]]:
    """pip finds all of requirements.txt together, for the judge's Python. Asks the package index."""
    path = package.root / "requirements.txt"
    version = ".".join(package.rules.python.split(".")[:2])

    def breaches() -> Iterator[Broken]:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--target",
                       folder, "--python-version", version, "--only-binary=:all:", "--disable-pip-version-check", "-r",
                       str(path.resolve())]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=RESOLVE_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                yield Broken("requirements.txt", f"no answer of pip within {RESOLVE_SECONDS} s", "ask again later")
                return
        if done.returncode:
            reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            yield Broken("requirements.txt", reason[0].removeprefix("ERROR: "), "choose versions that go together")

    return f"pip finds them for Python {version}", breaches() if path.is_file() else iter(())


def kinds_of_models(package: Submission) -> tuple[str, Iterator[Broken]]:
    """No model of a kind that the contest forbids, by the names of what is imported and of what lies there."""
    forbidden = [(kind, pattern) for kind, patterns in package.rules.forbidden.items() for pattern in patterns]

    def named() -> Iterator[tuple[str, str]]:
        for source in package.sources:
            yield from ((package.inside(source.file, line), name) for name, line in names_used(source))
        yield from ((package.inside(path), kind) for path, kind in model_descriptions(package))

    def breaches() -> Iterator[Broken]:
        seen = set()
        for where, name in named():
            kind = next((kind for kind, pattern in forbidden if _fits(name, pattern)), None)
            if kind and (where, kind) not in seen:
                seen.add((where, kind))
                yield Broken(where, f"{name}, a {kind}", "the contest forbids it: do without")

    return ", ".join(f"no {kind}" for kind in package.rules.forbidden) or "every kind is allowed", breaches()


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rpartition(".")[2], pattern)


def network(package: Submission) -> tuple[str, Iterator[Broken]]:
    """No library that talks to other machines, no script that fetches."""

    def breaches() -> Iterator[Broken]:
        for source in package.sources:
            lines = {line: name for name, line in imported_names(source) if any(_is(name, p) for p in NETWORK)}
            yield from (Broken(package.inside(source.file, line), f"use of {name}", "take it out: there is no network")
                        for line, name in sorted(lines.items()))
        for path in package.scripts:
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                found = FETCHING.search(re.sub(r"(^|\s)#.*", "", line))
                if found:
                    yield Broken(package.inside(path, number), f"use of {found[0]}", "put what it fetches into the "
                                                                                     "package: there is no network")

    return "none used", breaches()


def _is(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern)


def downloads(package: Submission) -> tuple[str, Iterator[Broken]]:
    """No weights that a library would fetch."""

    def breaches() -> Iterator[Broken]:
        for source, call, name in _calls(package):
            fetched = _fetched(package, call, name)
            if fetched:
                yield Broken(package.inside(source.file, call.lineno), f"{name} fetches {fetched}",
                             "put the weights into the package and load them from there")

    return "no weights are fetched", breaches()


def _calls(package: Submission) -> Iterator[tuple]:
    entries = {name for kinds in package.rules.package.functions.values() for name in kinds} | {"main"}
    return reachable_calls(package.sources, entries)


def _fetched(package: Submission, call: ast.Call, name: str) -> str:
    """What a call would download, as far as its arguments are written out."""
    if any(_is(name, pattern) for pattern in FETCHED):
        return "files"
    if name.endswith(".from_pretrained"):
        first = call.args[0] if call.args else None
        text = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None
        return repr(text) if text and not (package.root / text).exists() else ""
    if not any(_is(name, pattern) for pattern in PRETRAINED):
        return ""
    values = {k.arg: k.value for k in call.keywords if k.arg in ("pretrained", "weights")}
    if name.startswith("open_clip.") and len(call.args) > 1:
        values["pretrained"] = call.args[1]
    for value in values.values():
        text = value.value if isinstance(value, ast.Constant) else dotted(value, {})
        written = isinstance(value, ast.Constant) or NAMED_WEIGHTS.search(text)  # another name may stand for anything
        if text and written and not (isinstance(text, str) and (package.root / text).exists()):
            return f"weights ({text})" if isinstance(text, str) else "pretrained weights"
    return ""


def file_access(package: Submission) -> tuple[str, Iterator[Broken]]:
    """What the source reads and writes where the contest forbids it."""
    forbids_all, outputs = not package.rules.package.file_access, package.rules.package.output

    def breaches() -> Iterator[Broken]:
        for source, call, name in _calls(package):
            kind = _access(call, name)
            if (kind == "writes" and (forbids_all or not outputs)) or (kind == "reads" and forbids_all):
                yield Broken(package.inside(source.file, call.lineno), f"{name} {kind} a file",
                             "keep it in memory, or in a Python module" if kind == "reads" else "return it instead")

    where = "neither reads nor writes files but the given images" if forbids_all else (
        f"writes in {', '.join(outputs)} alone, which `run` watches" if outputs else "writes no file")
    return where, breaches()


def _access(call: ast.Call, name: str) -> str:
    """Whether a call reads or writes a file; empty for neither."""
    if name in GIVEN_IMAGES:
        return ""
    if name == "open" or name.endswith(".open"):
        mode = _mode(call, 0 if name.endswith(").open") else 1)
        if name not in ("open", "io.open", "os.open", "codecs.open", "gzip.open") and not name.endswith("Path().open"):
            return ""  # of an archive or another library
        return "writes" if mode is None or set("wax+") & set(mode) else "reads"
    if any(_is(name, pattern) for pattern in WRITES):
        return "writes"
    return "reads" if any(_is(name, pattern) for pattern in READS) else ""


def _mode(call: ast.Call, position: int) -> str | None:
    """The mode of an `open`; None where it is not written out."""
    given = [k.value for k in call.keywords if k.arg == "mode"] + call.args[position:position + 1]
    if not given:
        return "r"
    return given[0].value if isinstance(given[0], ast.Constant) and isinstance(given[0].value, str) else None


def tuned_constants(package: Submission) -> tuple[str, Iterator[Broken]]:
    """Constants marked `# tuned`, and numbers whose names say that they are thresholds, against the limit."""
    limit = package.rules.limits.tuned_constants
    if limit is None:
        return "no limit", iter(())
    found = sorted({place for source in package.sources for place in _constants(source.file, source.tree)})

    def breaches() -> Iterator[Broken]:
        for file, line, text in found[limit:]:
            yield Broken(package.inside(file, line), f"{text}, one of {len(found)} constants that look tuned",
                         f"keep {limit}, derive the others from the data")

    return f"{len(found)} of at most {limit}", breaches()


def _constants(file: Path, tree: ast.Module) -> Iterator[tuple[Path, int, str]]:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for text, line in comments(file):
        if TUNED.match(text):
            yield file, line, lines[line - 1].split("#")[0].strip() or text
    marked = {line for text, line in comments(file) if TUNED.match(text)}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        number = isinstance(getattr(node, "value", None), ast.Constant) and type(node.value.value) in (int, float)
        names = [t.id for t in targets if isinstance(t, ast.Name)]
        if number and any(THRESHOLD.search(name) for name in names) and node.lineno not in marked:
            yield file, node.lineno, lines[node.lineno - 1].split("#")[0].strip()


def absolute_paths(package: Submission) -> tuple[str, Iterator[Broken]]:
    """No path of the machine on which it was written."""

    def breaches() -> Iterator[Broken]:
        for source in package.sources:
            for text, line in literals(source.tree):
                if HOME.fullmatch(text) and not text.startswith(SYSTEM):
                    yield Broken(package.inside(source.file, line), repr(text), "start from Path(__file__).parent")
        for path in package.scripts:
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                for word in re.split(r"[\s=:\"';|&()]+", "" if line.startswith("#!") else line.split(" #")[0]):
                    if HOME.fullmatch(word) and not word.startswith(SYSTEM):
                        yield Broken(package.inside(path, number), word, "start from the folder of the script")

    return "none", breaches()
