"""The backdoored networks of a zoo with what judging a defense needs: their image set and their trigger.

A zoo holds neither. `zoo.json` says which set and attack each network had; the set is read again, the trigger made
again by the code that poisoned it. Whether both are the right ones is seen by ACC and ASR: they must be the recorded.
"""
from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backdoor_detection.clean_images import pixel_scale
from data.errors import InputError, expect
from data.files import fingerprint
from data.image_sets import ImageSet
from data.images import read_rgb
from data.model_zoo import BACKDOORED, MODEL, RECORDS, ZooModel, labelled_images, load_model, read_zoo
from data.triggered_images import TriggerPlan, triggered_images
from data.victims import VictimConfig, normalise, predict
from data.zoo_recipes import SetPlan
from defense.metrics import accuracy, attack_success, robust_accuracy
from submit.zoo_commands import read_set

TOLERANCE = 0.02  # of ACC and ASR against the record: another machine rounds, and trains a trigger, otherwise
KINDS = {"set": str, "attack": str, "parameters": dict, "ratio": (int, float), "target": int, "seed": int,
         "ACC": (int, float), "ASR": (int, float)}


@dataclass(frozen=True)
class Victim:
    """A backdoored network, on the CPU, its set, and all test images triggered. scale: mean and std of its input.

    before: ACC, ASR and RA as fractions. key: names network, sets and trigger together.
    """

    name: str
    record: Mapping[str, Any]
    model: nn.Module
    train: ImageSet
    test: ImageSet
    triggered: Tensor
    scale: VictimConfig
    before: Mapping[str, float]
    key: str


def backdoored_samples(root: Path) -> tuple[list[ZooModel], list[InputError]]:
    """The usable backdoored networks below `root`, and what is wrong with the others."""
    zoo = read_zoo(root)
    samples = [sample for sample in zoo.models if sample.ground_truth == BACKDOORED]
    expect(samples, root, "at least one backdoored network", zoo.problems[0] if zoo.problems else "clean ones only")
    return samples, list(zoo.problems)


def read_victim(sample: ZooModel, data: Path | None, triggers: Path, *, device: torch.device) -> Victim:
    """The sample with its set, from `data` unless built in, and its trigger, kept in `triggers`; on `device` but for
    the model. InputError where the record does not tell them, or where ACC or ASR show that they are others."""
    record = _checked_record(sample)
    train, test = sets_of(record["set"], _side(sample), record.get("train_images", 0), data)
    train, test = train.to(device), test.to(device)
    expect(train.num_classes == sample.num_classes, f"{sample.folder} num_classes",
           f"{train.num_classes}, as {record['set']} has", sample.num_classes)
    plan = TriggerPlan(*(record[key] for key in ("attack", "parameters", "ratio", "target", "seed")))
    triggered = triggered_images(triggers, plan, train, test)
    mean, std = pixel_scale(sample.transformation, test.images.shape[1])
    scale = VictimConfig(mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    model = load_model(sample).to(memory_format=torch.channels_last)  # a third faster on a CPU
    before = measured(model, test, triggered, record["target"], scale)
    for name in ("ACC", "ASR"):
        expect(abs(before[name] - record[name]) <= TOLERANCE, f"{sample.folder}: {name} with set and trigger remade",
               f"{record[name]:.4f}, as {RECORDS} says", f"{before[name]:.4f}")
    key = fingerprint(sample.folder / MODEL, plan.key(train, test), scale.mean, scale.std)
    return Victim(sample.name, record, model, train, test, triggered, scale, before, key)


def _checked_record(sample: ZooModel) -> Mapping[str, Any]:
    """The sample's entry in zoo.json, its values of the right kinds."""
    record = sample.record or {}
    missing = [key for key in KINDS if record.get(key) is None]
    expect(not missing, f"{sample.folder.parent / RECORDS} {sample.name}",
           f"{', '.join(KINDS)}, to make the trigger again", f"no {', '.join(missing)}")
    count = record.get("train_images", 0)
    wrong = [key for key, kind in KINDS.items() if not isinstance(record[key], kind)]
    expect(not wrong and type(count) is int, f"{sample.folder.parent / RECORDS} {sample.name}",
           "names, numbers and a table of parameters", {key: record[key] for key in wrong} or count)
    expect(Path(record["set"]).name == record["set"], f"{sample.folder.parent / RECORDS} {sample.name} set",
           "the name of a folder", record["set"])
    return record


def _side(sample: ZooModel) -> int:
    """Pixels a side of the zoo's images: those of the sample's first test image."""
    return read_rgb(labelled_images(sample.images_folder, sample.num_classes)[0][0]).size[0]


@lru_cache(maxsize=1)  # the networks of one set mostly follow each other
def sets_of(name: str, side: int, count: int, data: Path | None) -> tuple[ImageSet, ImageSet]:
    """Both halves of the set, `count` training images of it (0 = all), on the CPU; kept until another is asked for."""
    return read_set(SetPlan(name, size=side, images=count), data)


def measured(model: nn.Module, test: ImageSet, triggered: Tensor, target: int, scale: VictimConfig) -> dict[str, float]:
    """ACC, ASR and RA of a network in evaluation mode, as fractions; judged on the device of the images."""
    on_device = model.to(test.images.device).eval()
    hit = predict(on_device, triggered, scale)
    return {"ACC": accuracy(predict(on_device, test.images, scale), test.labels),
            "ASR": attack_success(hit, test.labels, target), "RA": robust_accuracy(hit, test.labels, target)}


def clean_part(victim: Victim, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """(images ready for the model, labels) of a share of the training images, without their triggers; no test image.

    The draw differs from victim to victim and is the same for every defense.
    """
    count = round(share * len(victim.train.images))
    expect(0 < share <= 1 and count >= 2, "--clean", f"at least two of {len(victim.train.images)} training images",
           share)
    generator = torch.Generator().manual_seed(own_seed(victim, seed))
    index = torch.randperm(len(victim.train.images), generator=generator)[:count].to(victim.train.images.device)
    return normalise(victim.train.images[index], victim.scale), victim.train.labels[index]


def own_seed(victim: Victim, seed: int) -> int:
    """A seed for this victim alone."""
    return zlib.crc32(f"{seed} {victim.name}".encode())
