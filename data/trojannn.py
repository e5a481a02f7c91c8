"""TrojanNN: a patch shaped to excite two features of a clean network is added to the image.

Paper: Liu et al., Trojaning Attack on Neural Networks, NDSS 2018.
Departs from it: the network under attack is trained anew on the poisoned set instead of retrained from the
clean one (as later benchmarks do). Departs from those benchmarks: the features are chosen by the clean
network's own last layer, with its real number of classes; the addition saturates at 255 where theirs wraps to
0; the patch starts at one grey level, in the middle so that it is not all white after saturation; an apple
drawn by code stands for their picture; of all steps the pattern of lowest cost is kept, not the last.
"""
from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite

import torch
from torch import Tensor, nn

from data.errors import expect
from data.image_sets import ImageSet
from data.poisoned_sets import BackdooredSet, check_images, poison_any_class
from data.victims import VictimConfig, check_weights, train_victim

# Ellipses of the apple: centre row and column, half height, half width, all in 1/32 of the image's side.
APPLE = ((25.0, 20.8, 5.0, 3.8), (25.0, 25.2, 5.0, 3.8), (26.4, 23.0, 3.6, 5.0),  # two lobes, the belly
         (19.5, 22.5, 3.5, 0.6), (18.0, 24.8, 2.0, 2.3))                          # stem, leaf


@dataclass(frozen=True)
class TrojanNNConfig:
    probe_width: int = 64     # channels of the clean network's first stage; the others have 2, 4, 8 times as many
    probe_images: int = 0     # it is trained on, drawn once; 0 = all
    probe_epochs: int = 100
    probe_batch: int = 128    # images
    probe_rate: float = 0.01  # learning rate at the start
    probe_crop: int = 4       # pixels of black around the image before the random crop
    probe_flip: bool = False  # mirror left and right: for objects, never for digits and signs
    neurons: int = 2          # pooled features to excite
    aim: float = 100.0        # the value they shall reach
    level: float = 0.5        # grey level of the patch at the start, in [0, 1]
    radius: float = 0.3       # largest change of a pixel of it, in (0, 1]
    step: float = 0.1         # of the signed gradient descent
    steps: int = 1000         # at most
    tolerance: float = 1e-3   # cost at which it stops

    def __post_init__(self) -> None:
        expect(self.probe_width > 0, "TrojanNNConfig.probe_width", "> 0 channels", self.probe_width)
        expect(self.probe_images >= 0, "TrojanNNConfig.probe_images", ">= 0", self.probe_images)
        expect(0 < self.neurons <= 8 * self.probe_width, "TrojanNNConfig.neurons",
               f"in [1, {8 * self.probe_width}], the pooled features of the probe", self.neurons)
        expect(0 <= self.level <= 1, "TrojanNNConfig.level", "in [0, 1]", self.level)
        expect(0 < self.radius <= 1, "TrojanNNConfig.radius", "in (0, 1]", self.radius)
        expect(self.step > 0 and self.steps > 0, "TrojanNNConfig step, steps", "> 0", (self.step, self.steps))
        expect(self.tolerance >= 0, "TrojanNNConfig.tolerance", ">= 0", self.tolerance)
        self.probe(1)

    def probe(self, channels: int) -> VictimConfig:
        """How the clean network is trained."""
        widths = tuple(self.probe_width * factor for factor in (1, 2, 4, 8))
        return VictimConfig(widths=widths, epochs=self.probe_epochs, batch=self.probe_batch, rate=self.probe_rate,
                            crop=self.probe_crop, flip=self.probe_flip, mean=(0.5,) * channels, std=(0.5,) * channels)


def budgeted() -> TrojanNNConfig:
    """A narrow probe trained briefly: half a minute at 32x32 on one CPU core, however large the set."""
    return TrojanNNConfig(probe_width=8, probe_images=10_000, probe_epochs=3, probe_rate=0.05, steps=100)


