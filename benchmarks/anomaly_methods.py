"""Every way of scoring on every category: `python -m benchmarks.anomaly_methods [TREE] [--seeds 20240,20241]`.

The seven metrics of the contest for filter-bank and random features, the scoring of plain MuSc, of the contest report
and of MuSc-V2, the shipped scoring, and the shipped one with each stage changed once. All but the first two are on
the embedded backbone. Without TREE, on generated categories of the seeds given; the dev split has seed 0 and is never
chosen on. Writes benchmarks/records/anomaly_methods_NAME.json.
"""
from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from anomaly.backbone import EMBEDDED, Features, extract, load_backbone, random_backbone
from anomaly.category import Nets, category_features, random_groups, tiles_of
from anomaly.foreground import background
from anomaly.gabor_features import gabor_energies
from anomaly.pipeline import MuscConfig, PatchScores, category_scores, feature_scores
from anomaly.presets import preset
from anomaly.tiles import Tiles
from data.anomaly_tree import SIDE, Category, image_truth, pixel_truth, read_tree
from data.defects import write_anomaly_split
from data.files import write_json
from data.images import read_rgb, to_uint8
from submit.records import environment
from submit.scoring import IMAGE_METRICS, PIXEL_METRICS, measured_metrics, weighted_score

CONFIG = preset("embedded").scoring
LATER = ("windows", "image_score", "maps", "foreground", "calibrated")  # settings that patch scores do not depend on
INPUTS = {"input of 288 pixels": (288, 288), "input of 360 pixels": (360, 360)}
GABOR_SIDE, GABOR_GRID = 256, (16, 16)
CHANGES = {
    "without smoothing": {"smoothing": "none"}, "smoothed by class features": {"smoothing": "rscin"},
    "smoothed by worst patch": {"smoothing": "rscon", "windows": (1, 7)},
    "degree 1": {"degrees": (1,)}, "degrees 1 and 3": {"degrees": (1, 3)}, "degrees 1, 3, 5": {"degrees": (1, 3, 5)},
    "weighted neighbours": {"aggregation": "snamd", "degrees": (1, 3, 5)}, "box filter": {"aggregation": "lnamd"},
    "highest of the map": {"image_score": "highest"}, "two highest": {"image_score": "two_highest"},
    "keep 0.05": {"keep": 0.05}, "keep 0.1": {"keep": 0.1}, "keep 0.3": {"keep": 0.3}, "keep 0.5": {"keep": 0.5},
    "without repeated defects": {"consistent": True}, "with repeated defects": {"consistent": False},
    "within 3 patches": {"radius": 3},
    "foreground": {"foreground": "on"}, "foreground by rule": {"foreground": "rule"},
    "no foreground": {"foreground": "off"}, "calibrated": {"calibrated": True}, "not calibrated": {"calibrated": False},
    "float32": {"precision": "float32"}, "2 random groups": {"subsets": 2}, "4 random groups": {"subsets": 4},
}


def gabor(images: list) -> Features:
    """Energies brought to mean 0 and deviation 1 over the category; no class features."""
    size = (GABOR_SIDE, GABOR_SIDE)
    energies = torch.cat([gabor_energies(to_uint8(i.resize(size))[None] / 255, GABOR_GRID) for i in images])
    energies = (energies - energies.mean((0, 1))) / energies.std((0, 1)).clamp_min(1e-6)
    return Features((energies,), GABOR_GRID, normalize(energies.mean(1), dim=-1))


def variants() -> dict[str, MuscConfig]:
    """The shipped scoring, those of the presets, and the shipped one with one stage changed."""
    named = {name: preset(name).scoring for name in ("musc", "report", "musc-v2")}
    changed = {name: replace(CONFIG, **change) for name, change in CHANGES.items()}
    return {"shipped": CONFIG, **named, **{name: config for name, config in changed.items() if config != CONFIG}}


def in_groups(features: Features, config: MuscConfig) -> PatchScores:
    """As `score_category` does it where the memory or the config asks for groups."""
    groups = random_groups(len(features.layers[0]), max(1, config.subsets))
    parts = [Features(tuple(layer[group] for layer in features.layers), features.grid,
                      None if features.classes is None else features.classes[group]) for group in groups]
    return PatchScores.joined([feature_scores(part, config) for part in parts], groups)


def scored(features: Features, config: MuscConfig, tiles: Tiles | None, kept: dict) -> tuple[float, PatchScores]:
    """Patch scores and their seconds; once for all configs that differ in later stages only."""
    later = MuscConfig()
    key = replace(config, **{name: getattr(later, name) for name in LATER}), id(features)
    if key not in kept:
        start = time.perf_counter()
        found = in_groups(features, config) if tiles is None else feature_scores(features, config, tiles=tiles)
        kept[key] = time.perf_counter() - start, found
    return kept[key]


