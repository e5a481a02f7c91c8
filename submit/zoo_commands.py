"""`zoo build` and `zoo inspect`."""
from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from data.errors import InputError, expect
from data.image_sets import ImageSet, read_digits, read_image_folder, read_mnist
from data.model_zoo import ZooModel, load_model, read_zoo
from data.zoo_building import ZooConfig, build_zoo, narrow_victim
from submit.tables import console


def zoo_config(*, models: int, attacks: list[str], ratio: float, epochs: int, width: int, seed: int) -> ZooConfig:
    """The builder's config for networks whose stages are `width` times 1, 2, 4 and 8."""
    victim = replace(narrow_victim(), widths=(width, 2 * width, 4 * width, 8 * width), epochs=epochs)
    return ZooConfig(models=models, attacks=tuple(attacks), ratio=ratio, victim=victim, seed=seed)


def build(out: Path, set_name: str, data: Path | None, config: ZooConfig, *, device: str, as_json: bool) -> list[str]:
    """Build the zoo and list it; what is wrong with models that failed."""
    train, test = (replace(half, images=half.images.to(device), labels=half.labels.to(device))
                   for half in _read_set(set_name, data))
    build_zoo(out, train, test, config, progress=lambda line: print(line, file=sys.stderr))
    return inspect(out, as_json=as_json)


def _read_set(name: str, data: Path | None) -> tuple[ImageSet, ImageSet]:
    if name == "digits":
        return read_digits()
    expect(data is not None, "--data", f"the folder of the set {name!r}", "nothing")
    if name == "mnist":
        return read_mnist(data)
    train, test = read_image_folder(data)
    return replace(train, name=name), replace(test, name=name)


def inspect(folder: Path, *, as_json: bool) -> list[str]:
    """Print every model that can be read; return (and print to stderr) what is wrong with the others."""
    zoo = read_zoo(folder)
    rows, problems = [], [str(problem) for problem in zoo.problems]
    for model in zoo.models:
        try:
            rows.append(_row(model))
        except InputError as problem:
            problems.append(str(problem))
    if as_json:
        print(json.dumps({"models": rows, "problems": problems}, indent=1))
    elif rows:
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*(_cell(key, value) for key, value in row.items()))
        console().print(table)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return problems


def _cell(key: str, value: object) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f}" if key in ("ACC", "ASR") and isinstance(value, float) else str(value)


def _row(model: ZooModel) -> dict:
    """What the table shows of one model; the network's shape comes from its weights."""
    network, record = load_model(model), model.record or {}
    widths = [getattr(network, f"layer{i}")[0].conv1.out_channels for i in range(1, 5)]
    truth = "clean" if model.ground_truth else "backdoored"
    known = {key: record.get(key) for key in ("attack", "ratio", "target", "ACC", "ASR", "seed", "set")}
    return {"model": model.name, "truth": truth, **known, "classes": model.num_classes,
            "widths": "-".join(map(str, widths)), "test images": len(list(model.images_folder.iterdir()))}
