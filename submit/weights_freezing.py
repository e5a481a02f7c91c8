"""Frozen weights: a folder in the layouts that the kit's loaders read, for a machine without network, and its check."""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from anomaly.backbone import BackboneConfig, load_backbone
from anomaly.presets import PRESETS
from data.errors import InputError, expect
from data.files import new_folder, write_json
from data.safe_load import load_untrusted
from submit.weights_fetching import fetched, sha256
from submit.weights_registry import Weight, how_to_get, preprocessing_name

RECORD = "frozen.json"
CONFIG, MODEL = "open_clip_config.json", "open_clip_model.safetensors"  # the names that open_clip gives them
PIECES = "vocab.txt"


def freeze(weights: list[Weight], cache: Path, out: Path) -> dict[str, Any]:
    """Lay fetched weights out in the new folder `out`; returns its record.

    Errors: weights that were not fetched, with what to run; a preprocessing other than the registry's.
    """
    for weight in weights:
        expect(not weight.embedded, "NAME", "weights of the hub", f"{weight.name}, which lies in {weight.source}")
        expect(fetched(weight, cache), cache / weight.name, f"the files {', '.join(weight.files)}",
               f"not all of them; {how_to_get(weight.name)}")
    with new_folder(out) as scratch:
        record = {"weights": {weight.name: _freeze_one(weight, cache, scratch) for weight in weights}}
        write_json(scratch / RECORD, record)
    return record


def _freeze_one(weight: Weight, cache: Path, scratch: Path) -> dict[str, Any]:
    folder, source, origin = scratch / weight.folder, cache / weight.name, fetched(weight, cache)
    folder.mkdir(parents=True)
    if weight.layout == "open_clip":
        _freeze_open_clip(weight, source, folder)
    else:
        for name in weight.files:
            shutil.copyfile(source / name, folder / name)
    _check_preprocessing(weight, folder)
    files = {path.relative_to(scratch).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
             for path in sorted(folder.rglob("*")) if path.is_file()}
    return {"repo": weight.repo, "commit": origin["commit"], "licence": weight.licence, "folder": weight.folder,
            "preprocessing": dict(weight.preprocessing), "fingerprint": preprocessing_name(weight.preprocessing),
            "fetched": origin["files"], "files": files}


def _freeze_open_clip(weight: Weight, source: Path, folder: Path) -> None:
    """Configuration and weights as open_clip lays them out on the hub; a pickle becomes safetensors, read safely."""
    import open_clip

    config = open_clip.get_model_config(weight.name)
    expect(config, weight.name, "an architecture that open_clip knows", "none of that name")
    write_json(folder / CONFIG, {"model_cfg": config, "preprocess_cfg": dict(weight.preprocessing)})
    (name,) = weight.files
    if name.endswith(".safetensors"):
        shutil.copyfile(source / name, folder / MODEL)
    else:
        save_file(_state(source / name), folder / MODEL)


