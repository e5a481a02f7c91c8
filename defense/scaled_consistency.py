"""SPC and MSPC: training images whose class stays when their brightness is multiplied carry a trigger, it is said.

SPC: Guo et al., SCALE-UP, ICLR 2023, arXiv:2302.03251: the share of scales at which a network that was trained on the
poisoned set gives the scaled image, clipped to [0, 1], the class of the image. MSPC: Pal et al., Backdoor Secrets
Unveiled: Identifying Backdoor Data with Optimized Scaled Prediction Consistency, ICLR 2024, arXiv:2403.10717: images
are darkened by a shift first, so that clean ones lose their class, and masked by one mask that is learned, in turns
with the choice of the suspects, so that the suspects keep theirs with as little of the image as can be. No clean image
and no threshold are needed: suspects are the images with a score above zero. Settings and order as in the released
code, whose shift is 0.1 in its script and 0.2 as its default.
Departs from it: everything is computed in the model's own precision, there in 16 bits.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.errors import expect
from defense.given import evaluation

Normalise = Callable[[Tensor], Tensor]  # from images in [0, 1] to what the model takes, (B, C, H, W) both
SCALES = tuple(range(2, 13))


@dataclass(frozen=True)
class ConsistencyConfig:
    scales: tuple[float, ...] = SCALES
    batch: int = 1000  # images at a time

    def __post_init__(self) -> None:
        _check_scales(self.scales, "ConsistencyConfig.scales")
        expect(self.batch > 0, "ConsistencyConfig.batch", "> 0", self.batch)


@dataclass(frozen=True)
class MaskedConsistencyConfig:
    scales: tuple[float, ...] = SCALES
    shift: float = 0.1         # tau: taken from every pixel before it is masked and scaled, in [0, 1)
    rounds: int = 4            # of learning the mask and choosing the suspects anew
    epochs: int = 10           # of learning the mask, each round
    batch: int = 1000          # images at most
    rate: float = 0.1          # SGD on the mask
    momentum: float = 0.9
    decay: float = 5e-4        # of the mask
    sparsity: float = 0.01     # weight of the mask's sum

    def __post_init__(self) -> None:
        where = "MaskedConsistencyConfig"
        _check_scales(self.scales, f"{where}.scales")
        expect(0 <= self.shift < 1, f"{where}.shift", "in [0, 1)", self.shift)
        expect(self.rounds > 0 and self.epochs > 0 and self.batch > 0, f"{where} rounds, epochs, batch", "> 0",
               (self.rounds, self.epochs, self.batch))
        expect(self.rate > 0 and 0 <= self.momentum < 1, f"{where} rate, momentum", "> 0, in [0, 1)",
               (self.rate, self.momentum))
        expect(self.decay >= 0 and self.sparsity >= 0, f"{where} decay, sparsity", ">= 0",
               (self.decay, self.sparsity))


def _check_scales(scales: tuple[float, ...], where: str) -> None:
    rising = list(scales) == sorted(set(scales))
    expect(scales and rising and scales[0] > 1, where, "rising numbers > 1", scales)


@dataclass(frozen=True)
class MaskedScores:
    """scores: (N,) in [-1, 1], higher = more suspicious; above zero = suspect. mask: (H, W) in [0, 1], last learned.

    first: (N,) scores that chose the suspects of the first round, without a mask.
    """

    scores: Tensor
    mask: Tensor
    first: Tensor


def scaled_consistency(model: nn.Module, images: Tensor, config: ConsistencyConfig, *,
                       normalise: Normalise | None = None) -> Tensor:
    """SPC: (N,) shares of the scales that keep an image's class, in [0, 1]; higher = more suspicious.

    model: trained on these images; it stays as it is and works in evaluation mode. images: (N, C, H, W) float in
    [0, 1], as they were trained on, without the normalisation, which `normalise` does after scaling.
    """
    _check_images(images)
    return _kept(model, images, lambda part: part, config.scales, config.batch, normalise)


def masked_scaled_consistency(model: nn.Module, images: Tensor, config: MaskedConsistencyConfig, *,
                              normalise: Normalise | None = None) -> MaskedScores:
    """MSPC: scores of the images and the mask that made them: see `scaled_consistency`. No randomness."""
    _check_images(images)
    network = _Network(model, normalise)
    mask = torch.ones(images.shape[2:], device=network.device, dtype=network.dtype)
    first = _agreement(model, images, mask, config, normalise)
    scores, optimiser = first, torch.optim.SGD([mask], config.rate, config.momentum, weight_decay=config.decay)
    with evaluation(model):
        for _ in range(config.rounds):
            for _ in range(config.epochs):
                for part, suspects in zip(images.split(config.batch), (scores > 0).split(config.batch), strict=True):
                    mask.grad = mask_gradient(network, part, suspects, mask, config)
                    optimiser.step()
                    mask.clamp_(0, 1)
            scores = _agreement(model, images, mask, config, normalise)
    return MaskedScores(scores, mask, first)


class _Network:
    """(B, K) logits of (B, C, H, W) images in [0, 1], wherever and in whatever precision the model works."""

    def __init__(self, model: nn.Module, normalise: Normalise | None) -> None:
        first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self.model, self.normalise, self.device, self.dtype = model, normalise, first.device, first.dtype

    def place(self, images: Tensor) -> Tensor:
        return images.to(self.device, self.dtype)

    def __call__(self, images: Tensor) -> Tensor:
        return self.model(self.normalise(images) if self.normalise else images)


def mask_gradient(network: Callable[[Tensor], Tensor], images: Tensor, suspects: Tensor, mask: Tensor,
                  config: MaskedConsistencyConfig) -> Tensor:
    """(H, W) gradient of the mask's loss on a batch: for the suspects (B,), the Kullback-Leibler divergence of the
    scaled image's classes from the image's, mean over batch and scales; plus `sparsity` times the mask's sum."""
    total = torch.full_like(mask, config.sparsity) * mask.sign()
    if not suspects.any():
        return total
    images = network.place(images[suspects.to(images.device)]) if isinstance(network, _Network) else images[suspects]
    share = len(images) / len(suspects) / len(config.scales)
    with torch.no_grad():
        wanted = network(images).log_softmax(1)
    mask = mask.detach().requires_grad_()
    for scale in config.scales:
        found = network((scale * (images - config.shift) * mask).clamp(0, 1)).log_softmax(1)
        divergence = (wanted.exp() * (wanted - found)).sum(1).mean()
        total += share * torch.autograd.grad(divergence, mask)[0]
    return total


