"""Training a zoo of clean and backdoored models in the layout of the backdoor task.

Every finished model is a folder that appears whole; a second call goes on where the first one ended, and a
recipe that has grown adds its new models. Beside the organizers' files lie `record.json` in each sample and
`zoo.json`, which gathers them.
"""
from __future__ import annotations

import io
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms.functional import to_pil_image

from data.attacks import poison
from data.devices import chosen_device
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
Work = Callable[[Any], Any]
InTurn = Callable[[Work, Sequence[Any]], Iterator[tuple[int, Any]]]  # (position, work(item)) as they are done


def one_by_one(work: Work, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    return ((i, work(item)) for i, item in enumerate(items))


def build_zoo(folder: Path, jobs: Sequence[ZooJob], sets: Sets, *, in_turn: InTurn = one_by_one,
              progress: Callable[[str, dict[str, Any]], None] | None = None,
              triggers: Path | None = None) -> dict[str, dict[str, Any]]:
    """Train what `folder` still lacks, on the device that KIT_DEVICE says; return the record of every model by name.

    sets: on the CPU, for every job its set by name. in_turn: does the work, perhaps side by side in other processes,
    which get a copy of `sets`; weights do not depend on it. Refuses a folder that holds other things, or a model that
    was trained from other images or settings. A model below a floor stays, marked `failed` in its record. One that
    cannot be trained at all is named by an InputError when all others are done. triggers: a folder for every
    victim's triggered test images (`triggered_images` finds them there).
    """
    folder = Path(folder)
    checksums = {name: _checksum(*sets[name]) for name in dict.fromkeys(job.set_name for job in jobs)}
    prints = {job.name: fingerprint(json.dumps(job.settings(), sort_keys=True), checksums[job.set_name])
              for job in jobs}
    by_name = {job.name: job for job in jobs}
    records = {name: _judged(record, by_name[name]) for name, record in _finished(folder, prints).items()}
    missing = [(job, prints[job.name]) for job in jobs if job.name not in records]
    _write_records(folder, jobs, records)
    failures: dict[int, str] = {}  # of models that could not be trained at all: the others go on
    for position, found in in_turn(partial(build_model, folder, sets, triggers), missing):
        name = missing[position][0].name
        if isinstance(found, str):
            failures[position] = f"{name}: {found}"
            continue
        records[name] = _judged(found, by_name[name])
        _write_records(folder, jobs, records)
        if progress:
            progress(name, records[name])
    expect(not failures, folder, "every model trained", "; ".join(failures[i] for i in sorted(failures)))
    return {job.name: records[job.name] for job in jobs}


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


def build_model(folder: Path, sets: Sets, triggers: Path | None, item: tuple[ZooJob, str]) -> dict[str, Any] | str:
    """Train, measure and write one model with its fingerprint: its record, or why it cannot be trained. One thread on a
    CPU: sums must not depend on the machine."""
    job, print_ = item
    threads, device = torch.get_num_threads(), chosen_device()
    torch.set_num_threads(1 if device.type == "cpu" else threads)
    try:
        train, test = (part.to(device) for part in sets[job.set_name])
        return _train_and_write(folder / job.name, train, test, job, print_, triggers)
    except InputError as problem:
        return str(problem)
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
