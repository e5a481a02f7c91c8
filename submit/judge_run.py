"""A packaged submission run as the judge runs it, then scored: what was held back, what it took, what it reached."""
from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import numpy as np

from data.errors import InputError, expect
from data.files import write_json
from data.images import list_images
from data.model_zoo import MODEL, ZooModel, load_model
from data.retrieval_set import find_retrieval_set
from submit.dev_splits import ROOT
from submit.import_closure import import_closure
from submit.intervals import share_interval
from submit.results import Result, Split
from submit.rules import Limits, place
from submit.sandbox import BOX, MEANING, Access, Box, Ending, Event, make_box, run_boxed
from submit.submission import Submission
from submit.task_anomaly import SCORES
from submit.task_retrieval import SIDES

CALLER = BOX / "call_functions.py"
LISTED = 10            # events of a kind that are named one by one
LARGEST_ANSWER = 2**24  # bytes of a file of answers that is read; one of ours has 400 kB
LONGEST_FIRST_LINE = 256  # bytes that the kernel reads to find a script's interpreter
GIB = 2**30


@dataclass(frozen=True)
class Line:
    """One verdict: ok or broken, about what, and what was found."""

    ok: bool
    rule: str
    text: str


@dataclass(frozen=True)
class Judged:
    lines: tuple[Line, ...]
    result: Result | None
    problems: tuple[InputError, ...]  # of the data, which were not given to the package
    seconds: float
    tier: str


@dataclass
class Progress:
    """What a package has answered so far, and why it has not answered the rest."""

    answers: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    endings: list[Ending] = field(default_factory=list)


@dataclass(frozen=True)
class Judge:
    """How packages are run here: tier, Python of the judge's versions, seed of the intervals."""

    tier: str
    python: str = sys.executable
    seed: int = 0


def run_submission(package: Submission, data: Path, out: Path, judge: Judge) -> Judged:
    """Run the package on `data`, keep its predictions in `out`, score them. Nothing else of it is left."""
    module = import_module(f"submit.task_{package.task}")
    split: Split = module.read(data)
    out = out.resolve()  # the package runs in a folder of its own
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".box-") as folder:
        progress, split = RUNNERS[package.task](package, split, data, Path(folder), out, judge)
    lines = [Line(True, "box", MEANING[judge.tier]), *_limit_lines(package.rules.limits, progress),
             *_event_lines(package, progress.endings)]
    result = None
    try:
        result = _of_all(module.evaluate(split, out, judge.seed), split, judge.seed)
        lines.append(_score_line(package, result, progress))
        if not progress.failed:  # else their reason is named already
            lines += [Line(False, "answers", str(problem)) for problem in result.problems[:LISTED]]
    except InputError as problem:
        lines.append(Line(False, "score", str(problem).replace(f"{out}{os.sep}", "")))  # once is enough
    seconds = sum(ending.seconds for ending in progress.endings)
    return Judged(tuple(lines), result, split.problems, seconds, judge.tier)


def _run_functions(package: Submission, box: Box, access: Access, spec: dict, judge: Judge) -> Ending:
    """The package's functions called by `box/call_functions.py` in the judge's Python."""
    path = box.folder / "calls.json"
    values = {"task": package.task, "package": box.package, "answers": box.answers, "modules": box.folder / "modules",
              "heartbeat": box.logs / "heartbeat", "gpu_memory_gib": package.rules.limits.gpu_memory_gib}
    path.write_text(json.dumps(values | spec, default=str), encoding="utf-8")
    return run_boxed([judge.python, str(CALLER), str(path)], box, access, package.rules.limits, tier=judge.tier,
                     python=judge.python, environment=package.rules.environment)


