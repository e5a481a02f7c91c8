"""Random shifts and mirrors of a batch, on its device."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def shifted(images: Tensor, pixels: int, *, mirror: bool, border: str, generator: torch.Generator) -> Tensor:
    """(B, C, H, W), each image shifted by up to `pixels` each way and, with `mirror`, half of them mirrored.

    border: what comes in, a mode of torch.nn.functional.pad ("constant" = 0). Drawn on the CPU: every device draws
    the same.
    """
    count, _, height, width = images.shape
    draws = torch.randint(0, 2 * pixels + 1, (2, count, 1), generator=generator).to(images.device)
    rows = draws[0] + torch.arange(height, device=images.device)     # (B, H)
    columns = draws[1] + torch.arange(width, device=images.device)   # (B, W)
    if mirror:
        mirrored = torch.rand(count, 1, generator=generator).to(images.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = pad(images, (pixels,) * 4, mode=border)
    at = torch.arange(count, device=images.device)[:, None, None]
    return padded[at, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)
