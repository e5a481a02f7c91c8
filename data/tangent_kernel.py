"""NTGA: perturbations of training images under which an infinitely wide network predicts other images badly.

Paper: Yuan and Wu, Neural Tangent Generalization Attacks, ICML 2021, arXiv:2102.12470. Such a network, trained by
gradient flow on the squared error, is a kernel method (Lee et al., NeurIPS 2019, arXiv:1902.06720), so its predictions
for images held out are a formula in the training images, whose gradient is followed upwards. The set is altered block
by block. The network: two convolutions with ReLU, flattened, three dense layers without.
Departs from it: the held-out images are altered too, judged by others. Departs from the released code: the steps
really follow each other (`iterated`), where that code begins every step at the clean images with the whole radius, so
that all of them together are one; a remainder smaller than a block is altered with the rest, not left out.
Memory beside the images: as much again for their perturbations (154 MB for 50,000 of 3 x 32 x 32, 7.5 GB of
3 x 224 x 224), twice that beyond a radius of 127.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, pad, unfold

from data.error_minimising import bounded, check_descent, within
from data.errors import expect
from data.image_sets import ImageSet
from data.poisoned_sets import PoisonedSet
from data.unlearnable_sets import drawn_positions, level_type, perturbed_set

TILE = 1 << 22    # numbers of one map (positions x images x other images) that are computed at once
SAME = 1 - 1e-6   # cosine above which two patches count as equal: there the angle's slope has no bound
CLOSE = 1e-4      # eigenvalues that differ by a smaller share have the slope as their divided difference


@dataclass(frozen=True)
class TangentKernelConfig:
    radius: float = 8.0            # largest change of a pixel, grey levels
    steps: int = 10                # of signed ascent
    reach: float = 1.1             # of all steps together, in radii
    iterated: bool = True          # False: one step of the whole radius, which is what the released code computes
    time: float = 8.0              # of the gradient flow, at rate 1 on the mean over images and classes of error^2 / 2
    block: int = 512               # images that are altered together, at most
    validation: int = 10_000       # images held out, at most half of them all
    regulariser: float = 1e-4      # added to the kernel's diagonal, in means of it
    side: int = 5                  # of a convolution's window, pixels
    stride: int = 2                # of both convolutions
    weight_variance: float = 1.76  # at the start, times the inputs of a unit
    bias_variance: float = 0.18

    def __post_init__(self) -> None:
        expect(self.steps > 0 and self.reach > 0, "TangentKernelConfig steps, reach", "> 0", (self.steps, self.reach))
        check_descent(self)
        expect(0 < self.time < math.inf, "TangentKernelConfig.time", "> 0 and finite", self.time)
        expect(self.block > 0 and self.validation > 0, "TangentKernelConfig block, validation", "> 0 images",
               (self.block, self.validation))
        expect(self.regulariser > 0, "TangentKernelConfig.regulariser", "> 0", self.regulariser)
        expect(self.side > 0 and self.stride > 0, "TangentKernelConfig side, stride", "> 0 pixels",
               (self.side, self.stride))
        expect(self.weight_variance > 0 and self.bias_variance > 0, "TangentKernelConfig variances", "> 0",
               (self.weight_variance, self.bias_variance))

    @property
    def step(self) -> float:
        """Grey levels that a pixel moves at once."""
        return self.reach * self.radius / self.steps if self.iterated else self.radius


def budgeted() -> TangentKernelConfig:
    """Small blocks, few held-out images and one step, for a CPU."""
    return TangentKernelConfig(block=256, validation=256, iterated=False)


def poison(clean: ImageSet, config: TangentKernelConfig, *, ratio: float, seed: int) -> PoisonedSet:
    """round(ratio * N) of the images altered by at most `radius`, as they are when all are altered."""
    positions = drawn_positions(clean, ratio, seed=seed)
    noise = tangent_noise(clean, config, seed=seed)
    return perturbed_set(clean, positions, lambda images, at: within(images, noise[at], config.radius), "ntga",
                         asdict(config), seed=seed)


def tangent_noise(clean: ImageSet, config: TangentKernelConfig, *, seed: int,
                  progress: Callable[[str], None] | None = None) -> Tensor:
    """(N, C, H, W) int8 or int16 perturbations in whole grey levels, within the radius."""
    expect(len(clean.images) > 1, f"{clean.name} images", "at least two", len(clean.images))
    noise = torch.empty(clean.images.shape, device=clean.images.device, dtype=level_type(config.radius))
    blocks = list(_blocks(len(clean.images), config, seed=seed))
    for done, (index, judges) in enumerate(blocks, 1):
        index, judges = index.to(clean.images.device), judges.to(clean.images.device)
        found = ascended(clean.subset(index), clean.subset(judges), config)
        noise[index] = found.round().to(noise.dtype)  # as `within` would round it: nothing is lost
        if progress:
            progress(f"block {done}/{len(blocks)}")
    return noise


def _blocks(count: int, config: TangentKernelConfig, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions of a block's images and of those that judge it; the blocks hold every position once."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = min(config.validation, count // 2)
    for altered, judges in ((order[held:], order[:held]), (order[:held], order[held:2 * held])):
        for index in altered.tensor_split(math.ceil(len(altered) / config.block)):
            yield index, judges


def ascended(block: ImageSet, judges: ImageSet, config: TangentKernelConfig) -> Tensor:
    """(N, C, H, W) perturbation of the block's images that raises the loss of those trained on them at the judges."""
    images, others = block.images.float(), judges.images.float() / 255
    targets = one_hot(block.labels, block.num_classes).double()
    noise = torch.zeros_like(images)
    for _ in range(config.steps if config.iterated else 1):
        x = (images + noise) / 255
        own, cross = kernel(x, x, config), kernel(others, x, config)
        _, by_own, by_cross = judged(own.double(), cross.double(), targets, judges.labels, config)
        gradient = 2 * pulled_back(x, x, by_own, config) + pulled_back(x, others, by_cross.T, config)
        noise = bounded(noise + config.step * gradient.sign(), images, config.radius)
    return noise


