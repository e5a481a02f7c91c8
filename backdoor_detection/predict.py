"""The organizers' entry point for task 3."""
from __future__ import annotations

from backdoor_detection.detection import judge


def backdoor_model_detector(model, num_classes, test_images_folder_address, transformation) -> int:
    """1 = backdoored, 0 = clean (the contest's ground_truth is the other way round)."""
    return int(judge(model, num_classes, test_images_folder_address, transformation).backdoored)
