"""Training a zoo of clean and backdoored models in the layout of the backdoor task.

Every finished model is a folder that appears whole; a second call goes on where the first one ended. Beside
the organizers' files lie `record.json` in each sample and `zoo.json`, which gathers them.
"""
from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms.functional import to_pil_image

from data import badnets, blended
from data.errors import InputError, expect
from data.files import fingerprint, new_folder, write_atomic, write_json
from data.image_sets import ImageSet
from data.model_zoo import BACKDOORED, CLEAN, METADATA, MODEL, RECORDS
from data.poisoned_sets import PoisonedSet
from data.victims import VictimConfig, attack_success, clean_accuracy, train_victim

RECORD = "record.json"
IMAGES = "test_images"
IMAGE_SHARE = 0.01   # of the test set, as the contest gives
JPEG_QUALITY = 95    # colours not subsampled: the least loss short of another format


def narrow_victim() -> VictimConfig:
    """An eighth of the organizers' widths: trains in a minute on a CPU."""
    return VictimConfig(widths=(8, 16, 32, 64), epochs=30, rate=0.05, crop=2)


@dataclass(frozen=True)
class ZooConfig:
    models: int = 12                                  # even: every second one is backdoored
    attacks: tuple[str, ...] = ("badnets", "blended")  # in turn
    ratio: float = 0.1                                # poisoned share of the training set
    victim: VictimConfig = field(default_factory=narrow_victim)
    seed: int = 0                                     # model i uses seed + i
    floor_accuracy: float = 0.95                      # a model below is marked failed
    floor_success: float = 0.95                       # likewise, of its attack

    def __post_init__(self) -> None:
        expect(self.models >= 2 and self.models % 2 == 0, "ZooConfig.models", "an even number >= 2", self.models)
        expect(self.attacks, "ZooConfig.attacks", "at least one", "none")
        for name in self.attacks:
            expect(name in ATTACKS, "ZooConfig.attacks", f"some of {', '.join(ATTACKS)}", name)
        expect(0 < self.ratio <= 1, "ZooConfig.ratio", "in (0, 1]", self.ratio)
        for floor in (self.floor_accuracy, self.floor_success):
            expect(0 <= floor <= 1, "ZooConfig floors", "in [0, 1]", floor)


ATTACKS: dict[str, Callable[..., PoisonedSet]] = {
    "badnets": lambda clean, **draw: badnets.poison(clean, badnets.BadNetsConfig(), **draw),
    "blended": lambda clean, **draw: blended.poison(clean, blended.BlendedConfig(), **draw),
}


def build_zoo(folder: Path, train: ImageSet, test: ImageSet, config: ZooConfig, *,
              progress: Callable[[str], None] | None = None) -> dict[str, dict[str, Any]]:
    """Train what `folder` still lacks, on the device of `train`; return the record of every model by name.

    Refuses a folder that was begun with another config or other images. A model below a floor stays, marked
    `failed` in its record.
    """
    folder = Path(folder)
    settings = json.loads(json.dumps({**asdict(config), "set": train.name, "images": _checksum(train, test)}))
    _claim(folder, settings)
    records = {}
    for i in range(config.models):
        name = f"{i:03d}"
        if not (folder / name).exists():
            record = _build_model(folder / name, train, test, config, i)
            if progress:
                progress(f"{name}: " + json.dumps(record))
        records[name] = json.loads((folder / name / RECORD).read_text())
        write_json(folder / RECORDS, {"fingerprint": fingerprint(settings), "config": settings,
                                      "models": records})
    return records


def _checksum(train: ImageSet, test: ImageSet) -> int:
    parts = (train.images, train.labels, test.images, test.labels)
    total = 0
    for part in parts:
        total = zlib.crc32(part.cpu().numpy().tobytes(), total)
    return total


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make `folder` this config's, or check that it is."""
    path = folder / RECORDS
    if not path.exists():
        expect(not folder.exists() or not any(folder.iterdir()), folder, "a new or empty folder",
               "other files in it")
        write_json(path, {"fingerprint": fingerprint(settings), "config": settings, "models": {}})
    try:
        there = json.loads(path.read_text())["config"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path}: expected the record of a zoo, found something else") from None
    expect(isinstance(there, dict), path, "the record of a zoo", "something else")
    differing = sorted(key for key in {*there, *settings} if there.get(key) != settings.get(key))
    expect(not differing, path, "the configuration it was begun with", f"another {', '.join(differing)}")


def _build_model(folder: Path, train: ImageSet, test: ImageSet, config: ZooConfig, i: int) -> dict[str, Any]:
    """Train, measure and write model i: even ones clean, odd ones attacked."""
    seed = config.seed + i
    generator = torch.Generator().manual_seed(seed)
    target = int(torch.randint(train.num_classes, (), generator=generator))
    attack = config.attacks[i // 2 % len(config.attacks)] if i % 2 else None
    poisoned = ATTACKS[attack](train, ratio=config.ratio, target=target, seed=seed) if attack else None
    source = poisoned or train
    model = train_victim(source.images, source.labels, train.num_classes, config.victim, seed=seed)
    success = attack_success(model, test, config.victim, poisoned.trigger, target) if poisoned else None
    record = {
        "attack": attack, "parameters": poisoned.parameters if poisoned else None,
        "ratio": config.ratio if attack else 0.0, "target": target if attack else None,
        "ACC": clean_accuracy(model, test, config.victim), "ASR": success,
        "seed": seed, "set": train.name, "widths": list(config.victim.widths),
    }
    failed = _failure(record, config)
    if failed:
        record["failed"] = failed
    with new_folder(folder) as scratch:
        _write_sample(scratch, model, test, config.victim, backdoored=attack is not None, generator=generator)
        write_json(scratch / RECORD, record)
    return record


def _failure(record: dict[str, Any], config: ZooConfig) -> str:
    if record["ACC"] < config.floor_accuracy:
        return f"ACC {record['ACC']:.4f} below {config.floor_accuracy}"
    if record["ASR"] is not None and record["ASR"] < config.floor_success:
        return f"ASR {record['ASR']:.4f} below {config.floor_success}"
    return ""


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
