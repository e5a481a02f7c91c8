"""What each part of the detector adds: `python -m benchmarks.detector_changes ZOO...`.

Every network climbs once under every change below, those that ship and those that do not, and its features are pushed
freely; then the verdict is asked of what ships (the mean of some changes, and the features), of each of the two alone,
of the changes without each of them, of each alone, with more, and of each by itself (Cauchy combination). One thread a
network; what is done is kept under runs/, so a second call goes on.
"""
from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from backdoor_detection import detection, universal
from backdoor_detection.changed_images import ChangedImages
from backdoor_detection.clean_images import draw_balanced, read_clean_images
from backdoor_detection.detection import DetectorConfig, standing_out, standing_out_freely
from backdoor_detection.free_features import free_margins
from backdoor_detection.outlier import combined_p_value, fisher_p_value
from backdoor_detection.split_model import SplitModel, frozen_copy
from backdoor_detection.universal import Change, Reach, UniversalConfig, universal_reach
from benchmarks.options import RECORDS
from data.errors import InputError
from data.files import fingerprint, write_json
from data.model_zoo import BACKDOORED, MODEL, ZooModel, load_model, read_zoo
from submit.kept_units import code_of_modules, kept_unit
from submit.records import environment

SEED = 0
NAMES = ("every pixel", "every pixel, 0.05", "8 x 8 points", "4 x 4 points", "columns")
SHIPPED = dict(zip(NAMES, UniversalConfig().changes, strict=True))
OTHERS = {"rows": Change(0, 1, 0.1), "every pixel, 0.025": Change(0, 0, 0.025), "columns, 0.2": Change(1, 0, 0.2)}
KEYS = frozenset({"stages", "kept", "null", "free"})


def climbed(sample: ZooModel) -> dict:
    """The stages of one network under all changes and p of its free features, as JSON values."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    given = read_clean_images(sample.images_folder, sample.transformation, size=None, channels=3, generator=generator)
    config = replace(UniversalConfig(), changes=(*SHIPPED.values(), *OTHERS.values()))
    places = draw_balanced(given.labels.tolist(), config.images, generator=generator)
    model, pixels = load_model(sample), given.pixels[places]
    images = ChangedImages(frozen_copy(model), pixels, given.labels[places], given.std, sample.num_classes,
                           config.block)
    found = universal_reach(images, config)
    free = free_margins(SplitModel(model), pixels, found.kept, sample.num_classes, block=config.block)
    return {"stages": found.stages.tolist(), "kept": list(found.kept), "null": list(found.null),
            "free": standing_out_freely(free, found)[0]}


def unit(folder: Path, sample: ZooModel) -> dict:
    code = code_of_modules(detection, universal, packages=("backdoor_detection", "data"))
    name = fingerprint(sample.folder / MODEL, f"{UniversalConfig()} {SHIPPED} {OTHERS}", code)
    return kept_unit(folder / f"{name}.json", KEYS, partial(climbed, sample))


def part(found: dict, names: Sequence[str]) -> Reach:
    """The reach as if only these changes had been tried."""
    order = [*SHIPPED, *OTHERS]
    stages = torch.tensor(found["stages"])[[order.index(name) for name in names]]
    return Reach(stages, tuple(found["kept"]), tuple(found["null"]), 0, 0)


def by_itself(found: dict) -> float:
    """p where each shipped change is judged by itself."""
    return combined_p_value([standing_out(part(found, [name]))[0] for name in SHIPPED])


def ways() -> dict:
    """Every row of the table: from what was found of a network to p."""
    def judged(names: Sequence[str]):
        return lambda found: standing_out(part(found, names))[0]

    changes = judged([*SHIPPED])
    table = {"shipped": lambda found: fisher_p_value([changes(found), found["free"]]), "changes alone": changes,
             "free features alone": lambda found: found["free"]}
    table |= {f"without {left_out}": judged([name for name in SHIPPED if name != left_out]) for left_out in SHIPPED}
    table |= {f"{name} alone": judged([name]) for name in (*SHIPPED, *OTHERS)}
    table |= {f"with {name}": judged([*SHIPPED, name]) for name in OTHERS}
    return table | {"each by itself": by_itself,
                    "mean and each by itself": lambda found: combined_p_value([changes(found), by_itself(found)])}


def row(p_values: Sequence[float], truth: np.ndarray) -> dict:
    """AUROC and, with the shipped alarm, accuracy, recall and false alarms, in percent."""
    p, alarm = np.array(p_values), np.array(p_values) < DetectorConfig().alarm
    return {"auroc": 100 * float(roc_auc_score(truth, -p)), "accuracy": 100 * float((alarm == truth).mean()),
            "recall": 100 * float(alarm[truth].mean()), "false_alarms": 100 * float(alarm[~truth].mean())}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("zoos", type=Path, nargs="+")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RECORDS / "detector_changes.json")
    options = parser.parse_args(arguments)
    try:
        models = [model for zoo in options.zoos for model in read_zoo(zoo).models]
    except InputError as error:
        parser.error(str(error))
    truth = np.array([model.ground_truth == BACKDOORED for model in models])
    if truth.all() or not truth.any():
        parser.error("zoos: expected clean and backdoored networks, found one kind")
    work = partial(unit, Path("runs/detector_changes"))
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        found = list(map(work, models) if options.workers == 1 else pool.map(work, models))
    table = {name: row([judge(one) for one in found], truth) for name, judge in ways().items()}
    names = " ".join(zoo.name for zoo in options.zoos)
    write_json(options.out, {"command": f"python -m benchmarks.detector_changes {names}", "models": len(models),
                             "backdoored": int(truth.sum()), "table": table, "environment": environment()})
    for name, values in table.items():
        print(f"{name:28} " + "  ".join(f"{key.replace('_', ' ')} {value:5.1f}" for key, value in values.items()))


if __name__ == "__main__":
    main()
