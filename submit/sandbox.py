"""Runs a stranger's program in a box: no network, writing in some folders only, limits of time, memory, processes
and disk; nothing of it is left.

Three tiers, the best that works is taken: bubblewrap; Linux namespaces of our own (`unshare`); Python's audit hooks
alone. The hooks are there in every tier, as they know the line of the program that did something.
"""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from data.errors import InputError, expect
from submit.rules import Limits

BOX = Path(__file__).with_name("box")
TIERS = ("bubblewrap", "namespaces", "audit")
MEANING = {
    "bubblewrap": "bubblewrap: no network, files read-only, processes of its own",
    "namespaces": "namespaces: no network, files read-only, processes of its own",
    "audit": "audit hooks alone: Python code is held, native code and shell scripts are not",
}
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys", "/dev", "/opt", "/run", "/var/lib")
SERVICES = "/run"  # where programs of the machine listen on sockets in the file system
KEPT = ("LD_LIBRARY_PATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")  # of the user's environment
MEMORY_SHARE = 0.8   # of the free memory of this machine that a program may take
SHARED_BYTES = 2**30  # of memory that its processes may share as files
OWN_BYTES = 2**26      # of answers and logs, besides what a program may write
PROBE_SECONDS = 20
GRACE_SECONDS = 40   # for the supervisor to end what it started
SHOWN_BYTES = 4000   # of its error output that are read


@dataclass(frozen=True)
class Box:
    """A folder of the judge's: `package`, a copy of what runs; `answers`, `scratch` and `logs`, which are written."""

    folder: Path

    @property
    def package(self) -> Path:
        return self.folder / "package"

    @property
    def answers(self) -> Path:
        return self.folder / "answers"

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"


@dataclass(frozen=True)
class Access:
    """What the hooks allow. output: folders of the package that it may write; given: what it may read besides."""

    output: tuple[str, ...] = ()
    given: tuple[Path, ...] = ()
    hidden: tuple[str, ...] = ()
    file_access: bool = True


@dataclass(frozen=True)
class Event:
    """One thing that the hooks saw: kind is write, output, read, truth, network or process."""

    kind: str
    what: str
    line: str  # file:line of the package; empty where it was nobody's
    denied: bool


@dataclass(frozen=True)
class Ending:
    """How a run ended: `ended` is exit, or the name of the limit that was reached."""

    ended: str
    status: int | None
    seconds: float
    peak_bytes: int
    peak_processes: int
    written_bytes: int
    left_running: int
    sample: str | None
    errors: str  # the end of its error output
    events: tuple[Event, ...]
    watched: int  # Python processes that the hooks were in
    memory_bytes: int  # that it might take: the rules' limit, or less where less was free


def make_box(folder: Path, package: Path, access: Access) -> Box:
    """A box with a copy of `package`, links as they are, and its output folders, which are empty: what lies in them
    was not written by this run."""
    box = Box(folder.resolve())
    shutil.copytree(package, box.package, symlinks=True)
    for path in (box.package / name for name in access.output):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    for path in (box.answers, box.scratch / "home", box.logs, *(box.package / name for name in access.output)):
        path.mkdir(parents=True, exist_ok=True)
    return box


def run_boxed(command: list[str], box: Box, access: Access, limits: Limits, *, tier: str, python: str,
              environment: dict[str, str]) -> Ending:
    """Run `command` in the package's folder under the limits and wait for its end; nothing of it runs on."""
    writable = [box.answers, box.scratch, box.logs, *(box.package / name for name in access.output)]
    for name in ("events.jsonl", "heartbeat", "stdout", "stderr"):
        (box.logs / name).unlink(missing_ok=True)
    config, covered = box.folder / "watch.json", _covered([box.folder, command[0], python, *access.given])
    _write(config, {"package": box.package, "writable": writable, "readable": [*SYSTEM, BOX, *access.given],
                    "covered": covered, "hidden": access.hidden, "file_access": access.file_access,
                    "log": box.logs / "events.jsonl", "quiet": bool(access.output)})
    spec, held = box.folder / "spec.json", _limits(limits)
    _write(spec, {
        "command": _confined(command, tier, writable, covered, config), "folder": box.package,
        "limits": held, "environment": _environment(box, python, config) | environment,
        "watched": [box.scratch, *(box.package / name for name in access.output)], "ours": [box.logs, box.answers],
        "heartbeat": box.logs / "heartbeat", "stdout": box.logs / "stdout", "stderr": box.logs / "stderr",
        "outcome": box.folder / "outcome.json"})
    _supervise(spec)
    return _ending(box, held["memory_bytes"])


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, default=str), encoding="utf-8")


