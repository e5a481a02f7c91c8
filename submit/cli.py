"""The command line: `python -m submit ...`. Parses, calls, prints; bad input ends in one line."""
from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data.devices import VARIABLE
from data.errors import InputError

if TYPE_CHECKING:
    from submit.engines import Engine

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  no_args_is_help=True,
                  help="Submission kit for trustworthy-AI contests: predict, score and train, as the organizers do.")
zoo_app = typer.Typer(no_args_is_help=True, help="Model zoos in the organizers' layout.")
weights_app = typer.Typer(no_args_is_help=True, help="The embedded weights, and those of the hub.")
app.add_typer(zoo_app, name="zoo")
app.add_typer(weights_app, name="weights")

UsageProblem = typer.BadParameter.__mro__[2]  # click's ClickException, wherever this typer keeps its click
INTERRUPTED = 130

TASKS = ("retrieval", "anomaly", "backdoor")


class Task(str, Enum):
    retrieval = "retrieval"
    anomaly = "anomaly"
    backdoor = "backdoor"
    all = "all"


class OneTask(str, Enum):
    retrieval = "retrieval"
    anomaly = "anomaly"
    backdoor = "backdoor"


class ProfiledTask(str, Enum):
    retrieval = "retrieval"
    anomaly = "anomaly"
    backdoor = "backdoor"
    repair = "repair"
    purify = "purify"


class Weights(str, Enum):
    parser = "parser"
    encoder = "encoder"
    backbone = "backbone"


