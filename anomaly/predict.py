"""What the contest asks for: scores of one category's images, from these images alone.

The signature is the organizers' and has no room for settings: $KIT_ANOMALY_PRESET names those of `presets.py` that
`python -m submit score --preset` chose, and $KIT_WEIGHTS the folder of the nets it needs. Without them, the backbone
in `weights/backbone` makes the maps; the one in `weights/image_backbone`, where there is one, makes the image scores
(the report takes DINOv2 for the first and CLIP for the second), else the first makes both.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anomaly.category import Nets, score_category
from anomaly.presets import load_nets, preset
from data.devices import chosen_device

PRESET, WEIGHTS = "KIT_ANOMALY_PRESET", "KIT_WEIGHTS"


def predict_category(paths: Sequence[Path | str]) -> tuple[np.ndarray, np.ndarray]:
    """Image scores (N,) float64 and maps (N, 1, 224, 224) float32, in the order of the paths.

    Both in [0, 1] over the category, higher = more anomalous. N >= 2. Where all images are alike, image scores are 0,
    and maps fall from the middle, the same for all: constant maps would end the organizers' evaluation.
    Errors: fewer images; an image that cannot be read (named).
    """
    name = os.environ.get(PRESET) or "embedded"
    nets = _nets(name, os.environ.get(WEIGHTS, ""), chosen_device())
    return _arrays(*score_category(paths, nets, preset(name).scoring))


def _arrays(scores: Tensor, maps: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return scores.double().cpu().numpy(), maps.cpu().numpy()


@lru_cache(maxsize=1)
def _nets(name: str, weights: str, device: torch.device) -> Nets:
    return load_nets(preset(name), Path(weights) if weights else None, device=device)
