"""The organizers' entry point for task 3."""
from __future__ import annotations

import copy

import torch

from backdoor_detection.detection import detect
from backdoor_detection.margins import ReportConfig
from data.devices import chosen_device

SEED = 0  # of the images drawn


def backdoor_model_detector(model, num_classes, test_images_folder_address, transformation) -> int:
    """1 = backdoored, 0 = clean (the contest's ground_truth is the other way round)."""
    generator = torch.Generator().manual_seed(SEED)
    on_device = copy.deepcopy(model).to(chosen_device())
    found = detect(on_device, num_classes, test_images_folder_address, transformation, ReportConfig(),
                   generator=generator)
    return int(found.backdoored)