Seed = Annotated[int, typer.Option(help="Seed of the generated data and of every random draw.", min=0, max=2**63 - 1)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON instead of a table.")]
Runs = Annotated[Path, typer.Option(help="Folder for records and predictions.")]

Preset = Annotated[str, typer.Option(help="Settings of the anomaly task: embedded, musc, report or musc-v2.")]
NetWeights = Annotated[Path | None, typer.Option(
    help="Folder of the weights that a preset needs: DIR/<timm name of the net>/model.safetensors.")]
EngineName = Annotated[str, typer.Option("--engine", help="Where units are done: local (this machine), ray "
                                         "($RAY_ADDRESS, else here) or slurm.")]
Workers = Annotated[int, typer.Option(help="Units done side by side; 0 = one a GPU, on CPUs all in this process.",
                                      min=0)]
Networks = Annotated[int, typer.Option("--workers", help="Networks side by side; 0 = one a GPU, or one a CPU core.",
                                       min=0)]
WeightCache = Annotated[Path | None, typer.Option(help="Folder of fetched weights. Default: .cache/weights.")]
RulesFolder = Annotated[Path | None, typer.Option(help="Folder with the rules of another contest, a TOML file a task.")]


@app.command(epilog="Example: python -m submit score anomaly --data my_parts/")
def score(
    task: Annotated[Task, typer.Argument(help="Which task, or all three.", show_choices=True)],
    data: Annotated[Path | None, typer.Option(
        help="Folder in the organizers' layout; for `all`, one with a folder per task. Default: the built-in dev "
             "split.")] = None,
    predictions: Annotated[Path | None, typer.Option(
        help="Score the outputs in this folder instead of predicting; for `all`, a folder per task.")] = None,
    explain: Annotated[bool, typer.Option(
        "--explain", help="Of retrieval: record what each text was read as, the five best images and the target's "
                          "rank; show the worst.")] = False,
    preset: Annotated[str, typer.Option(
        help="Settings of the anomaly task: embedded, musc, report or musc-v2.")] = "embedded",
    weights: Annotated[Path | None, typer.Option(
        help="Folder of weights: DIR/<timm name of the net>/model.safetensors for a preset; DIR/encoder and DIR/parser "
             "(or one of them) for retrieval.")] = None,
    repair: Annotated[bool, typer.Option(
        "--repair", help="Of backdoor: repair the networks that are flagged, up to a minute each; ACC and ASR before "
                         "and after where set and trigger can be made again.")] = False,
    sets: Annotated[Path | None, typer.Option(
        help="With --repair: folder with one folder an image set (not for digits).")] = None,
    engine: EngineName = "local", workers: Workers = 0,
    seed: Seed = 0, device: Device = "auto", json: Json = False, runs: Runs = Path("runs"),
) -> None:
    """Predict and score a task as the organizers do. An interrupted run goes on when it is started again."""
    from submit.score_run import finish_run, score_task
    from submit.tables import print_outcomes, print_record, unit_progress

    device, chosen = _use_engine(engine, workers, device)
    if explain and task not in (Task.retrieval, Task.all):
        raise InputError(f"--explain: expected with retrieval or all, found {task.value}")
    if (repair and task not in (Task.backdoor, Task.all)) or (sets and not repair):
        raise InputError(f"--repair, --sets: expected together, with backdoor or all, found {task.value}")
    settings = _use_weights(task, preset, weights)
    run = _new_run(runs, f"score-{task.value}")
    tasks = TASKS if task is Task.all else (task.value,)
    with ExitStack() as stack:
        progress, outcomes = stack.enter_context(unit_progress()), []
        for name in tasks:
            inside = Path(name if task is Task.all else "")
            outcome = score_task(name, runs, data=data and data / inside,
                                 predictions=predictions and predictions / inside,
                                 seed=seed, device=device, settings=settings, progress=progress,
                                 explain=explain and name == "retrieval", engine=chosen)
            if outcome.fresh:
                stack.callback(outcome.fresh.close)
            if repair and name == "backdoor":
                from submit.repair_run import repaired_outcome

                outcome = repaired_outcome(outcome, data and data / inside, sets, runs, progress)
            outcomes.append(outcome)
        record = finish_run(run, outcomes, command=_command(), seed=seed, device=device)
    print_record(record) if json else print_outcomes(outcomes, run / "record.json")
    if repair and not json:
        from submit.repair_run import print_repairs

        print_repairs(outcomes[-1].result.extra["repair"])
    raise typer.Exit(1 if any(outcome.problems for outcome in outcomes) else 0)


@app.command(epilog="Example: python -m submit package backdoor --out my_detector")
def package(
    task: Annotated[OneTask, typer.Argument(help="Which task.")],
    out: Annotated[Path, typer.Option(help="New folder for the submission; its zip lies beside it, as OUT.zip.")],
    preset: Preset = "embedded", weights: NetWeights = None,
    half: Annotated[bool, typer.Option("--half/--full", help="Store float32 weights as float16, or as they are.")]
    = True,
    rules: RulesFolder = None, json: Json = False,
    push: Annotated[str | None, typer.Option(
        help="Also to the private repository ORG/NAME of the Hugging Face hub, where it takes the place of what lies "
             "there; a finished OUT is pushed as it is.")]
    = None,
) -> None:
    """Write what the judge of a task takes: a folder and a zip, the same bytes each time."""
    from submit.ship_commands import package as write

    if push is None:
        write(task.value, out, preset=preset, weights=weights, half=half, rules=rules, as_json=json)
        return
    from submit.package import Choice
    from submit.push import finished, print_pushed

    if not finished(out, task.value, Choice(preset, weights, half), push):
        write(task.value, out, preset=preset, weights=weights, half=half, rules=rules, as_json=json)
    print_pushed(out, push)


@app.command(epilog="Example: python -m submit check my_detector")
def check(
    path: Annotated[Path, typer.Argument(help="Folder or zip of a submission.")],
    task: Annotated[OneTask | None, typer.Option(help="Default: the task whose files lie there.")] = None,
    resolve: Annotated[bool, typer.Option(
        "--resolve", help="Also ask pip whether it finds the requirements; takes minutes.")] = False,
    rules: RulesFolder = None, json: Json = False,
) -> None:
    """Look a submission through for everything that a judge would refuse, one line a result; runs nothing of it."""
    from submit.ship_commands import check as look_through

    broken = look_through(path, task=task and task.value, resolve=resolve, rules=rules, as_json=json)
    raise typer.Exit(1 if broken else 0)


@app.command(epilog="Example: python -m submit run my_detector --data data/zoos/tiny")
def run(
    path: Annotated[Path, typer.Argument(help="Folder or zip of a submission.")],
    data: Annotated[Path | None, typer.Option(
        help="Folder in the organizers' layout. Default: the built-in dev split.")] = None,
    task: Annotated[OneTask | None, typer.Option(help="Default: the task whose files lie there.")] = None,
    tier: Annotated[str, typer.Option(help="What holds it: auto, bubblewrap, namespaces or audit.")] = "auto",
    python: Annotated[Path | None, typer.Option(
        help="Interpreter with the judge's versions, as `make test-judge` sets one up. Default: this one.")] = None,
    rules: RulesFolder = None, seed: Seed = 0, json: Json = False, runs: Runs = Path("runs"),
) -> None:
    """Run a submission as the judge does - no network, its limits, its own process - and score it; a line a verdict."""
    from submit.ship_commands import run as run_as_judge

    broken = run_as_judge(path, data=data, task=task and task.value, tier=tier, python=python, seed=seed, rules=rules,
                          runs=_new_run(runs, "run"), command=_command(), as_json=json)
    raise typer.Exit(1 if broken else 0)


@zoo_app.command("build", epilog="Example: python -m submit zoo build --recipe tiny --out zoos/mine")
def zoo_build(
    out: Annotated[Path, typer.Option(help="Folder of the zoo; finished models in it are kept.")],
    recipe: Annotated[str, typer.Option(help="tiny, half, cpu, contest, or a TOML file as in data/recipes.")] = "tiny",
    data: Annotated[Path | None, typer.Option(help="Folder with one folder an image set (not for digits).")] = None,
    engine: EngineName = "local", workers: Networks = 0,
    seed: Annotated[int | None, typer.Option(help="In place of the recipe's seed.", min=0, max=2**63 - 1)] = None,
    device: Device = "auto", json: Json = False,
) -> None:
    """Train clean and backdoored models and lay them out as the organizers do; goes on where it was stopped."""
    from submit.zoo_commands import build

    _, chosen = _use_engine(engine, workers, device, cores=True)
    problems = build(out, recipe, data, seed=seed, engine=chosen, as_json=json)
    raise typer.Exit(1 if problems else 0)


@zoo_app.command("inspect", epilog="Example: python -m submit zoo inspect data/zoos/tiny")
def zoo_inspect(folder: Annotated[Path, typer.Argument(help="Folder of a zoo.")], json: Json = False) -> None:
    """List the models of a zoo, and what is wrong with those that cannot be read."""
    from submit.zoo_commands import inspect

    raise typer.Exit(1 if inspect(folder, as_json=json) else 0)


@zoo_app.command("observe", epilog="Example: python -m submit zoo observe data/zoos/tiny --out observed "
                                   "--network digits-blended-0.1-0")
def zoo_observe(
    folder: Annotated[Path, typer.Argument(help="Folder of a zoo with its zoo.json.")],
    out: Annotated[Path, typer.Option(help="Folder for a folder of plots and numbers each network.")],
    network: Annotated[list[str] | None, typer.Option(help="One of its networks; may be repeated. Default: all.")]
    = None,
    data: Annotated[Path | None, typer.Option(help="Folder with one folder an image set (not for digits).")] = None,
    seed: Seed = 0, device: Device = "auto",
) -> None:
    """Plot how the neurons of backdoored networks move in unlearning, how active they are, what the trigger does."""
    from submit.observe_commands import observe

    _use_device(device)
    problems = observe(folder, out, data, only=network or (), seed=seed, command=_command())
    raise typer.Exit(1 if problems else 0)


@app.command(epilog="Examples: python -m submit defend tsbd --zoo data/zoos/tiny; "
                    "python -m submit defend jpeg --attack lsp; "
                    "python -m submit defend sweep defense/sweeps/tiny.toml")
def defend(
    method: Annotated[str, typer.Argument(
        help="Of backdoors: tsbd, ft, fp, ... (defense/defenses.py has all). Of unlearnable examples: jpeg, gray, ... "
             "(defense/countermeasures.py). Or sweep.")],
    recipe: Annotated[Path | None, typer.Argument(help="With sweep: its TOML file, as in defense/sweeps.")] = None,
    zoo: Annotated[Path | None, typer.Option(help="Folder of a zoo with its zoo.json: every backdoored network of it "
                                                  "is repaired and judged.")] = None,
    attack: Annotated[str | None, typer.Option(
        help="Of unlearnable examples: lsp, ops, ar, ... (data/unlearnable.py). Victims are trained on the clean, the "
             "poisoned and the purified set.")] = None,
    ratio: Annotated[float | None, typer.Option(
        help="With --attack: share of the training images that it alters. Default: 1.", show_default=False)] = None,
    image_set: Annotated[str | None, typer.Option(
        "--set", help="With --attack: mnist or a folder in --data, with a victim of full width, which takes a GPU. "
                      "Default: the built-in digits, with a narrow one.", show_default=False)] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with one folder an image set (not for digits).")] = None,
    clean: Annotated[float | None, typer.Option(
        help="With --zoo: share of the training images that the defense gets, clean. Default: 0.05.",
        show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(
        help="With sweep: folder of its victims and finished runs. Default: RUNS/sweeps/<name of the recipe>.")] = None,
    engine: EngineName = "local",
    workers: Networks = 0,
    seed: Seed = 0, device: Device = "auto", json: Json = False, runs: Runs = Path("runs"),
) -> None:
    """Repair backdoored networks (ACC, ASR, RA, DER), or purify unlearnable examples (clean accuracy of a victim); goes
    on where it was stopped."""
    from submit.defend_commands import ATTACK, CLEAN, SWEEP, ZOO, defend_sweep, defend_zoo, finish, kind_asked
    from submit.unlearnable_commands import SET, defend_attacked, defend_unlearnable_sweep, of_unlearnable

    kind = kind_asked(method, {"RECIPE": recipe, "--zoo": zoo, "--attack": attack, "--ratio": ratio,
                               "--set": image_set, "--clean": clean, "--out": out})
    device, chosen = _use_engine(engine, workers, device, cores=True)
    run = _new_run(runs, f"defend-{method}")
    if kind == ZOO:
        outcome = defend_zoo(method, zoo, data, clean=CLEAN if clean is None else clean, seed=seed, engine=chosen,
                             runs=runs)
    elif kind == ATTACK:
        outcome = defend_attacked(method, attack, data, set_name=image_set or SET,
                                  ratio=1.0 if ratio is None else ratio, seed=seed, engine=chosen, runs=runs)
    else:
        folder = out or runs / "sweeps" / recipe.stem
        outcome = defend_unlearnable_sweep(recipe, data, engine=chosen, out=folder) if of_unlearnable(recipe) else \
            defend_sweep(recipe, data, engine=chosen, out=folder)
    left_out = finish(outcome, run, command=_command(), seed=None if kind == SWEEP else seed, device=device,
                      as_json=json)
    raise typer.Exit(1 if left_out else 0)


@app.command("profile", epilog="Examples: python -m submit profile anomaly --preset report --images 200; "
                               "python -m submit profile purify --images 100000 --gpu here")
def profile_task(
    task: Annotated[ProfiledTask, typer.Argument(
        help="Which task; repair is `defense.predict.repair_model`, purify `defense.predict.purify_dataset`.")],
    gpu: Annotated[str, typer.Option(help="Whom to predict for: a GPU of submit/gpus.toml, or `here`.")] = "rtx4090",
    preset: Annotated[str, typer.Option(
        help="embedded or report for retrieval; embedded, musc, report or musc-v2 for anomaly.")] = "embedded",
    queries: Annotated[int | None, typer.Option(help="Of retrieval, and as many database images.", min=1)] = None,
    images: Annotated[int | None, typer.Option(
        help="Of a category; of a repair, the clean ones; of a tree to purify, all.", min=2)] = None,
    categories: Annotated[int | None, typer.Option(help="Of the anomaly task.", min=1)] = None,
    classes: Annotated[int | None, typer.Option(help="Of a network, or of a tree to purify.", min=1)] = None,
    side: Annotated[int | None, typer.Option(
        help="Pixels of the images to purify; above 64, D-VAE's larger layers.", min=1)] = None,
    gpu_memory: Annotated[float | None, typer.Option(
        help="GiB that may be used, in place of the GPU's; on a larger GPU the allocator is capped.", min=0.1)] = None,
    device: Device = "auto", json: Json = False, runs: Runs = Path("runs"),
) -> None:
    """Time and memory by stage, here and predicted for a GPU one does not have, against the limit."""
    import torch

    from submit.profile_commands import asked_for, broken, profile

    sizes = {"queries": queries, "images": images, "categories": categories, "classes": classes, "side": side}
    asked = asked_for(task.value, preset, sizes, gpu, gpu_memory, torch.device(_use_device(device)))
    run = _new_run(runs, f"profile-{task.value}")
    raise typer.Exit(1 if broken(profile(asked, run, command=_command(), as_json=json)) else 0)


@app.command(epilog="Example: python -m submit report runs/20260102-101500-4711-score-all --out report.html")
def report(
    chosen: Annotated[list[Path] | None, typer.Argument(
        metavar="[RUN]...", help="Folders that commands left under runs/. Default: the newest scored run.")] = None,
    out: Annotated[Path | None, typer.Option(help="New HTML file. Default: report.html in the first RUN.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    json: Json = False, runs: Runs = Path("runs"),
) -> None:
    """One HTML page of any runs: results, limits, pictures, curves. Nothing else is needed to read it."""
    from submit.report_commands import report as write

    write(chosen or [], out, runs, force=force, as_json=json)


@weights_app.command("train", epilog="Example: python -m submit weights train parser --out my_parser")
def weights_train(
    name: Annotated[Weights, typer.Argument(help="Which of the embedded models.")],
    out: Annotated[Path, typer.Option(help="New folder for the weights and their card.")],
    start: Annotated[Path | None, typer.Option(
        help="What the parser starts from: BERT or DistilBERT, a folder of a model hub or a wheel; or a parser.",
    )] = None,
    photos: Annotated[Path | None, typer.Option(
        help="A folder of photographs of materials, which the backbone learns from beside generated ones.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of training. Default: those of the embedded weights.")] = None,
    seed: Seed = 0, device: Device = "cpu",
) -> None:
    """Train one of the embedded models, with the script that made the committed weights; stopped, it goes on."""
    from submit.weight_commands import train

    train(name.value, out, seed=seed, start=start, photos=photos, steps=steps, device=_use_device(device))


@weights_app.command("average", epilog="Example: python -m submit weights average parser_1 parser_2 --out my_parser")
def weights_average(
    parsers: Annotated[list[Path], typer.Argument(metavar="PARSER...", help="Folders of `weights train parser`.")],
    out: Annotated[Path, typer.Option(help="New folder for the weights and their card.")],
) -> None:
    """The mean of parsers that were trained on one after the other (`--start`): it reads unseen wording better."""
    from submit.weight_commands import average_parsers

    average_parsers(parsers, out)


@weights_app.command("tune", epilog="Example: python -m submit weights tune --data my_set/ --out my_weights/encoder")
def weights_tune(
    data: Annotated[Path, typer.Option(help="Training set in the organizers' layout: one CSV and its images.")],
    out: Annotated[Path, typer.Option(help="New folder for the tuned encoder.")],
    source: Annotated[Path | None, typer.Option("--from", help="Encoder to start from. Default: the embedded.")] = None,
    cache: Annotated[Path, typer.Option(help="Folder for the features of the images.")] = Path("runs/features"),
    seed: Seed = 0, device: Device = "auto",
) -> None:
    """Fit the last layer of an image encoder to a training set of retrieval; the rest of it runs once an image."""
    from submit.weight_commands import tune

    raise typer.Exit(
        1 if tune(data, out, source=source, cache=cache, seed=seed, device=_use_device(device)) else 0)


@weights_app.command("list", epilog="Example: python -m submit weights list")
def weights_list(cache: WeightCache = None, json: Json = False) -> None:
    """The weights that the kit knows: what for, whose, how large, and whether they are here."""
    from submit.weight_commands import list_weights
    from submit.weights_fetching import CACHE

    list_weights(cache or CACHE, as_json=json)


@weights_app.command("fetch", epilog="Example: python -m submit weights fetch vit_large_patch14_dinov2")
def weights_fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of `weights list`, or all.")],
    cache: WeightCache = None,
) -> None:
    """Get weights from the Hugging Face hub; a stopped download goes on, every file is checked."""
    from submit.weight_commands import fetch_weights
    from submit.weights_fetching import CACHE

    fetch_weights(names, cache or CACHE)


@weights_app.command("freeze", epilog="Example: python -m submit weights freeze all --out frozen")
def weights_freeze(
    out: Annotated[Path, typer.Option(help="New folder; give it as --weights on a machine without network.")],
    names: Annotated[list[str] | None, typer.Argument(
        metavar="[NAME]...", help="Names of `weights list`, or all. Default: what was fetched.")] = None,
    cache: WeightCache = None,
) -> None:
    """Lay fetched weights out for a machine without network, with checksums and how their input is prepared."""
    from submit.weight_commands import freeze_weights
    from submit.weights_fetching import CACHE

    freeze_weights(names or [], cache or CACHE, out)


@weights_app.command("verify", epilog="Example: python -m submit weights verify frozen --load")
def weights_verify(
    folder: Annotated[Path, typer.Argument(help="Folder that `weights freeze` made.")],
    load: Annotated[bool, typer.Option("--load", help="Also load each as the kit does.")] = False,
) -> None:
    """Check a frozen folder: every file, its checksum, and that inputs are prepared as when it was frozen."""
    from submit.weight_commands import verify_weights

    raise typer.Exit(1 if verify_weights(folder, load=load) else 0)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 something could not be scored, 2 bad input, 130 interrupted."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be what a terminal can show
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        with _ended_as_by_ctrl_c():
            status = app(arguments, standalone_mode=False)
    except UsageProblem as error:
        asked_nothing = type(error).__name__ == "NoArgsIsHelpError"  # the help is printed already
        reason = error.format_message().replace("Value error, ", "")
        status = 2 if asked_nothing else _complain(f"{reason} (see --help)")
    except InputError as error:
        status = _complain(error)
    except OSError as error:
        place = error.filename or "file system"
        status = _complain(f"{place}: expected to read and write here, found {error.strerror or error}")
    except (typer.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    if status == INTERRUPTED:  # newer typers turn Ctrl-C into this status themselves
        print("interrupted: what is finished is kept, and the same command goes on from there; `run` starts anew",
              file=sys.stderr)
    sys.exit(status)


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """In here the signals of `timeout`, of batch systems and of a terminal that closes interrupt as Ctrl-C does: what
    would be left is cleaned up, and no worker goes on."""
    kinds = [kind for kind in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(kind) is not signal.SIG_IGN]
    before = {kind: signal.signal(kind, signal.default_int_handler) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _complain(message: object) -> int:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def _use_device(name: str) -> str:
    """Check the device and make it the one that predict functions use."""
    from data.devices import chosen_device

    os.environ[VARIABLE] = name
    os.environ[VARIABLE] = str(chosen_device())  # settled, for other processes too
    return os.environ[VARIABLE]


def _use_engine(name: str, workers: int, device: str, *, cores: bool = False) -> tuple[str, Engine]:
    """Check engine and device and make the device the predict functions'. GPUs of other machines need not be here:
    this process then takes what it has. cores: without a number of workers, one a core where they work on CPUs."""
    from submit.engines import chosen_engine, cpu_cores

    elsewhere = name in ("ray", "slurm") and device == "cuda"
    here = _use_device("auto" if elsewhere else device)
    theirs = device if elsewhere else here
    if cores and theirs == "cpu":
        workers = workers or cpu_cores()
    return theirs, chosen_engine(name, workers, theirs)


def _use_weights(task: Task, preset: str, weights: Path | None) -> tuple[str, ...]:
    """Make a preset and weights those that the predict functions use; what predictions depend on."""
    if preset != "embedded" and task not in (Task.anomaly, Task.all):
        raise InputError(f"--preset: expected with anomaly or all, found {task.value}")
    if weights and task is Task.backdoor:
        raise InputError(f"--weights: expected with retrieval, anomaly or all, found {task.value}")
    files: list[Path] = []
    if task in (Task.retrieval, Task.all):
        files += _use_retrieval_weights(weights, needed=task is Task.retrieval)
    if task in (Task.anomaly, Task.all):
        files += _use_preset(preset, weights)
    stats = [(file, file.stat()) for file in files]
    return (preset, *(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats))


def _use_preset(name: str, weights: Path | None) -> tuple[Path, ...]:
    """The files of an anomaly preset, which its predict function will read."""
    from anomaly.predict import PRESET, WEIGHTS
    from submit.weights_registry import preset_files

    files = preset_files(name, weights)
    os.environ[PRESET], os.environ[WEIGHTS] = name, str(weights.resolve()) if weights else ""
    return files


def _use_retrieval_weights(weights: Path | None, *, needed: bool) -> list[Path]:
    """The files of encoder and parser in a folder of weights; it may hold neither unless they are needed."""
    from retrieval.nets import PARTS, WEIGHTS
    from submit.weights_registry import retrieval_folders

    asked = weights is not None and (needed or any((weights / part).is_dir() for part in PARTS))
    folders = retrieval_folders(weights if asked else None)
    os.environ[WEIGHTS] = str(weights.resolve()) if folders else ""
    return sorted(file for folder in folders.values() for file in folder.rglob("*") if file.is_file())


def _new_run(runs: Path, name: str) -> Path:
    """A folder name that no earlier run has; an unwritable place is found out now, not after the work."""
    runs.mkdir(parents=True, exist_ok=True)
    if not os.access(runs, os.W_OK):
        raise InputError(f"{runs}: expected a folder to write to, found a read-only one")
    return runs / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}-{name}"  # two runs may start in one second


def _command() -> str:
    return " ".join(["python -m submit", *sys.argv[1:]])