def _limits(limits: Limits) -> dict:
    memory = min(int(limits.memory_gib * 2**30), int(MEMORY_SHARE * _free_memory()))
    return asdict(limits) | {"memory_bytes": memory, "data_bytes": 0 if _has_gpu() else memory,
                             "our_bytes": limits.written_bytes + OWN_BYTES}


def _free_memory() -> int:
    import torch

    from data.devices import free_bytes

    return free_bytes(torch.device("cpu"))


def _has_gpu() -> bool:
    """CUDA reserves far more addresses than memory, so there no limit on them is set."""
    return Path("/dev/nvidiactl").exists()


def _environment(box: Box, python: str, config: Path) -> dict[str, str]:
    """What the program sees: paths, a home of its own, and nothing else of ours."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return kept | {
        "PATH": f"{Path(python).parent}:/usr/local/bin:/usr/bin:/bin", "HOME": str(box.scratch / "home"),
        "TMPDIR": str(box.scratch), "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(BOX),
        "KIT_BOX": str(config)}


def _covered(needed: list[Path | str]) -> list[str]:
    """Folders that are empty in the box: where services listen, unless something that it needs lies there."""
    inside = any(Path(path).is_relative_to(SERVICES) for given in needed for path in (given, os.path.realpath(given)))
    return [] if inside or not Path(SERVICES).is_dir() else [SERVICES]


def _confined(command: list[str], tier: str, writable: list[Path], covered: list[str], config: Path) -> list[str]:
    if tier == "bubblewrap":
        binds = [part for path in writable for part in ("--bind", str(path), str(path))]
        devices = [part for path in sorted(Path("/dev").glob("nvidia*")) for part in ("--dev-bind", path, path)]
        return ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", *map(str, devices), "--size", str(SHARED_BYTES),
                "--tmpfs", "/dev/shm", "--proc", "/proc", *(part for path in covered for part in ("--tmpfs", path)),
                *binds,
                "--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent",
                "--cap-drop", "ALL", "--", *command]
    if tier == "namespaces":
        return ["unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--ipc", "--fork", "--kill-child",
                "--mount-proc", "--", sys.executable, "-I", str(BOX / "confine.py"), str(config), *command]
    return command


def _supervise(spec: Path) -> None:
    """Start the supervisor and wait; when we are interrupted, it ends what it started."""
    process = subprocess.Popen([sys.executable, "-I", str(BOX / "supervise.py"), str(spec)], start_new_session=True)
    try:
        process.wait()
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait(GRACE_SECONDS)
        raise


def _ending(box: Box, memory_bytes: int) -> Ending:
    outcome = json.loads((box.folder / "outcome.json").read_text(encoding="utf-8"))
    records = list(_records(box.logs / "events.jsonl"))
    events = [Event(r["kind"], _inside(r["what"], box), r["line"], r["denied"])
              for r in records if r["kind"] != "start"]
    errors = _inside(_last_output(box.logs / "stderr"), box)
    return Ending(**outcome, errors=errors, events=tuple(dict.fromkeys(events)),
                  watched=sum(r["kind"] == "start" for r in records), memory_bytes=memory_bytes)


def _inside(text: str, box: Box) -> str:
    """The text with files of the package as the package names them, and others of the box from the box on."""
    return text.replace(f"{box.package}{os.sep}", "").replace(f"{box.folder}{os.sep}", "")


def _last_output(path: Path) -> str:
    """The end of a log; nothing where the program has put something else in its place."""
    if path.is_symlink() or not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - SHOWN_BYTES))
        return file.read().decode("utf-8", "replace")


def _records(path: Path):
    """The lines that the hooks wrote; the program could have written others, which are left out."""
    if not path.is_file() or path.is_symlink():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
                if all(isinstance(record[key], str) for key in ("kind", "what", "line")) and "denied" in record:
                    yield record
            except (ValueError, KeyError, TypeError, RecursionError):
                continue


def best_tier(wanted: str = "auto") -> str:
    """The first tier that works here, or the one that is wanted; InputError where it does not work."""
    if wanted == "auto":
        return next(tier for tier in TIERS if _works(tier))
    expect(wanted in TIERS, "--tier", f"auto, {', '.join(TIERS)}", wanted)
    if not _works(wanted):
        raise InputError(f"--tier: expected one that works here ({', '.join(t for t in TIERS if _works(t))}), "
                         f"found {wanted}")
    return wanted


@cache
def _works(tier: str) -> bool:
    """Whether a program can be started in this tier: tried once."""
    if tier == "audit":
        return True
    with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
        config.write('{"writable": [], "covered": []}')
        config.flush()
        try:
            done = subprocess.run(_confined(["true"], tier, [], [], Path(config.name)), capture_output=True,
                                  timeout=PROBE_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return False
    return done.returncode == 0