def _agreement(model: nn.Module, images: Tensor, mask: Tensor, config: MaskedConsistencyConfig,
               normalise: Normalise | None) -> Tensor:
    """(N,) share of scales that keep the class minus share that do not, of shifted and masked images."""
    kept = _kept(model, images, lambda part: (part - config.shift) * mask, config.scales, config.batch, normalise)
    return 2 * kept - 1


@torch.no_grad()
def _kept(model: nn.Module, images: Tensor, prepare: Callable[[Tensor], Tensor], scales: tuple[float, ...],
          batch: int, normalise: Normalise | None) -> Tensor:
    """(N,) float32, on the images' device: share of the scales at which the prepared image, scaled and clipped, has
    the class of the image as it is."""
    network, found = _Network(model, normalise), []
    with evaluation(model):
        for part in images.split(batch):
            part = network.place(part)
            classes = network(part).argmax(1)
            kept = [network((scale * prepare(part)).clamp(0, 1)).argmax(1) == classes for scale in scales]
            found.append(torch.stack(kept).float().mean(0))
    return torch.cat(found).to(images.device)


def _check_images(images: Tensor) -> None:
    expect(images.ndim == 4 and images.is_floating_point(), "images", "(N, C, H, W) of floating point",
           f"{tuple(images.shape)} {images.dtype}")
    expect(len(images) > 0, "images", "at least one", 0)
    lowest, highest = images.min().item(), images.max().item()
    expect(lowest >= 0 and highest <= 1, "images", "in [0, 1], before the normalisation", f"{lowest} to {highest}")