def _run_backdoor(package: Submission, split: Split, data: Path, folder: Path, out: Path, judge: Judge
                  ) -> tuple[Progress, Split]:
    """Every model by itself; after one that was stopped, the others go on in a new process."""
    given, models, problems = {}, {}, list(split.problems)
    for number, model in enumerate(split.units.values()):
        try:
            load_model(model)  # only what we have read safely is given to anybody
        except InputError as problem:
            problems.append(problem)
            continue
        given[str(number)] = _given(model, str(number), folder)
        models[str(number)] = model
    images = list(dict.fromkeys(Path(g["images"]) for g in given.values()))
    stores = _folders(path for images_of_one in images for path in list_images(images_of_one))
    access = Access(given=(*images, *stores), file_access=package.rules.package.file_access)
    box = make_box(folder / "box", package.root, access)
    _stage_modules(box.folder / "modules")
    progress = Progress()
    while waiting := [name for name in given if name not in progress.answers and name not in progress.failed]:
        ending = _run_functions(package, box, access, {"given": [given[name] for name in waiting]}, judge)
        progress.endings.append(ending)
        if not _collect(progress, box, ending, waiting):
            break
    for name, answer in progress.answers.items():
        write_json(out / f"{models[name].name}.json", {"backdoored": answer})
    progress.failed = {models[name].name: reason for name, reason in progress.failed.items()}
    units = {model.name: model for model in models.values()}
    return progress, replace(split, units=units, problems=tuple(problems))


def _given(model: ZooModel, name: str, folder: Path) -> dict:
    """What the judge hands over for one model; never whether it is backdoored."""
    transformation = folder / f"{name}.pkl"
    transformation.write_bytes(pickle.dumps(model.transformation, protocol=4))
    return {"name": name, "model": str((model.folder / MODEL).resolve()), "num_classes": model.num_classes,
            "images": str(model.images_folder.resolve()), "transformation": str(transformation)}


def _stage_modules(folder: Path) -> None:
    """The modules that build a network from a state dict, for the process that calls the package."""
    entry = ROOT / "data" / "preact_resnet.py"
    for file in import_closure({"data.preact_resnet": entry}, ROOT).modules.values():
        target = folder / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _collect(progress: Progress, box: Box, ending: Ending, waiting: list[str]) -> bool:
    """Take the answers in; whether it makes sense to go on with the models that have none yet."""
    new = {name: record for name in waiting if (record := _read_record(box.answers / f"{name}.json"))}
    for name, record in new.items():
        answer, problem = record.get("answer"), record.get("problem")
        took = record.get("seconds")
        progress.seconds[name] = float(took) if isinstance(took, (int, float)) else 0.0
        if problem is None and type(answer) is int and answer in (0, 1):
            progress.answers[name] = answer
        else:
            progress.failed[name] = str(problem or f"returned {record.get('shown')}, neither 0 nor 1")
    unanswered = [name for name in waiting if name not in new]
    stopped = ending.sample if ending.sample in unanswered else None
    if stopped is not None and ending.ended in ("exit", "seconds_per_sample"):
        progress.failed[stopped] = _reason(ending)  # it alone
        return True
    progress.failed |= {name: _reason(ending) for name in unanswered}
    return False


