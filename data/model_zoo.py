"""Reading a folder of models in the layout of the backdoor task: one folder a sample.

A sample holds `model.pt` (state dict), `metadata.pt` (dict) and a folder of clean test images named
`{index}_{label}.jpg`. Everything comes from strangers: files are read by `data.safe_load`, and a sample that
breaks a rule is named and left out, the others go on.
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torchvision.transforms import Compose

from data.errors import InputError, expect
from data.images import list_images
from data.preact_resnet import from_state_dict
from data.safe_load import load_state, load_untrusted

MODEL, METADATA, RECORDS = "model.pt", "metadata.pt", "zoo.json"
BACKDOORED, CLEAN = 0, 1  # the contest's ground_truth
KEYS = ("num_classes", "test_images_folder_address", "transformation", "ground_truth")


@dataclass(frozen=True)
class ZooModel:
    """One sample. ground_truth is the contest's: 0 = backdoored, 1 = clean. record: its entry in zoo.json."""

    name: str
    folder: Path
    num_classes: int
    images_folder: Path
    transformation: Callable
    ground_truth: int
    record: dict | None


@dataclass(frozen=True)
class Zoo:
    """The usable samples in the order of their names, and why the others are not usable."""

    models: tuple[ZooModel, ...]
    problems: tuple[InputError, ...]


def read_zoo(root: Path | str) -> Zoo:
    """All samples below `root` (the folders with a model.pt or a metadata.pt). No weights are read yet."""
    root = Path(root)
    expect(root.is_dir(), root, "a folder of samples", "no such folder")
    records = _read_records(root / RECORDS)
    samples = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")
               and ((p / MODEL).exists() or (p / METADATA).exists())]
    expect(samples, root, f"folders with {MODEL} and {METADATA}", "none")
    models, problems = [], []
    for folder in samples:
        try:
            models.append(_read_sample(root, folder, records.get(folder.name)))
        except InputError as error:
            problems.append(error)
    return Zoo(tuple(models), tuple(problems))


def load_model(sample: ZooModel) -> nn.Module:
    """The sample's network, on the CPU in evaluation mode. Its class count must be the metadata's."""
    path = sample.folder / MODEL
    model = from_state_dict(load_state(path), path)
    expect(model.linear.out_features == sample.num_classes, path,
           f"{sample.num_classes} classes as in {METADATA}", model.linear.out_features)
    return model


def labelled_images(folder: Path, num_classes: int) -> tuple[tuple[Path, int], ...]:
    """(path, label) of the images in `folder`, sorted by name; the label is read off `{index}_{label}.jpg`."""
    paths = list_images(folder)
    expect(paths, folder, "at least one image", "none")
    return tuple((path, _label(path, num_classes)) for path in paths)


def _label(path: Path, num_classes: int) -> int:
    found = re.fullmatch(r"[^_]+_(\d+)", path.stem)
    expect(found is not None, path, "a name like 12_3.jpg (index, label)", path.name)
    label = int(found[1])
    expect(label < num_classes, path, f"a label in [0, {num_classes})", label)
    return label


def _read_records(path: Path) -> dict[str, dict]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, found {error}") from None
    models = content.get("models") if isinstance(content, dict) else None
    expect(isinstance(models, dict) and all(isinstance(r, dict) for r in models.values()), path,
           "an object 'models' with an object for each sample", type(models).__name__)
    return models


def _read_sample(root: Path, folder: Path, record: dict | None) -> ZooModel:
    for name in (MODEL, METADATA):
        expect((folder / name).is_file(), folder, f"a file {name}", "none")
    failed = record is not None and record.get("failed")
    expect(not failed, folder, "a model above the floors of its zoo", failed)
    path = folder / METADATA
    metadata = load_untrusted(path)
    expect(isinstance(metadata, dict), path, "a dict", type(metadata).__name__)
    for key in KEYS:
        expect(key in metadata, path, f"the key {key!r}", ", ".join(map(str, metadata)))
    classes, truth = metadata["num_classes"], metadata["ground_truth"]
    expect(type(classes) is int and classes >= 2, f"{path} num_classes", "a whole number >= 2", repr(classes))
    expect(type(truth) is int and truth in (BACKDOORED, CLEAN), f"{path} ground_truth",
           "0 (backdoored) or 1 (clean)", repr(truth))
    transformation = metadata["transformation"]
    expect(isinstance(transformation, Compose), f"{path} transformation", "a torchvision Compose",
           type(transformation).__name__)
    images = _images_folder(root, folder, metadata["test_images_folder_address"])
    labelled_images(images, classes)
    return ZooModel(folder.name, folder, classes, images, transformation, truth, record)


def _images_folder(root: Path, folder: Path, address: object) -> Path:
    """The first of: the address as given, in the sample, in the root, and its last name in these two.

    Only a folder inside `root` counts: the address may come from another machine, or from a stranger.
    """
    where = f"{folder / METADATA} test_images_folder_address"
    expect(isinstance(address, (str, Path)) and str(address), where, "a folder's path", repr(address))
    last = re.split(r"[\\/]", str(address).rstrip("\\/"))[-1]
    for candidate in (Path(address), folder / address, root / address, folder / last, root / last):
        try:
            resolved = candidate.resolve()
            if resolved.is_dir() and resolved.is_relative_to(root.resolve()):
                return candidate
        except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long or with a NUL
            continue
    raise InputError(f"{where}: expected an existing folder inside {root}, found {address}")
