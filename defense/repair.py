"""The shipped repair: from a model and a folder of clean images to a model, before a deadline."""
from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from data.devices import chosen_device
from data.errors import expect
from defense.activeness_tuning import TuningConfig
from defense.deadline import Deadline
from defense.folder_images import read_labelled
from defense.given import count_classes
from defense.results import DefenseResult
from defense.training import Shift
from defense.tsbd import TSBDConfig, defend
from defense.unlearning import UnlearningConfig

SEED = 0           # of every shipped repair
LIMIT_S = 60.0     # the contest's, a model
MARGIN = 0.08      # of the limit: loading, the last step, the way back
BATCH = 32         # images: of the few hundred there are, so that slow machines get many steps within the limit
SHIFT = 1 / 16     # of the side, each way: augmentation that keeps the class of objects, digits and signs


def shipped_config() -> TSBDConfig:
    """TSBD as shipped: its defaults but for the batches."""
    return TSBDConfig(unlearning=UnlearningConfig(batch=BATCH), tuning=TuningConfig(batch=BATCH))


def repair(model: nn.Module, num_classes: int, images_folder: Path | str, transformation: Callable,
           config: TSBDConfig, *, generator: torch.Generator, limit_s: float = LIMIT_S,
           clock: Callable[[], float] = time.perf_counter) -> DefenseResult:
    """TSBD on the model's own device, answered within `limit_s` seconds of the call; the model stays as it is."""
    expect(limit_s > 0, "limit_s", "> 0 seconds", limit_s)
    deadline = Deadline((1 - MARGIN) * limit_s, clock=clock)
    images, labels = read_labelled(images_folder, transformation, num_classes, generator=generator)
    classes = count_classes(model, images[:2])
    expect(classes == num_classes, "num_classes", f"{classes}, as the model has outputs", num_classes)
    return defend(model, images, labels, config, generator=generator, deadline=deadline,
                  augment=Shift(round(SHIFT * min(images.shape[-2:]))))


def shipped(model: nn.Module, num_classes: int, images_folder: Path | str, transformation: Callable) -> DefenseResult:
    """`repair` with fixed settings and a fixed draw on the chosen device; the result lies on the model's own."""
    home = next(model.parameters()).device
    on_device = copy.deepcopy(model).to(chosen_device())
    found = repair(on_device, num_classes, images_folder, transformation, shipped_config(),
                   generator=torch.Generator().manual_seed(SEED))
    found.model.to(home)
    return found
