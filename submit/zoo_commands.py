"""`zoo build` and `zoo inspect`."""
from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from rich.table import Table

from data.errors import InputError, expect
from data.image_sets import ImageSet, read_digits, read_image_folder, read_mnist
from data.model_zoo import ZooModel, load_model, read_zoo
from data.zoo_building import build_zoo
from data.zoo_recipes import SetPlan, jobs, read_recipe
from submit.engines import Engine, each
from submit.tables import console, unit_progress

SUBSET_SEED = 0  # of the images drawn where a recipe takes only some of a training set


def build(out: Path, recipe_name: str, data: Path | None, *, seed: int | None, engine: Engine, as_json: bool
          ) -> list[str]:
    """Build the zoo of a recipe and list it; what is wrong with models that failed."""
    recipe = read_recipe(recipe_name)
    work = jobs(recipe if seed is None else replace(recipe, seed=seed))
    done = len([job for job in work if (out / job.name).is_dir()])
    with unit_progress() as bar:
        def finished(name: str, record: dict) -> None:
            nonlocal done
            done += 1
            bar("zoo", done, len(work))
            print(victim_line(name, record), file=sys.stderr)

        bar("zoo", done, len(work))
        build_zoo(out, work, RecipeSets(recipe.sets, data), in_turn=partial(each, engine=engine), progress=finished)
    return inspect(out, as_json=as_json)


def victim_line(name: str, record: Mapping) -> str:
    success = "" if record["ASR"] is None else f", ASR {100 * record['ASR']:.1f} on class {record['target']}"
    failed = f"; failed: {record['failed']}" if "failed" in record else ""
    return f"{name}: ACC {100 * record['ACC']:.1f}{success}, {record['seconds']:.0f} s{failed}"


@dataclass(frozen=True)
class RecipeSets(Mapping):
    """The image sets of a recipe by name; each process reads what it needs, once."""

    plans: tuple[SetPlan, ...]
    data: Path | None

    def __getitem__(self, name: str) -> tuple[ImageSet, ImageSet]:
        plan = next(plan for plan in self.plans if plan.name == name)
        return set_once(name, plan.size, plan.images, self.data)

    def __iter__(self) -> Iterator[str]:
        return (plan.name for plan in self.plans)

    def __len__(self) -> int:
        return len(self.plans)


@lru_cache(maxsize=4)  # networks of several sets take turns
def set_once(name: str, size: int, images: int, data: Path | None) -> tuple[ImageSet, ImageSet]:
    return read_set(SetPlan(name, size=size, images=images), data)


def read_set(plan: SetPlan, data: Path | None) -> tuple[ImageSet, ImageSet]:
    """The training and the test half, as many training images as the plan takes."""
    if plan.name == "digits":
        train, test = read_digits(size=plan.size)
    else:
        expect(data is not None, "--data", f"the folder that holds {plan.name}/", "nothing")
        read = read_mnist if plan.name == "mnist" else read_image_folder
        train, test = read(data / plan.name, size=plan.size)
    if 0 < plan.images < len(train.images):
        order = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(SUBSET_SEED))
        train = train.subset(order[:plan.images])
    return replace(train, name=plan.name), replace(test, name=plan.name)


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
        shown = [key for key in rows[0] if key not in ("set", "ratio", "radius")]  # a recipe's names say these
        table = Table(title="ACC, ASR in percent")
        for key in shown:
            table.add_column(key, no_wrap=key in ("model", "truth", "attack", "widths"))
        for row in rows:
            table.add_row(*(_cell(key, row[key]) for key in shown))
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
    known = {key: record.get(key) for key in ("set", "attack", "ratio", "radius", "target", "ACC", "ASR")}
    return {"model": model.name, "truth": truth, **known, "classes": model.num_classes,
            "widths": "-".join(map(str, widths)), "test images": len(list(model.images_folder.iterdir()))}
