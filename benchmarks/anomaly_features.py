"""What the patch features are worth: the same scoring on trained, random and Gabor features.

`python -m benchmarks.anomaly_features TREE [NAME]` with a tree in the organizers' layout; without one, on a generated
set of another seed than the dev split. Writes benchmarks/records/anomaly_features_NAME.json.
"""
import sys
import tempfile
import time
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from anomaly.backbone import EMBEDDED, Features, extract, load_backbone, random_backbone
from anomaly.gabor_features import gabor_energies
from anomaly.image_score import score_maps
from anomaly.pipeline import MuscConfig, PatchScores, category_scores, feature_scores
from data.anomaly_tree import SIDE, Category, image_truth, pixel_truth, read_tree
from data.defects import write_anomaly_split
from data.files import write_json
from data.images import read_rgb, to_uint8
from submit.records import environment

VALIDATION_SEED = 20_240
GABOR_SIDE, GABOR_GRID = 256, (16, 16)


def learnt(folder: Path = EMBEDDED):
    backbone = load_backbone(folder)
    return lambda images: extract(backbone, images)


def random_net(folder: Path = EMBEDDED):
    backbone = random_backbone(load_backbone(folder).config, seed=1)
    return lambda images: extract(backbone, images)


def gabor(images: list) -> Features:
    """Energies brought to mean 0 and deviation 1 over the category; the mean of all patches stands for the class."""
    size = (GABOR_SIDE, GABOR_SIDE)
    energies = torch.cat([gabor_energies(to_uint8(i.resize(size))[None] / 255, GABOR_GRID) for i in images])
    energies = (energies - energies.mean((0, 1))) / energies.std((0, 1)).clamp_min(1e-6)
    return Features((energies,), GABOR_GRID, torch.nn.functional.normalize(energies.mean(1), dim=-1))


def measured(category: Category, found: PatchScores, seconds: float) -> dict:
    """AUROC in percent: images with and without smoothing, pixels where there are masks."""
    truth = image_truth(category).numpy()
    result = {"seconds": round(seconds, 1), "grid": list(found.grid)}
    for name, windows in (("image_auroc", (1, 8, 9)), ("image_auroc_unsmoothed", (1,))):
        scores, _ = category_scores(found, found, MuscConfig(windows=windows))
        result[name] = round(100 * roc_auc_score(truth, scores.numpy()), 2)
    if category.has_masks:
        maps = score_maps(found.scores, found.grid, SIDE)
        result["pixel_auroc"] = round(100 * pixel_auroc(pixel_truth(category), maps), 2)
    return result


def pixel_auroc(truth: Tensor, maps: Tensor) -> float:
    return roc_auc_score(truth.flatten().numpy(), maps.flatten().numpy())


def compare(root: Path, makers: dict) -> dict:
    """Figures of every category in `root` for every kind of features."""
    table = {}
    for category in read_tree(root).categories:
        images = [read_rgb(image.path) for image in category.images]
        table[category.name] = {"images": len(images)}
        for name, features in makers.items():
            start = time.perf_counter()
            found = feature_scores(features(images), MuscConfig())
            table[category.name][name] = measured(category, found, time.perf_counter() - start)
            print(category.name, name, table[category.name][name], flush=True)
    return table


def main(arguments: list[str]) -> None:
    makers = {"trained": learnt(), "random": random_net(), "gabor": gabor}
    name = arguments[1] if len(arguments) > 1 else "generated"
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(arguments[0]) if arguments else Path(scratch) / "split"
        if not arguments:
            write_anomaly_split(root, seed=VALIDATION_SEED)
        table = compare(root, makers)
    record = {"command": " ".join(["python -m benchmarks.anomaly_features", *arguments]), "categories": table,
              "environment": environment()}
    write_json(Path(__file__).parent / "records" / f"anomaly_features_{name}.json", record)


if __name__ == "__main__":
    main(sys.argv[1:])
