"""How far a tiny change raises the network's confidence on images it was not trained for.

Method: TRODO (NeurIPS 2024, arXiv:2501.17151): clean images are changed harshly until they lie near the training
data but outside, then projected gradient ascent raises their maximum softmax probability; a backdoored network
rises further. The cost does not depend on the class count.
Departs from it: no threshold (the paper sets its own on surrogate clean networks); strengths of the changes and
their draw in pairs are ours (`near_ood`).
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from backdoor_detection.clean_images import CleanImages
from backdoor_detection.near_ood import CHANGES, near_ood
from backdoor_detection.split_model import frozen_copy, stem_width
from data.errors import expect


@dataclass(frozen=True)
class TrodoConfig:
    images: int = 256      # changed images; clean ones are used again and again where they are fewer
    harsh: int = 2         # changes an image
    eps: float = 2 / 255   # largest change of a pixel value in [0, 1]
    steps: int = 10
    reach: float = 2.5     # the steps together, in eps
    block: int = 1 << 26   # stem features side by side at most (256 MB each copy); for memory only

    def __post_init__(self) -> None:
        for name in ("images", "steps", "reach", "block"):
            expect(getattr(self, name) > 0, f"TrodoConfig.{name}", "> 0", getattr(self, name))
        expect(0 < self.harsh <= len(CHANGES), "TrodoConfig.harsh", f"in [1, {len(CHANGES)}]", self.harsh)
        expect(0 < self.eps <= 1, "TrodoConfig.eps", "in (0, 1]", self.eps)


def score(model: nn.Module, images: CleanImages, config: TrodoConfig, *, generator: torch.Generator) -> float:
    """Mean rise of the maximum softmax probability, in [-1, 1]; larger = more suspicious.

    model: normalised images to (B, K) logits; works on a copy, on the model's device. generator: on the CPU.
    """
    outside = near_ood(images.unit(), config.images, config.harsh, generator=generator)
    noise = (torch.rand(outside.shape, generator=generator) * 2 - 1) * config.eps
    net = frozen_copy(model)
    device = next(net.parameters()).device
    confidence = partial(_confidence, net, images.mean.to(device)[:, None, None], images.std.to(device)[:, None, None])
    together = max(1, config.block // (stem_width(net, outside.shape[1]) * outside[0, 0].numel()))
    rises = [confidence_rise(confidence, part.to(device), start.to(device), config)
             for part, start in zip(outside.split(together), noise.split(together), strict=True)]
    return torch.cat(rises).double().mean().item()


def confidence_rise(confidence: Callable[[Tensor], Tensor], images: Tensor, noise: Tensor,
                    config: TrodoConfig) -> Tensor:
    """(B,) confidence after the ascent minus before.

    images: (B, C, H, W) in [0, 1]. noise: the start's distance from them, in [-eps, eps]. Each step follows the
    sign of the gradient, then returns to within eps of the image and to [0, 1].
    """
    with torch.no_grad():
        before = confidence(images)
    low, high = (images - config.eps).clamp(min=0), (images + config.eps).clamp(max=1)
    step = config.reach * config.eps / config.steps
    moved = (images + noise).clamp(0, 1)
    for _ in range(config.steps):
        moved = moved.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(confidence(moved).sum(), moved)
        moved = (moved.detach() + step * gradient.sign()).clamp(low, high)
    with torch.no_grad():
        return confidence(moved) - before


def _confidence(net: nn.Module, mean: Tensor, std: Tensor, images: Tensor) -> Tensor:
    """(B,) maximum softmax probability of images in [0, 1]."""
    return net((images - mean) / std).softmax(1).amax(1)
