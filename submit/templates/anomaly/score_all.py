"""Scores of every image below data/<category>/test, each category by itself, into output_scores/."""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from anomaly.calibration import calibrated
from anomaly.predict import predict_category
from anomaly.score_files import write_scores
from data.anomaly_tree import SIDE, SPLIT, AnomalyImage
from data.images import find_unreadable, list_images

DATA, SCORES = Path("data"), Path("output_scores")


def main() -> None:
    """Go through the categories; what cannot be scored is named and gets scores that say nothing, as every image needs
    a file."""
    for category in folders(DATA):
        images = [AnomalyImage(path, kind.name, None)
                  for kind in folders(category / SPLIT) for path in list_images(kind)]
        images = list({(image.kind, image.path.stem): image for image in images}.values())  # these share a file
        write_scores(SCORES, category.name, images, *score(category.name, [image.path for image in images]))


def score(name: str, paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Image scores (N,) and maps (N, 1, 224, 224); images are looked through only after something went wrong."""
    try:
        return predict_category(paths)
    except Exception as problem:  # one category must not end the others, whatever happened to it
        print(f"{name}: {problem}", file=sys.stderr)
    broken = find_unreadable(paths)
    usable = [i for i, path in enumerate(paths) if path not in broken]
    scores, maps = np.zeros(len(paths)), np.zeros((len(paths), 1, SIDE, SIDE), np.float32)
    if 1 < len(usable) < len(paths):
        try:
            scores[usable], maps[usable] = predict_category([paths[i] for i in usable])
            return scores, maps
        except Exception as problem:
            print(f"{name}: {problem}", file=sys.stderr)
    # constant maps would end the organizers' evaluation
    return scores, calibrated(torch.from_numpy(maps)).numpy() if paths else maps


def folders(parent: Path) -> list[Path]:
    """The folders in `parent`, sorted; none where it does not exist."""
    return sorted(p for p in parent.iterdir() if p.is_dir() and not p.name.startswith(".")) if parent.is_dir() else []


if __name__ == "__main__":
    main()
