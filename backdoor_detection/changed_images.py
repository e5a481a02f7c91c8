"""Clean images as a network sees them while a picture is added to all of them, another one for each class."""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from data.errors import expect


class ChangedImages:
    """network: (B, C, H, W) normalised images to (B, K) logits, frozen. pixels: (N, C, H, W) normalised. labels: (N,).
    std: (C,) of the normalisation; what is added is measured in pixel values, in [0, 1]. block: pixel values through
    the network at once, for memory only.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor, std: Tensor,
                 num_classes: int, block: int) -> None:
        self.network, self.pixels, self.labels, self.num_classes = network, pixels, labels, num_classes
        self.std, self.block = std.view(1, -1, 1, 1), block
        self.per_block = max(1, block // pixels.numel())  # classes through the network at once

    def some(self, places: slice) -> ChangedImages:
        """With a part of the images."""
        return ChangedImages(self.network, self.pixels[places], self.labels[places], self.std, self.num_classes,
                             self.block)

    def margins(self, classes: Tensor, added: Tensor) -> Tensor:
        """(k, N) each class's logit minus the largest other, of all images under the class's of (k, C, H, W) added."""
        shifted = (self.pixels + (added / self.std)[:, None]).flatten(0, 1)
        logits = self.network(shifted.contiguous(memory_format=torch.channels_last))
        expect(logits.shape[1] == self.num_classes, "num_classes", f"{logits.shape[1]}, as the model puts out",
               self.num_classes)
        logits = logits.view(len(classes), len(self.pixels), -1)
        at = classes.view(-1, 1, 1).expand(-1, len(self.pixels), 1)
        return (logits.gather(2, at) - logits.scatter(2, at, -math.inf).amax(2, keepdim=True))[..., 0]

    def medians(self, classes: Tensor, margins: Tensor) -> Tensor:
        """(k,) over the images of other classes: a class that some images are close to anyhow is not far for that.

        NaN where any margin is.
        """
        found = margins.masked_fill(self.labels == classes[:, None], math.nan).nanquantile(0.5, dim=1)
        return found.masked_fill(margins.isnan().any(1), math.nan)

    def slopes(self, classes: Tensor, pictures: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """(k,) median margins, and the gradient of the mean ones by `pictures`, which `added` was made of."""
        margins = self.margins(classes, added)
        others = (self.labels != classes[:, None]).float()
        (gradient,) = torch.autograd.grad(((margins * others).sum(1) / others.sum(1)).sum(), pictures)
        return self.medians(classes, margins.detach()), gradient

    def unchanged(self, classes: Tensor, late: Callable[[], bool]) -> tuple[Tensor, Tensor] | None:
        """(k,) medians and (k, C, H, W) slopes where nothing is added yet; None when late."""
        found = []
        for part in classes.split(self.per_block):
            if late():
                return None
            nothing = self.pixels.new_zeros(len(part), *self.pixels.shape[1:]).requires_grad_(True)
            found.append(self.slopes(part, nothing, nothing))
        medians, slopes = zip(*found, strict=True)
        return torch.cat(medians), torch.cat(slopes)


def norm(x: Tensor) -> Tensor:
    """(k, 1, 1, 1) L2 norms of k pictures."""
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def direction(x: Tensor) -> Tensor:
    """k pictures of norm 1; one without any stays 0."""
    return x / norm(x).clamp(min=1e-20)
