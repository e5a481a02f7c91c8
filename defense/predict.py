"""The entry points that a judge would call."""
from __future__ import annotations

from torch import nn

from defense.repair import shipped


def repair_model(model, num_classes, test_images_folder_address, transformation) -> nn.Module:
    """A repaired copy of `model` on its device: TSBD on the given clean images, within 60 seconds. Where these do not
    allow a repair, the last finite state, at worst an unrepaired copy; `defense.repair.shipped` also says why."""
    return shipped(model, num_classes, test_images_folder_address, transformation).model
