"""The weights that the kit knows, from `weights.toml`: names, where they come from, how their input is prepared."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from data.errors import InputError, expect
from data.files import fingerprint
from data.toml_files import read_toml

REGISTRY = Path(__file__).with_name("weights.toml")
EMBEDDED = "embedded"
LAYOUTS = ("open_clip", "timm", "transformers", EMBEDDED)
HUB_KEYS = ("repo", "revision", "files", "bytes", "preprocessing")  # that embedded weights do not have


@dataclass(frozen=True)
class Weight:
    """One entry. folder: where it lies in a frozen folder, or in the checkout for embedded ones."""

    name: str
    use: str
    layout: str  # one of LAYOUTS: which loader of the kit reads it
    folder: str
    licence: str
    repo: str = ""
    revision: str = ""
    files: tuple[str, ...] = ()
    bytes: int = 0  # about: float32 parameters
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def embedded(self) -> bool:
        return self.layout == EMBEDDED

    @property
    def source(self) -> str:
        return self.folder if self.embedded else f"{self.repo}@{self.revision}"


def read_registry(path: Path = REGISTRY) -> dict[str, Weight]:
    """Every entry by its name, strictly: known keys only, none missing, safe paths."""
    content = read_toml(path)
    return {name: _entry(name, table, f"{path} [{name}]") for name, table in content.items()}


def _entry(name: str, table: object, where: str) -> Weight:
    expect(isinstance(table, dict), where, "a table", type(table).__name__)
    known = {f.name for f in fields(Weight)} - {"name"}
    unknown = sorted(table.keys() - known)
    expect(not unknown, where, f"keys among {', '.join(sorted(known))}", ", ".join(unknown))
    needed = [f.name for f in fields(Weight) if f.default is MISSING and f.default_factory is MISSING]
    needed = [*needed[1:], *(() if table.get("layout") == EMBEDDED else HUB_KEYS)]  # the first is the name
    missing = [key for key in needed if key not in table]
    expect(not missing, where, f"the keys {', '.join(needed)}", f"no {', '.join(missing)}")
    expect(table["layout"] in LAYOUTS, f"{where} layout", f"one of {', '.join(LAYOUTS)}", table["layout"])
    files = tuple(table.get("files", ()))
    for part in (table["folder"], *files):
        inside = isinstance(part, str) and part and not Path(part).is_absolute() and ".." not in Path(part).parts
        expect(inside, where, "paths inside a folder", part)
    return Weight(name, **{**table, "files": files})


def chosen(names: list[str], registry: Mapping[str, Weight]) -> list[Weight]:
    """The weights of these names, `all` for those of the hub; an unknown one is refused with the known ones."""
    if names == ["all"]:
        return [weight for weight in registry.values() if not weight.embedded]
    for name in names:
        expect(name in registry, "NAME", f"all or some of {', '.join(registry)}", name)
    return [registry[name] for name in dict.fromkeys(names)]


def preprocessing_name(preprocessing: Mapping[str, Any]) -> str:
    """Fingerprint of how an input is prepared: equal settings, equal name."""
    return fingerprint(json.dumps(preprocessing, sort_keys=True))


def how_to_get(name: str) -> str:
    """What to run where, for a message about weights that are missing."""
    return (f"where there is a network run `python -m submit weights fetch {name}` and "
            f"`python -m submit weights freeze {name} --out DIR`, then copy DIR here and give it as --weights DIR")


def retrieval_folders(weights: Path | None) -> dict[str, Path]:
    """`retrieval.nets.weight_folders`; where both parts lack, the error says what to run where."""
    from retrieval.nets import weight_folders

    try:
        return weight_folders(weights)
    except InputError as lack:
        encoders = [weight.name for weight in read_registry().values() if weight.folder == "encoder"]
        raise InputError(f"{lack}; {how_to_get(' '.join(encoders))}") from None


def preset_files(name: str, weights: Path | None) -> tuple[Path, ...]:
    """`anomaly.presets.weight_files` of a preset; where some lack, the error says what to run where."""
    from anomaly.presets import preset, weight_files

    chosen_preset = preset(name)
    try:
        return weight_files(chosen_preset, weights)
    except InputError as lack:
        nets = {config.architecture: None for config in (chosen_preset.for_maps, chosen_preset.for_images) if config}
        raise InputError(f"{lack}; {how_to_get(' '.join(nets))}") from None
