"""Where independent pieces of work are done: in this process, in others on this machine, on a Ray cluster, by Slurm.

joblib hands them out; for Slurm submitit does. The work writes what it finds and may be done twice, so a worker that
dies loses nothing: what it had not handed in is done again.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from data.devices import VARIABLE
from data.errors import InputError, expect

ENGINES = ("local", "ray", "slurm")
KIT = "KIT_"        # variables that predict functions go by; workers elsewhere get them handed over
LOST_WORKERS = 3    # times that workers may die before the run gives up: work that kills them would go on for ever
ROUND = 4           # pieces a worker of Ray's before results are taken in
MINUTES = 24 * 60   # a job of Slurm's at most


@dataclass(frozen=True)
class Engine:
    """workers: pieces done at once; with GPUs one on each, never more, or they would wait for one another."""

    name: str = "local"
    workers: int = 1

    def __post_init__(self) -> None:
        expect(self.name in ENGINES, "--engine", f"one of {', '.join(ENGINES)}", self.name)
        expect(self.workers >= 1, "--workers", ">= 1", self.workers)


HERE = Engine()


def chosen_engine(name: str, workers: int, device: str) -> Engine:
    """The engine with as many workers as asked for; 0: one a GPU, on CPUs all in this process. On this machine never
    more than it has GPUs."""
    if not workers:
        workers = _gpus(name) if device.startswith("cuda") else 1
    if name == "local" and device.startswith("cuda"):
        expect(workers <= _gpus(name), "--workers", f"at most {_gpus(name)}, as many as there are GPUs", workers)
    return Engine(name, workers)


def _gpus(name: str) -> int:
    if name == "ray":
        ray = _extra("ray")
        _join_ray(ray, 1)
        return max(1, int(ray.cluster_resources().get("GPU", 1)))
    return max(1, _device_count())


def each(work: Callable[[Any], Any], items: Sequence[Any], engine: Engine = HERE) -> Iterator[tuple[int, Any]]:
    """(position, work(item)) for every item, as they are done; in order and in this process with one local worker.

    work: a function of a module, or a `partial` of one; it may be called again for an item whose worker died. What
    it raises ends the run.
    """
    if engine == HERE:
        yield from ((i, work(item)) for i, item in enumerate(items))
        return
    waiting, lost = dict(enumerate(items)), 0
    task = partial(_piece, work, {k: v for k, v in os.environ.items() if k.startswith(KIT)}, _device_count())
    while waiting:
        try:
            for position, result in RUNNERS[engine.name](task, list(waiting.items()), engine):
                del waiting[position]
                yield position, result
        except _dying() as death:
            lost += 1
            expect(lost < LOST_WORKERS, f"--engine {engine.name}", "workers that live",
                   f"{lost} that died, {len(waiting)} pieces not done: {str(death).splitlines()[0]}")


def _piece(work: Callable[[Any], Any], variables: Mapping[str, str], gpus: int, item: tuple[int, Any]
           ) -> tuple[int, Any]:
    """In a worker: the same settings as here, and of several GPUs the one whose turn it is."""
    position, value = item
    os.environ.update(variables)
    if variables.get(VARIABLE) == "cuda" and gpus > 1:
        os.environ[VARIABLE] = f"cuda:{position % gpus}"
    return position, work(value)


def _device_count() -> int:
    import torch  # takes more than a second, which `--help` need not wait for

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _local(task: Callable, items: list, engine: Engine) -> Iterator[tuple[int, Any]]:
    run = joblib.Parallel(min(engine.workers, len(items)), return_as="generator_unordered", batch_size=1)
    yield from run(joblib.delayed(task)(item) for item in items)


def _ray(task: Callable, items: list, engine: Engine) -> Iterator[tuple[int, Any]]:
    """On the cluster of $RAY_ADDRESS, else on one of this machine."""
    ray = _extra("ray")
    _join_ray(ray, engine.workers)
    from ray.util.joblib import register_ray

    register_ray()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    on_gpus = os.environ.get(VARIABLE, "auto") != "cpu" and gpus > 0
    workers = min(engine.workers, gpus) if on_gpus else engine.workers  # more would wait for a GPU for ever
    with joblib.parallel_config("ray", n_jobs=workers, ray_remote_args={"num_gpus": 1} if on_gpus else {}):
        for start in range(0, len(items), ROUND * workers):  # Ray's backend hands nothing in before a call is done
            part = items[start:start + ROUND * workers]
            yield from joblib.Parallel(batch_size=1)(joblib.delayed(task)(item) for item in part)


def _join_ray(ray: Any, workers: int) -> None:
    if not ray.is_initialized():
        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        own = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "include_dashboard": False}
        ray.init(**own, **quiet)


def _slurm(task: Callable, items: list, engine: Engine, *, cluster: str = "slurm", folder: Path = Path("runs/slurm")
           ) -> Iterator[tuple[int, Any]]:
    """One job an item, `engine.workers` at once; logs and pickled results in `folder`, which all nodes must see."""
    submitit = _extra("submitit")
    expect(cluster != "slurm" or shutil.which("srun"), "--engine slurm", "the commands of Slurm (srun) on this machine",
           "none")
    executor = submitit.AutoExecutor(folder, cluster=cluster)
    executor.update_parameters(timeout_min=MINUTES, slurm_array_parallelism=engine.workers,
                               gpus_per_node=int(os.environ.get(VARIABLE, "auto").startswith("cuda")))
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
