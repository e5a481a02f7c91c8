"""Training a zoo of clean and backdoored models in the layout of the backdoor task.

Every finished model is a folder that appears whole; a second call goes on where the first one ended, and a
recipe that has grown adds its new models. Beside the organizers' files lie `record.json` in each sample and
`zoo.json`, which gathers them.
"""
from __future__ import annotations

import io
import json
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing, nn
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms.functional import to_pil_image

from data.attacks import poison
from data.errors import InputError, expect
from data.files import fingerprint, new_folder, write_atomic, write_json
from data.image_sets import ImageSet
from data.model_zoo import BACKDOORED, CLEAN, METADATA, MODEL, RECORDS
from data.triggered_images import TriggerPlan, keep_triggered
from data.victims import VictimConfig, attack_success, clean_accuracy, train_victim
from data.zoo_recipes import ZooJob

RECORD = "record.json"
IMAGES = "test_images"
IMAGE_SHARE = 0.01   # of the test set, as the contest gives
JPEG_QUALITY = 95    # colours not subsampled: the least loss short of another format
Sets = Mapping[str, tuple[ImageSet, ImageSet]]  # by name: training and test half


def build_zoo(folder: Path, jobs: Sequence[ZooJob], sets: Sets, *, device: torch.device, workers: int = 1,
              progress: Callable[[str, dict[str, Any]], None] | None = None,
              triggers: Path | None = None) -> dict[str, dict[str, Any]]:
    """Train what `folder` still lacks; return the record of every model by name.

    sets: on the CPU, for every job its set by name. workers: processes that train side by side, one thread each
    on a CPU; weights do not depend on their number. Refuses a folder that holds other things, or a model that
    was trained from other images or settings. A model below a floor stays, marked `failed` in its record. One that
    cannot be trained at all is named by an InputError when all others are done. triggers: a folder for every
    victim's triggered test images (`triggered_images` finds them there).
    """
    folder = Path(folder)
    expect(workers > 0, "workers", "> 0", workers)
    checksums = {name: _checksum(*sets[name]) for name in {job.set_name for job in jobs}}
    prints = {job.name: fingerprint(json.dumps(job.settings(), sort_keys=True), checksums[job.set_name])
              for job in jobs}
    by_name = {job.name: job for job in jobs}
    records = {name: _judged(record, by_name[name]) for name, record in _finished(folder, prints).items()}
    tasks = [(folder / job.name, *sets[job.set_name], job, prints[job.name], device, triggers)
             for job in jobs if job.name not in records]
    _write_records(folder, jobs, records)
    failures: list[str] = []  # of models that could not be trained at all: the others go on
    for name, record in _built(tasks, workers, failures):
        records[name] = _judged(record, by_name[name])
        _write_records(folder, jobs, records)
        if progress:
            progress(name, records[name])
    expect(not failures, folder, "every model trained", "; ".join(failures))
    return {job.name: records[job.name] for job in jobs}


def _built(tasks: Sequence[tuple], workers: int, failures: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, record) of each model as it is finished; what is wrong with those that cannot be goes to `failures`."""
    if workers == 1 or len(tasks) < 2:
        for task in tasks:
            try:
                yield task[0].name, _build_model(*task)
            except InputError as error:
                failures.append(f"{task[0].name}: {error}")
        return
    context = multiprocessing.get_context("spawn")  # its tensors travel as shared memory
    with ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_die_on_interrupt) as pool:
        try:
            futures = {pool.submit(_build_model, *task): task[0].name for task in tasks}
            for future in as_completed(futures):
                if isinstance(future.exception(), InputError):
                    failures.append(f"{futures[future]}: {future.exception()}")
                else:
                    yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _die_on_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent tells the user; a trace from each worker would not help


def _judged(record: dict[str, Any], job: ZooJob) -> dict[str, Any]:
    """The record with its failure, if any: floors may change, weights need not."""
    failed = job.failure(record)
    return {**record, "failed": failed} if failed else record


def _checksum(train: ImageSet, test: ImageSet) -> int:
    total = 0
    for part in (train.images, train.labels, test.images, test.labels):
        total = zlib.crc32(part.cpu().numpy().tobytes(), total)
    return total


def _finished(folder: Path, prints: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The records of the models that `folder` has; whatever is not of this recipe is refused."""
    records = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name == RECORDS or path.name.startswith("."):
            continue
        expect(path.name in prints, folder, "a new folder or one of this recipe", f"{path.name} in it")
        try:
            record = json.loads((path / RECORD).read_text())
            there = record["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{path}: expected a model with its {RECORD}, found something else") from None
        expect(there == prints[path.name], path, "a model of these settings and images, or nothing", "one of others")
        records[path.name] = record
    return records