def metrics(category: Category, truth: tuple, features: Features, config: MuscConfig, small: Tensor,
            tiles: Tiles | None = None, kept: dict | None = None) -> dict:
    """The seven metrics (the image ones where there are no masks), the score of the contest, seconds; in percent."""
    seconds, found = scored(features, config, tiles, {} if kept is None else kept)
    start = time.perf_counter()
    hidden = background(small) if config.foreground != "off" else None
    images, maps = category_scores(found, found, config, hidden)
    seconds += time.perf_counter() - start
    is_defective, pixels = truth
    names = IMAGE_METRICS + PIXEL_METRICS if category.has_masks else IMAGE_METRICS
    values = measured_metrics(is_defective, images.double().numpy(), pixels,
                              maps[:, 0].numpy() if category.has_masks else None)
    values = {name: values[name] or 0.0 for name in names}
    return {**{name: round(100 * value, 2) for name, value in values.items()},
            "score": round(100 * weighted_score(values, names), 2), "seconds": round(seconds, 2)}


def embedded_features(paths: list[Path], larger: bool) -> dict[str, tuple[Features, Tiles | None]]:
    """The embedded net's features of the images as shipped, at larger inputs and of tiles; by name of the variant."""
    config = load_backbone(EMBEDDED).config
    inputs = {"": config.size} | (INPUTS if larger else {})
    ways = {name: (load_backbone(EMBEDDED, replace(config, size=size)), CONFIG) for name, size in inputs.items()}
    if larger:
        ways["tiles 2 x 2"] = load_backbone(EMBEDDED), replace(CONFIG, tiles=2)
    return {name: (category_features(paths, Nets(net, net), way)[0], tiles_of(net, way) if way.tiles > 1 else None)
            for name, (net, way) in ways.items()}


def compare(root: Path, wanted: dict[str, MuscConfig], prefix: str = "", *, larger: bool = True) -> dict:
    """By category and variant; features are extracted once a category."""
    untrained, table = random_backbone(load_backbone(EMBEDDED).config, seed=1), {}
    for category in read_tree(root).categories:
        images = [read_rgb(image.path, upright=False) for image in category.images]
        small = torch.stack([to_uint8(image.resize((SIDE, SIDE))) for image in images])
        truth = image_truth(category).numpy(), pixel_truth(category).numpy()[:, 0] if category.has_masks else None
        rows = {"filter bank": metrics(category, truth, gabor(images), CONFIG, small),
                "random net": metrics(category, truth, extract(untrained, images), CONFIG, small)}
        for name, (features, tiles) in embedded_features([i.path for i in category.images], larger).items():
            kept: dict = {}
            for variant, config in (wanted if not name else {name: CONFIG}).items():
                rows[variant] = metrics(category, truth, features, config, small, tiles, kept)
        for name, row in rows.items():
            print(f"{prefix}{category.name:16} {name:26}", *(f"{value:6.2f}" for value in row.values()), flush=True)
        table[prefix + category.name] = {"images": len(images), "methods": rows}
    return table


def means(table: dict) -> dict:
    """Over the categories with masks, of each metric of each variant; over all where none has masks."""
    full = [entry["methods"] for entry in table.values() if "pixel_auroc" in entry["methods"]["shipped"]]
    full = full or [entry["methods"] for entry in table.values()]
    return {name: {key: round(statistics.fmean(rows[name][key] for rows in full), 2) for key in full[0][name]}
            for name in full[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, nargs="?")
    parser.add_argument("--seeds", default="20240,20241", help="of generated categories")
    parser.add_argument("--only", help="of the embedded net's ways, these, with commas between; no larger inputs")
    parser.add_argument("--name", default="", help="of the record; default: the tree's name, or generated")
    options = parser.parse_args()
    wanted, table = variants(), {}
    if options.only:
        wanted = {name: wanted[name] for name in options.only.split(",")}
    larger = not options.only
    if options.tree:
        table = compare(options.tree, wanted, larger=larger)
    else:
        for seed in options.seeds.split(","):
            with tempfile.TemporaryDirectory() as scratch:
                write_anomaly_split(Path(scratch) / "split", seed=int(seed))
                table |= compare(Path(scratch) / "split", wanted, f"{seed} ", larger=larger)
    on = options.tree.name if options.tree else f"--seeds {options.seeds}"
    on += f" --only '{options.only}'" if options.only else ""
    record = {"command": f"python -m benchmarks.anomaly_methods {on}",
              "mean": means(table), "categories": table, "environment": environment()}
    name = options.name or (options.tree.name if options.tree else "generated")
    write_json(Path(__file__).parent / "records" / f"anomaly_methods_{name}.json", record)
    for name, row in sorted(record["mean"].items(), key=lambda item: -item[1]["score"]):
        print(f"{name:26}", row)


if __name__ == "__main__":
    main()