def _state(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, out of a training checkpoint too, each with memory of its own."""
    found = load_untrusted(path)
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    expect(isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values()), path,
           "named tensors", type(found).__name__)
    return {name.removeprefix("module."): value.detach().clone(memory_format=torch.contiguous_format)
            for name, value in found.items()}


def _check_preprocessing(weight: Weight, folder: Path) -> None:
    """What the loaders will do to an input of these weights is what the registry says."""
    for found in PREPROCESSING[weight.layout](weight, folder):
        expect(preprocessing_name(found) == preprocessing_name(weight.preprocessing), f"preprocessing of {weight.name}",
               json.dumps(weight.preprocessing, sort_keys=True), json.dumps(found, sort_keys=True))


def _of_open_clip(weight: Weight, folder: Path) -> list[Mapping[str, Any]]:
    return [json.loads((folder / CONFIG).read_text(encoding="utf-8"))["preprocess_cfg"]]


def _of_timm(weight: Weight, folder: Path) -> list[Mapping[str, Any]]:
    """Of every preset that uses the net."""
    return [{"size": list(config.size), "mean": list(config.mean), "std": list(config.std),
             "interpolation": config.interpolation} for config in _preset_configs(weight)]


def _preset_configs(weight: Weight) -> list[BackboneConfig]:
    """How the anomaly presets use a net: at least once, or it would not be in the registry."""
    configs = [config for preset in PRESETS.values() for config in (preset.for_maps, preset.for_images)
               if config is not None and config.architecture == weight.folder]
    expect(configs, f"registry [{weight.name}] folder", "a net that an anomaly preset names", weight.folder)
    return configs


def _of_transformers(weight: Weight, folder: Path) -> list[Mapping[str, Any]]:
    """The kit's tokenizer lower-cases; the pieces are those of the folder."""
    pieces = (folder / PIECES).read_text(encoding="utf-8").splitlines()
    return [{"lower_case": True, "pieces": len(pieces)}]


PREPROCESSING: dict[str, Callable[[Weight, Path], list[Mapping[str, Any]]]] = {
    "open_clip": _of_open_clip, "timm": _of_timm, "transformers": _of_transformers}


def read_frozen(folder: Path) -> dict[str, Any]:
    """The record of a frozen folder."""
    file = folder / RECORD
    expect(file.is_file(), file, "the record of `weights freeze`", "no such file")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        for name, entry in record["weights"].items():
            names = [*entry["files"], entry["folder"]]
            expect(all(".." not in Path(path).parts and not Path(path).is_absolute() for path in names), file,
                   "paths inside the folder", ", ".join(names))
            sound = all(type(stated["bytes"]) is int and type(stated["sha256"]) is str
                        for stated in entry["files"].values())
            expect(sound and entry["files"] and type(entry["fingerprint"]) is str, f"{file} {name}",
                   "its files with bytes and SHA-256, and a fingerprint", "something else")
        expect(record["weights"], file, "weights", "none")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: expected the record of `weights freeze`, found {type(error).__name__}: {error}"
                         ) from None
    return record


def verify(folder: Path, registry: Mapping[str, Weight], *, load: bool) -> dict[str, list[str]]:
    """What is wrong with each of the frozen weights: files, checksums, preprocessing and, with `load`, the loading."""
    return {name: _faults(name, entry, folder, registry, load)
            for name, entry in read_frozen(folder)["weights"].items()}


def _faults(name: str, entry: Mapping[str, Any], folder: Path, registry: Mapping[str, Weight], load: bool) -> list[str]:
    if name not in registry:
        return [f"{name}: expected weights of the registry, found none of that name"]
    weight = registry[name]
    if weight.layout not in PREPROCESSING or entry["folder"] != weight.folder:
        return [f"{name}: expected frozen weights in {weight.folder}, found {entry['folder']}"]
    faults = [fault for file, stated in entry["files"].items() if (fault := _file_fault(folder / file, stated))]
    present = {path.relative_to(folder).as_posix() for path in (folder / weight.folder).rglob("*") if path.is_file()}
    faults += [f"{folder / file}: expected only files of the record, found one more"
               for file in sorted(present - entry["files"].keys())]
    if faults:
        return faults
    try:
        expect(entry["fingerprint"] == preprocessing_name(weight.preprocessing), f"{folder} preprocessing of {name}",
               preprocessing_name(weight.preprocessing), entry["fingerprint"])
        _check_preprocessing(weight, folder / weight.folder)
        if load:
            load_frozen(weight, folder)
    except InputError as fault:
        return [str(fault)]
    return []


def _file_fault(path: Path, stated: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path}: expected a file of {stated['bytes']} bytes, found none"
    if path.stat().st_size != stated["bytes"]:
        return f"{path}: expected {stated['bytes']} bytes, found {path.stat().st_size}"
    found = sha256(path)
    return None if found == stated["sha256"] else f"{path}: expected SHA-256 {stated['sha256']}, found {found}"


def load_frozen(weight: Weight, folder: Path) -> object:
    """The weights as the kit's own loader reads them, on the CPU."""
    own = folder / weight.folder
    if weight.layout == "open_clip":
        from retrieval.encoder import load_encoder

        return load_encoder(own, device="cpu")
    if weight.layout == "transformers":
        from retrieval.pretrained_encoder import read_encoder

        return read_encoder(own)
    return load_backbone(own, _preset_configs(weight)[0])