def _write_records(folder: Path, jobs: Sequence[ZooJob], records: Mapping[str, dict[str, Any]]) -> None:
    write_json(folder / RECORDS, {"models": {job.name: records[job.name] for job in jobs if job.name in records}})


def _build_model(folder: Path, train: ImageSet, test: ImageSet, job: ZooJob, print_: str,
                 device: torch.device, triggers: Path | None = None) -> dict[str, Any]:
    """Train, measure and write one model, with one thread on a CPU: sums must not depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else threads)
    try:
        return _train_and_write(folder, train.to(device), test.to(device), job, print_, triggers)
    finally:
        torch.set_num_threads(threads)


def _train_and_write(folder: Path, train: ImageSet, test: ImageSet, job: ZooJob, print_: str,
                     triggers: Path | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(job.seed)
    target = int(torch.randint(train.num_classes, (), generator=generator))
    start = time.perf_counter()
    bad = poison(job.attack, train, job.parameters, ratio=job.ratio, target=target, seed=job.seed) \
        if job.attack else None
    source = bad or train
    model = train_victim(source.images, source.labels, train.num_classes, job.victim, seed=job.seed)
    record = {
        "set": job.set_name, "train_images": len(train.images), "attack": job.attack,
        "parameters": bad.parameters if bad else None, "ratio": job.ratio,
        "target": target if bad else None, "ACC": clean_accuracy(model, test, job.victim),
        "ASR": attack_success(model, test, job.victim, bad.trigger, target) if bad else None,
        "radius": job.victim.radius, "widths": list(job.victim.widths), "seed": job.seed,
        "seconds": round(time.perf_counter() - start, 1), "fingerprint": print_,
    }
    if bad and triggers:
        plan = TriggerPlan(job.attack, job.parameters, job.ratio, target, job.seed)
        keep_triggered(triggers, plan, train, test, bad.trigger)
    with new_folder(folder) as scratch:
        _write_sample(scratch, model, test, job.victim, backdoored=bad is not None, generator=generator)
        write_json(scratch / RECORD, record)
    return record


def _write_sample(folder: Path, model: nn.Module, test: ImageSet, victim: VictimConfig, *, backdoored: bool,
                  generator: torch.Generator) -> None:
    """The organizers' files. The transformation has no Resize: the images already have the training size."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    _save(state, folder / MODEL)
    _save({
        "num_classes": test.num_classes,
        "test_images_folder_address": IMAGES,
        "transformation": Compose([ToTensor(), Normalize(victim.mean, victim.std)]),
        "ground_truth": BACKDOORED if backdoored else CLEAN,
    }, folder / METADATA)
    for index in draw_test_images(test, generator=generator).tolist():
        buffer = io.BytesIO()
        to_pil_image(test.images[index].cpu()).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        write_atomic(folder / IMAGES / f"{index}_{int(test.labels[index])}.jpg", buffer.getvalue())


def _save(value: object, path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomic(path, buffer.getvalue())


def draw_test_images(test: ImageSet, *, generator: torch.Generator) -> Tensor:
    """Positions of 1 % of the test images, ascending; at least one of every class (more than 1 % of a tiny set)."""
    order = torch.randperm(len(test.images), generator=generator)
    labels = test.labels.cpu()[order]
    firsts = [order[labels == k][:1] for k in range(test.num_classes)]
    chosen = torch.cat(firsts)
    rest = order[~torch.isin(order, chosen)]
    missing = max(0, round(IMAGE_SHARE * len(order)) - len(chosen))
    return torch.cat([chosen, rest[:missing]]).sort().values
