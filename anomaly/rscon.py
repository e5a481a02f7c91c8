"""What stands for an image where no class feature does: its most anomalous patch.

Paper: MuSc-V2 (arXiv:2511.10047), RsCon: image scores are smoothed over images (`rscin.smoothed_scores`, the same
windows) that resemble each other in their worst patch. The features are those of the second-deepest chosen layer.
Departs from it: an image all of whose scores are equal gives its first patch.
"""
from __future__ import annotations

import torch
from torch import Tensor

from data.errors import expect


def salient_features(patches: Tensor, scores: Tensor) -> Tensor:
    """(N, D), the feature of each image's patch of the highest score; the first of equal ones.

    patches: (N, L, D) float of one layer, scores: (N, L), higher = more anomalous.
    """
    expect(patches.ndim == 3 and patches.shape[1] > 0, "patches.shape", "(N, L, D) with L >= 1", tuple(patches.shape))
    expect(scores.shape == patches.shape[:2], "scores.shape", tuple(patches.shape[:2]), tuple(scores.shape))
    return patches[torch.arange(len(patches), device=patches.device), scores.argmax(1)]
