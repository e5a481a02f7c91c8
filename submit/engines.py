"""Where independent pieces of work are done: in this process, in others on this machine, on a Ray cluster, by Slurm.

joblib hands them out; for Slurm submitit does. The work writes what it finds and may be done twice, so a worker that
dies loses nothing: what it had not handed in is done again.

A worker has one GPU and keeps it: on this machine the first that no other worker has locked, elsewhere the one that Ray
or Slurm lets it see. There are never more workers than GPUs, or they would wait for one another.
"""
from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from data.devices import VARIABLE
from data.errors import InputError, expect
from submit.units import locked

ENGINES = ("local", "ray", "slurm")
KIT = "KIT_"        # variables that predict functions go by; workers elsewhere get them handed over
LOST_WORKERS = 3    # times that workers may die before the run gives up: work that kills them would go on for ever
ROUND = 4           # pieces a worker of Ray's before results are taken in
MINUTES = 24 * 60   # a job of Slurm's at most


@dataclass(frozen=True)
class Engine:
    """workers: pieces done at once; with GPUs one on each. device: what they work on where it is not what this process
    does; only of other machines."""

    name: str = "local"
    workers: int = 1
    device: str = ""

    def __post_init__(self) -> None:
        expect(self.name in ENGINES, "--engine", f"one of {', '.join(ENGINES)}", self.name)
        expect(self.workers >= 1, "--workers", ">= 1", self.workers)


HERE = Engine()


def chosen_engine(name: str, workers: int, device: str) -> Engine:
    """The engine with as many workers as asked for, never more than there are GPUs where `device` is one.
    workers: 0 = one a GPU, on CPUs all in this process."""
    if not device.startswith("cuda"):
        return Engine(name, workers or 1)
    if name == "slurm":  # gives every job a GPU, and lets them wait
        return Engine(name, workers or 1, "cuda")
    gpus = _ray_gpus() if name == "ray" else max(1, _device_count()) if device == "cuda" else 1
    expect(gpus, "--engine ray", "a cluster with a free GPU, or --device cpu", "none")
    expect(workers <= gpus, "--workers", f"at most {gpus}, as many as there are GPUs", workers)
    return Engine(name, workers or gpus, "cuda" if name == "ray" else "")


def cpu_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ray_gpus() -> int:
    """Those that nobody holds: a worker would wait for another's without end."""
    ray = _extra("ray")
    _join_ray(ray, 1)
    return int(ray.available_resources().get("GPU", 0))


def each(work: Callable[[Any], Any], items: Sequence[Any], engine: Engine = HERE) -> Iterator[tuple[int, Any]]:
    """(position, work(item)) for every item, as they are done; in order and in this process with one local worker.

    work: a function of a module, or a `partial` of one; it may be called again for an item whose worker died. What
    it raises ends the run.
    """
    if engine == HERE:
        yield from ((i, work(item)) for i, item in enumerate(items))
        return
    waiting, lost = dict(enumerate(items)), 0
    while waiting:
        with tempfile.TemporaryDirectory(prefix="kit-gpus-") as locks:
            task = partial(_piece, work, _surroundings(engine, locks))
            try:
                for position, result in RUNNERS[engine.name](task, list(waiting.items()), engine):
                    del waiting[position]
                    yield position, result
            except _dying() as death:
                lost += 1
                expect(lost < LOST_WORKERS, f"--engine {engine.name}", "workers that live",
                       f"{lost} that died, {len(waiting)} pieces not done: {str(death).splitlines()[0]}")


@dataclass(frozen=True)
class Surroundings:
    """What a worker gets handed over: variables, the folder that relative paths start from, and where the GPUs of this
    machine are locked, if there are several to choose from. parent: the process that asked, on this machine; else 0."""

    variables: Mapping[str, str]
    folder: str
    locks: Path
    gpus: int
    parent: int


def _surroundings(engine: Engine, locks: str) -> Surroundings:
    variables = {name: value for name, value in os.environ.items() if name.startswith(KIT)}
    device = engine.device or variables.get(VARIABLE, "auto")
    local = engine.name == "local"
    gpus = _device_count() if local and device in ("auto", "cuda") else 0
    return Surroundings({**variables, VARIABLE: device}, os.getcwd(), Path(locks), gpus, os.getpid() if local else 0)


