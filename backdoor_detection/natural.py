"""How far a class reaches by nature: what its own look does to the images of other classes.

In clean networks too one class is nearer to all images than the others are, and it is the same class in most networks
of a set: the 8 among digits, which is like all others. The difference of its mean image from the mean of all, added to
the other images in the size of the changes that a backdoor is looked for with, tells how near, without a search; a
trigger has no part in it.

No published source; `benchmarks/RESULTS.md` has what it adds.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from backdoor_detection.changed_images import ChangedImages, direction
from data.errors import expect

RADIUS = 0.1  # of the difference that is added: root mean square of its pixel values, in [0, 1]


def natural_reach(images: ChangedImages, known: Tensor, labels: Tensor, *,
                  late: Callable[[], bool] = lambda: False) -> Tensor | None:
    """(K,) median margin of the `images` of other classes under each class's difference.

    known: (M, C, H, W) normalised images whose means are taken, `images` may be among them. labels: (M,), one out of
    range tells of no class. A class without known images has the mean of the others. late: asked between blocks; None
    when it says so. NaN where a margin is.
    """
    expect(len(known) == len(labels) > 0, "known, labels", "equally many, at least one", (len(known), len(labels)))
    classes = torch.arange(images.num_classes, device=known.device)
    told = (labels == classes[:, None]).any(1) & (images.labels != classes[:, None]).any(1)
    found, mean = known.new_zeros(images.num_classes), known.mean(0)
    for part in classes[told].split(images.per_block) if told.any() else ():
        if late():
            return None
        means = torch.stack([known[labels == k].mean(0) for k in part])
        added = RADIUS * math.sqrt(mean.numel()) * direction((means - mean) * images.std)
        with torch.no_grad():
            found[part] = images.medians(part, images.margins(part, added))
    return torch.where(told, found, found[told].mean() if told.any() else 0.0)