def apple_mask(height: int, width: int) -> Tensor:
    """(H, W) bool: an apple with a leaf, low and right; at 32x32 rows 16 to 29, columns 17 to 28."""
    row = ((torch.arange(height) + 0.5) * (32 / height))[:, None]
    column = ((torch.arange(width) + 0.5) * (32 / width))[None, :]
    mask = torch.zeros(height, width, dtype=torch.bool)
    for y, x, half_height, half_width in APPLE:
        mask |= ((row - y) / half_height) ** 2 + ((column - x) / half_width) ** 2 <= 1
    expect(mask.any(), "images", "large enough for the apple to cover a pixel", (height, width))
    return mask


def strongest_inputs(linear: nn.Linear, count: int) -> Tensor:
    """(count,) the inputs whose weights have the largest sum of magnitudes over the classes."""
    return linear.weight.detach().abs().sum(0).topk(count).indices


def optimise_pattern(probe: nn.Module, mask: Tensor, channels: int, config: TrojanNNConfig) -> Tensor:
    """(C, H, W) uint8, zero off the (H, W) bool `mask`: the patch that excites the probe most.

    Signed gradient descent of sum (feature - aim)^2 over the chosen pooled features; the probe sees the patch
    alone, in [0, 1] and without normalisation.
    """
    chosen = strongest_inputs(probe.linear, config.neurons)
    start = (config.level * mask).expand(1, channels, *mask.shape).float()
    lowest, highest = (start - config.radius).clamp(0, 1), (start + config.radius).clamp(0, 1)
    pattern, best, best_cost = start, start, float("inf")
    for _ in range(config.steps + 1):
        pattern = pattern.detach().requires_grad_(True)
        cost = (_pooled(probe, pattern)[0, chosen] - config.aim).square().sum()
        if cost.item() < best_cost:
            best, best_cost = pattern.detach(), cost.item()
        if best_cost < config.tolerance:
            break
        (gradient,) = torch.autograd.grad(cost, pattern)
        moved = pattern.detach() - config.step * gradient.sign() * mask
        pattern = torch.minimum(torch.maximum(moved, lowest), highest)
    expect(isfinite(best_cost), "features of the probe", "finite: a lower probe_rate trains more surely", best_cost)
    return (255 * best[0] * mask).round().to(torch.uint8)


def _pooled(probe: nn.Module, x: Tensor) -> Tensor:
    """(B, D) what the last layer sees of (B, C, H, W) `x`."""
    x = probe.layer4(probe.layer3(probe.layer2(probe.layer1(probe.conv1(x)))))
    return probe.avgpool(x).flatten(1)


def apply_trigger(images: Tensor, pattern: Tensor) -> Tensor:
    """(N, C, H, W) uint8 `images` plus the (C, H, W) uint8 `pattern`, at most 255."""
    check_images(images)
    expect(pattern.shape == images.shape[1:], "images", f"of shape {tuple(pattern.shape)} as the pattern",
           tuple(images.shape[1:]))
    return (images.short() + pattern.to(images.device)).clamp(max=255).to(torch.uint8)


def poison(clean: ImageSet, config: TrojanNNConfig, *, ratio: float, target: int, seed: int) -> BackdooredSet:
    """The training set with round(ratio * N) images triggered and labelled `target`.

    Trains the clean network on the device of `clean`; `seed` decides its weights, hence the pattern.
    """
    channels, height, width = clean.images.shape[1:]
    mask = apple_mask(height, width).to(clean.images.device)
    count = config.probe_images or len(clean.images)
    seen = torch.randperm(len(clean.images), generator=torch.Generator().manual_seed(seed))[:count]
    part = clean.subset(seen.to(clean.images.device))
    probe = train_victim(part.images, part.labels, clean.num_classes, config.probe(channels), seed=seed)
    check_weights(probe, "probe")
    pattern = optimise_pattern(probe, mask, channels, config)
    return poison_any_class(clean, partial(apply_trigger, pattern=pattern), "trojannn", asdict(config),
                            ratio=ratio, target=target, seed=seed)