def _piece(work: Callable[[Any], Any], here: Surroundings, item: tuple[int, Any]) -> tuple[int, Any]:
    """In a worker: with the settings and the folder of the process that asked, on the worker's own GPU."""
    position, value = item
    if here.parent and here.parent not in (os.getppid(), os.getpid()):
        os._exit(1)  # who asked was killed: nobody takes this in, and its files would appear beside later runs'
    os.chdir(here.folder)
    os.environ.update(here.variables)
    if here.gpus > 1:
        os.environ[VARIABLE] = f"cuda:{_own_gpu(here.locks, here.gpus)}"
    return position, work(value)


_OWN: dict[Path, tuple[int, IO]] = {}  # the GPU of this process and its lock, which ends with the process


def _own_gpu(locks: Path, gpus: int) -> int:
    """The GPU that this process has locked in the folder `locks`; at first the lowest that is free there."""
    if locks not in _OWN:
        _OWN.clear()  # of earlier work
        for gpu in range(gpus):
            try:
                _OWN[locks] = gpu, locked(locks / f"gpu{gpu}.lock")
                break
            except InputError:  # another worker's
                continue
    expect(locks in _OWN, "--workers", f"at most {gpus}, as many as there are GPUs", "more")
    return _OWN[locks][0]


def _device_count() -> int:
    import torch  # takes more than a second, which `--help` need not wait for

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _local(task: Callable, items: list, engine: Engine) -> Iterator[tuple[int, Any]]:
    workers = max(2, min(engine.workers, len(items)))  # with one, joblib would work in this process
    run = joblib.Parallel(workers, return_as="generator_unordered", batch_size=1)
    yield from run(joblib.delayed(task)(item) for item in items)


def _ray(task: Callable, items: list, engine: Engine) -> Iterator[tuple[int, Any]]:
    """On the cluster of $RAY_ADDRESS, else on one of this machine."""
    ray = _extra("ray")
    _join_ray(ray, engine.workers)
    from ray.util.joblib import register_ray

    register_ray()
    gpus = engine.device.startswith("cuda")  # a worker of Ray's then sees one GPU alone
    with joblib.parallel_config("ray", n_jobs=engine.workers, ray_remote_args={"num_gpus": 1} if gpus else {}):
        for start in range(0, len(items), ROUND * engine.workers):  # Ray hands nothing in before a call is done
            part = items[start:start + ROUND * engine.workers]
            yield from joblib.Parallel(batch_size=1)(joblib.delayed(task)(item) for item in part)


def _join_ray(ray: Any, workers: int) -> None:
    if not ray.is_initialized():
        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        own = {"address": "local", "num_cpus": workers, "include_dashboard": False}
        ray.init(**({} if "RAY_ADDRESS" in os.environ else own), **quiet)


def _slurm(task: Callable, items: list, engine: Engine, *, cluster: str = "slurm", folder: Path = Path("runs/slurm")
           ) -> Iterator[tuple[int, Any]]:
    """One job an item, `engine.workers` at once; logs and pickled results in `folder`, which all nodes must see."""
    submitit = _extra("submitit")
    expect(cluster != "slurm" or shutil.which("srun"), "--engine slurm", "the commands of Slurm (srun) on this machine",
           "none")
    executor = submitit.AutoExecutor(folder, cluster=cluster)
    executor.update_parameters(timeout_min=MINUTES, slurm_array_parallelism=engine.workers,
                               gpus_per_node=int(engine.device.startswith("cuda")))
    jobs = executor.map_array(task, items)
    try:
        for job in submitit.helpers.as_completed(jobs, poll_frequency=1):
            yield job.result()
    finally:  # also where the run is interrupted: no job goes on writing
        for job in jobs:
            if not job.done():
                job.cancel()


RUNNERS = {"local": _local, "ray": _ray, "slurm": _slurm}


def _extra(module: str) -> Any:
    os.environ.setdefault("RAY_TQDM_PATCH_PRINT", "0")  # Ray would put its own in place of print
    try:
        return __import__(module)
    except ImportError:
        raise InputError(f"--engine {'slurm' if module == 'submitit' else module}: expected the package {module} "
                         "(pip install -r requirements-extras.txt), found none") from None


def _dying() -> tuple[type[Exception], ...]:
    """What is raised where a worker died."""
    kinds: list[type[Exception]] = [TerminatedWorkerError]
    try:
        from ray.exceptions import ActorDiedError, RayActorError, WorkerCrashedError

        kinds += [ActorDiedError, RayActorError, WorkerCrashedError]
    except ImportError:
        pass
    try:
        from submitit.core.utils import UncompletedJobError

        kinds.append(UncompletedJobError)
    except ImportError:
        pass
    return tuple(kinds)