def _read_record(path: Path) -> dict | None:
    """A record that the box left, as far as it is one."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_ANSWER:
        return None
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _run_retrieval(package: Submission, split: Split, data: Path, folder: Path, out: Path, judge: Judge
                   ) -> tuple[Progress, Split]:
    """Both functions, once, on all rows."""
    frames = {SIDES[0]: split.data.queries[["query_image", "query_text"]], SIDES[1]: split.data.database}
    given = {side: {c: [_path(v, c) for v in frame[c]] for c in frame} for side, frame in frames.items()}
    table, images = find_retrieval_set(data)
    stores = _folders(Path(path) for columns in given.values() for name, column in columns.items()
                      if name != "query_text" for path in column)
    access = Access(given=(images.resolve(), *stores), hidden=(table.name,))  # the table has the targets
    box = make_box(folder / "box", package.root, access)
    progress = Progress()
    progress.endings.append(_run_functions(package, box, access, {"given": given}, judge))
    for name in ("import", "encode_queries", "encode_database"):
        record = _read_record(box.answers / f"{name}.json")
        if record and record.get("problem"):
            progress.failed[name] = str(record["problem"])
        elif record is None and name != "import" and "import" not in progress.failed:
            progress.failed[name] = _reason(progress.endings[0])
    for side in SIDES:
        file = box.answers / f"{side}.npy"
        if file.is_file() and not file.is_symlink():
            shutil.move(file, out / file.name)
    return progress, split


def _folders(files: Iterable[Path]) -> tuple[Path, ...]:
    """Where the files really lie: data may be links to a store."""
    return tuple(sorted({path.resolve().parent for path in files}))


def _path(value: str, column: str) -> str:
    return str(Path(value).resolve()) if column != "query_text" else value


def _run_anomaly(package: Submission, split: Split, data: Path, folder: Path, out: Path, judge: Judge
                 ) -> tuple[Progress, Split]:
    """`run.sh` in the package's folder, with the data beside it."""
    rule = package.rules.package
    images = [image.path for category in split.units.values() for image in category.images]
    access = Access(rule.output, (data.resolve(), *_folders(images)), rule.hidden, rule.file_access)
    box = make_box(folder / "box", package.root, access)
    expect(not (box.package / "data").exists(), package.root / "data", "nothing: the judge's data lie there", "a file")
    (box.package / "data").symlink_to(data.resolve())
    progress = Progress()
    progress.endings.append(run_boxed([f"./{rule.executable[0]}"], box, access, package.rules.limits, tier=judge.tier,
                                      python=judge.python, environment=package.rules.environment))
    _copy_scores(box.package / SCORES, out / SCORES)
    if reason := _script_failure(box.package / rule.executable[0], progress.endings[0], out / SCORES):
        progress.failed[rule.executable[0]] = reason
    return progress, split


def _script_failure(script: Path, ending: Ending, scores: Path) -> str | None:
    """Why a script was not started, failed or left no scores; None where it did its work or met a limit."""
    crashed = ending.ended == "start" or (ending.ended == "exit" and ending.status != 0)
    if crashed and (problem := _first_line_problem(script, ending)):
        return problem
    if crashed:
        return _reason(ending)
    return f"wrote no scores, {_reason(ending)}" if ending.ended == "exit" and not scores.exists() else None


def _first_line_problem(script: Path, ending: Ending) -> str | None:
    """Of a script that the kernel could not start, as its errors do not say why; None of one that it could."""
    if not script.is_file():
        return "expected a script, found no such file"
    with script.open("rb") as file:
        first = file.readline(LONGEST_FIRST_LINE).decode("utf-8", "replace").rstrip("\n")
    words = first[2:].replace("\t", " ").strip(" ").split(" ") if first.startswith("#!") else []  # "\r" is of the name
    missing = bool(words) and not (script.parent / words[0]).is_file()
    if not missing and "Exec format error" not in ending.errors:
        return None
    return f"line 1: expected #! and a program that exists, found {first[:100]!r}"


def _copy_scores(source: Path, target: Path) -> None:
    """The regular files of a tree of scores; links and files too large to be scores are left."""
    for file in sorted(source.rglob("*_scores.json")) if not source.is_symlink() else ():
        inside = file.relative_to(source)
        linked = any((source / part).is_symlink() for part in (inside, *inside.parents[:-1]))
        if not linked and file.is_file() and file.stat().st_size <= LARGEST_ANSWER:
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, target / inside)


RUNNERS = {"backdoor": _run_backdoor, "retrieval": _run_retrieval, "anomaly": _run_anomaly}


def _reason(ending: Ending) -> str:
    """Why a process has no answer: the limit it met, or how it ended."""
    if ending.ended != "exit":
        return {"start": "could not be started"}.get(ending.ended, f"met the limit of {ending.ended}") + (
            f": {_last_line(ending)}" if ending.ended == "start" else "")
    return f"ended with {_how(ending.status)}" + (f": {_last_line(ending)}" if _last_line(ending) else "")


def _how(status: int | None) -> str:
    """An exit status in words. Above 128 it stands for a signal, as shells and bubblewrap pass one on."""
    number = abs(status or 0) if (status or 0) < 0 else (status or 0) - 128
    name = f" ({signal.Signals(number).name})" if number in set(signal.Signals) else ""
    return f"signal {number}{name}" if status is not None and status < 0 else f"exit status {status}{name}"


