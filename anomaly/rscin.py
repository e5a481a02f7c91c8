"""Image scores smoothed over images that look alike.

Paper: RsCIN of MuSc (Li et al., ICLR 2024, arXiv:2401.16753).
Departs from it: class features are brought to unit length, so an image is its own best match; windows are clipped to
the number of images; equal scores stay as they are (else 0 / 0); negative similarities count as none.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from data.errors import expect


def smoothed_scores(scores: Tensor, classes: Tensor, windows: Sequence[int]) -> Tensor:
    """Mean over the windows k of each image's weighted mean score over the k images most like it, itself included.

    scores: (N,) float, higher = more anomalous. classes: (N, C) float, one class feature an image.
    Returns (N,) in [0, 1] (after scaling the scores to it), or the scores themselves if they are all equal.
    """
    _check(scores, classes, windows)
    low, high = scores.min(), scores.max()
    if low == high:
        return scores
    scaled = (scores - low) / (high - low)
    unit = normalize(classes.to(scores.dtype), dim=-1)
    similar = (unit @ unit.T).clamp_min(0)
    similar.fill_diagonal_(2.0)  # the image itself comes first, before any twin of it
    weights, others = similar.topk(min(max(windows), len(scores)), dim=1)  # (N, k), the most alike first
    weights[:, 0] = 1.0
    values = scaled[others]
    last = torch.tensor([min(k, len(scores)) - 1 for k in windows], device=scores.device)
    return ((weights * values).cumsum(1)[:, last] / weights.cumsum(1)[:, last]).mean(1)


def _check(scores: Tensor, classes: Tensor, windows: Sequence[int]) -> None:
    expect(scores.ndim == 1 and len(scores) > 0, "scores.shape", "(N,) with N >= 1", tuple(scores.shape))
    expect(classes.ndim == 2 and len(classes) == len(scores), "classes.shape", f"({len(scores)}, C)",
           tuple(classes.shape))
    expect(len(windows) > 0 and min(windows) >= 1, "windows", "numbers of images from 1", tuple(windows))
    expect(bool(torch.isfinite(scores).all() and torch.isfinite(classes).all()), "scores and classes",
           "finite numbers", "NaN or infinity")
