"""The device that predict functions use; their signatures are the organizers' and have no room for it."""
from __future__ import annotations

import os
from typing import TYPE_CHECKING

from data.errors import expect

if TYPE_CHECKING:
    import torch

VARIABLE = "KIT_DEVICE"  # set by `python -m submit ... --device`
WHERE = f"--device (${VARIABLE})"


def chosen_device() -> torch.device:
    """$KIT_DEVICE if set and not "auto"; else CUDA where there is one; else the CPU."""
    import torch  # takes more than a second, which `--help` need not wait for

    name = os.environ.get(VARIABLE, "auto")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    expect(device is not None and device.type in ("cpu", "cuda"), WHERE, "auto, cpu, cuda or cuda:N", name)
    expect(device.type != "cuda" or torch.cuda.is_available(), WHERE, "a device of this machine", name)
    return device