def _last_line(ending: Ending) -> str:
    lines = [line for line in ending.errors.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""


def _limit_lines(limits: Limits, progress: Progress) -> Iterator[Line]:
    """One line a limit, and one for each failure."""
    endings = progress.endings
    met = {ending.ended for ending in endings}
    failures = list(progress.failed.items())
    for name, reason in failures[:LISTED]:
        yield Line(False, "answers", f"{name}: {reason}")
    if len(failures) > LISTED:
        yield Line(False, "answers", f"and {len(failures) - LISTED} more")
    total = sum(ending.seconds for ending in endings)
    yield Line("seconds" not in met, "time", f"{total:.1f} s, limit {_or_none(limits.seconds)}")
    if limits.seconds_per_sample is not None:
        over = "seconds_per_sample" in met  # then how long the sample would have taken is not known
        longest = max(progress.seconds.values(), default=0.0)
        took = f"more than {limits.seconds_per_sample:.1f} s" if over else f"{longest:.1f} s at most"
        yield Line(not over, "time a sample", f"{took}, limit {limits.seconds_per_sample:g}")
    peak = max((ending.peak_bytes for ending in endings), default=0)
    least = min((ending.memory_bytes for ending in endings), default=0) / GIB
    here = "" if least >= limits.memory_gib else f"; here {least:.1f}, as no more was free"
    yield Line("memory_bytes" not in met, "memory", f"{peak / GIB:.2f} GiB, limit {limits.memory_gib:g}{here}")
    most = max((ending.peak_processes for ending in endings), default=0)
    left = sum(ending.left_running for ending in endings if ending.ended == "exit")
    yield Line("processes" not in met and not left, "processes",
               f"{most} at once, limit {limits.processes}" + (f"; {left} left running, ended" if left else ""))
    written = max((ending.written_bytes for ending in endings), default=0)
    yield Line("written_bytes" not in met, "disk", f"{written} bytes, limit {limits.written_bytes}")


def _or_none(limit: float | None) -> str:
    return "none" if limit is None else f"{limit:g}"


KINDS = {"write": "writes outside", "output": "writes", "read": "reads outside", "truth": "reads the truth",
         "network": "network"}


def _event_lines(package: Submission, endings: list[Ending]) -> Iterator[Line]:
    """What the hooks saw, a line an event of a forbidden kind; other processes are named as they are no breach."""
    events = list(dict.fromkeys(event for ending in endings for event in ending.events))
    strict = not package.rules.package.file_access
    if endings and not any(ending.watched for ending in endings):
        yield Line(True, "hooks", "no Python process was watched")
    for kind, title in KINDS.items():
        found = [event for event in events if event.kind == kind]
        if kind == "output" and not strict:
            continue
        if not found:
            yield Line(True, title, "none")
        for event in found[:LISTED]:
            yield Line(False, title, _event_text(event))
        if len(found) > LISTED:
            yield Line(False, title, f"and {len(found) - LISTED} more")
    started = [event for event in events if event.kind == "process" and event.line]
    if started:
        shown = "; ".join(_event_text(event) for event in started[:LISTED])
        yield Line(True, "starts", shown)


def _event_text(event: Event) -> str:
    where = event.line or "a library or script"
    return f"{where}: {event.what}{' (denied)' if event.denied else ''}"


def _of_all(result: Result, split: Split, seed: int) -> Result:
    """The result over every model that was given: one without an answer counts as wrong."""
    total = len(split.units)
    if result.counted != "models" or result.n == total:
        return result
    correct = np.array([part["correct"] for part in result.parts] + [False] * (total - result.n))
    note = f"{total - result.n} of {total} models have no answer: the value counts them as wrong"
    return replace(result, value=100 * float(correct.mean()), interval=share_interval(correct, seed), n=total,
                   notes=(*result.notes, note))


def _score_line(package: Submission, result: Result, progress: Progress) -> Line:
    won = place(result.value, package.rules.leaderboard)
    where = f"place {won}" if won else "below the leaderboard"
    whole = not progress.failed and not result.problems
    return Line(whole, "score", f"{package.rules.metric} {result.value:.2f} on {result.n} {result.counted}, {where}")