def judged(own: Tensor, cross: Tensor, targets: Tensor, labels: Tensor,
           config: TangentKernelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross-entropy at M judges of the prediction after training on N images, and its gradients.

    own: (N, N) kernel of the training images; cross: (M, N) of judges and training images; targets: (N, K) one-hot;
    labels: (M,) of the judges; all float64. The gradients are by own, as a symmetric matrix, and by cross. Prediction:
    cross g(own) targets with g(v) = (1 - exp(-v t / NK)) / v (arXiv:1902.06720, Eq. 10 and 11, outputs 0 at the
    start).
    """
    pace = config.time / targets.numel()
    ridge = config.regulariser * torch.eye(len(own), dtype=own.dtype, device=own.device)
    values, vectors = torch.linalg.eigh(own + own.diagonal().mean() * ridge)
    seen = vectors.T @ targets                                               # (N, K)
    coefficients = vectors @ (_shrunk(values, pace)[:, None] * seen)         # (N, K)
    logits = cross @ coefficients                                            # (M, K)
    loss = cross_entropy(logits, labels, reduction="sum")
    residual = logits.softmax(1) - one_hot(labels, targets.shape[1])         # (M, K)
    inner = vectors.T @ (cross.T @ residual) @ seen.T                        # (N, N)
    by_own = vectors @ (_divided(values, pace) * inner) @ vectors.T
    by_own = (by_own + by_own.T) / 2
    by_own = by_own + by_own.diagonal().mean() * ridge                       # the ridge grows with the diagonal
    return loss, by_own, residual @ coefficients.T


def _shrunk(values: Tensor, pace: float) -> Tensor:
    """g of the eigenvalues."""
    return -torch.expm1(-values * pace) / values


def _divided(values: Tensor, pace: float) -> Tensor:
    """(N, N) (g(v_i) - g(v_j)) / (v_i - v_j), the slope of g where the two are close (Daleckii and Krein)."""
    gap = values[:, None] - values[None, :]
    middle = (values[:, None] + values[None, :]) / 2
    slope = (middle * pace * torch.exp(-middle * pace) + torch.expm1(-middle * pace)) / middle.square()
    found = _shrunk(values, pace)
    close = gap.abs() < CLOSE * middle
    return torch.where(close, slope, (found[:, None] - found[None, :]) / torch.where(close, 1.0, gap))


@torch.no_grad()
def kernel(x: Tensor, others: Tensor, config: TangentKernelConfig) -> Tensor:
    """(N, M) tangent kernel of (N, C, H, W) and (M, C, H, W) float images in [0, 1], tile by tile."""
    found = x.new_empty(len(x), len(others))
    for rows, columns in _tiles(x, others, config):
        found[rows, columns] = tangent_kernel(x[rows], others[columns], config)
    return found


def pulled_back(x: Tensor, others: Tensor, weights: Tensor, config: TangentKernelConfig) -> Tensor:
    """Gradient by `x` of the sum of weights * kernel(x, others), `others` being constants: the shape of `x`."""
    gradient = torch.zeros_like(x)
    for rows, columns in _tiles(x, others, config):
        part = x[rows].detach().requires_grad_(True)
        found = tangent_kernel(part, others[columns].detach(), config)
        gradient[rows] += torch.autograd.grad(found, part, weights[rows, columns].to(found.dtype))[0]
    return gradient


def _tiles(x: Tensor, others: Tensor, config: TangentKernelConfig) -> Iterator[tuple[slice, slice]]:
    positions = math.prod(math.ceil(n / config.stride) for n in x.shape[2:])
    side = max(1, math.isqrt(TILE // positions))
    for row, column in product(range(0, len(x), side), range(0, len(others), side)):
        yield slice(row, row + side), slice(column, column + side)


def tangent_kernel(x: Tensor, others: Tensor, config: TangentKernelConfig) -> Tensor:
    """(N, M) tangent kernel of one output of the infinitely wide network; images as for `kernel`.

    Only covariances of equal positions are needed, as the read-out is flat (Arora et al., NeurIPS 2019,
    arXiv:1904.11955, Section 4). The maps are (P, N, M) with P positions: `covariance` of a layer's units and their
    tangent kernel; `left` (P, N, 1) and `right` (P, 1, M) are the variances of either image's units.
    """
    weight, bias = config.weight_variance, config.bias_variance
    a, b = windows(x, config), windows(others, config)                        # (P, N, D), (P, M, D)
    share = weight / a.shape[2]
    covariance = share * a @ b.transpose(1, 2) + bias
    left = share * a.square().sum(2, keepdim=True) + bias
    right = share * b.square().sum(2, keepdim=True).transpose(1, 2) + bias
    covariance, tangent = rectified(covariance, covariance, left, right)
    mean = _window_means(x, config)
    left, right, covariance = (weight * _at_windows(mean, m) + bias for m in (left / 2, right / 2, covariance))
    covariance, tangent = rectified(covariance, weight * _at_windows(mean, tangent) + covariance, left, right)
    covariance, tangent = covariance.mean(0), tangent.mean(0)
    for _ in range(3):
        covariance = weight * covariance + bias
        tangent = weight * tangent + covariance
    return tangent


def rectified(covariance: Tensor, tangent: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps after ReLU, by the arc-cosine formulas (Cho and Saul, NeurIPS 2009).

    The new covariance's slopes by the old one and by the deviations' product are (pi - angle) / 2 pi and
    sin(angle) / 2 pi: the terms of its sum, so that these factors need no gradients of their own.
    """
    deviations = (left * right).sqrt()
    cosine = covariance / deviations
    same = cosine > SAME
    angle = cosine.clamp(-SAME, SAME).acos().masked_fill(same, 0.0)
    share = (math.pi - angle) / (2 * math.pi)
    rest = angle.detach().sin() / (2 * math.pi)
    return share.detach() * covariance + rest * deviations, share * tangent


def windows(images: Tensor, config: TangentKernelConfig) -> Tensor:
    """(P, N, C * side^2): what each of the P = ceil(H / stride) * ceil(W / stride) windows sees, black outside.

    An odd pixel of border goes to the right and the bottom.
    """
    borders = []
    for size in reversed(images.shape[2:]):
        border = max((math.ceil(size / config.stride) - 1) * config.stride + config.side - size, 0)
        borders += [border // 2, border - border // 2]
    return unfold(pad(images, borders), config.side, stride=config.stride).permute(2, 0, 1)


def _window_means(images: Tensor, config: TangentKernelConfig) -> Tensor:
    """(P2, P) matrix that takes maps of the first convolution's P positions to means over the second's windows."""
    height, width = (math.ceil(n / config.stride) for n in images.shape[2:])
    single = torch.eye(height * width, dtype=images.dtype, device=images.device).view(-1, 1, height, width)
    return windows(single, config).mean(2)


def _at_windows(mean: Tensor, maps: Tensor) -> Tensor:
    """(P, ...) maps to (P2, ...)."""
    return (mean @ maps.flatten(1)).view(-1, *maps.shape[1:])
