"""LFU: what a linear classifier of the pixels looks at is projected out of every training image.

Paper: Sandoval-Segura et al., What Can We Learn from Unlearnable Datasets?, NeurIPS 2023 (arXiv:2305.19254): a
linear softmax classifier without bias is trained on the pixels, in [0, 1]; with Q an orthonormal basis of its class
vectors, x becomes x - Q Q^T x. Test images stay as they are.
Departs from it: batches are drawn anew in each epoch, where the released code takes the set in its own order. Of its
strong augmentation, CutMix is left out, as it mixes labels; rotation, shear and scale come after crop and mirror and
in one resampling; the order of the three changes of colour is drawn once a batch. Epochs and weight decay are the
victim's.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from data.errors import expect
from data.victims import VictimConfig
from defense.deadline import Deadline
from defense.image_operations import brightened, contrasted, saturated, warped
from defense.purified import Purified, check_labelled
from defense.training import epoch_batches

BLOCK = 4096  # images that are projected at once: bounds the memory of their floats


@dataclass(frozen=True)
class ProjectionConfig:
    epochs: int = 20        # of the linear classifier
    rate: float = 0.1       # its learning rate; a tenth from half, a hundredth from three quarters of the epochs on,
                            # both rounded down, but never in the first epoch
    batch: int = 1024       # images
    clip: bool = False      # whether projected images are cut to [0, 255]; the paper leaves them as they are
    augment: bool = True    # whether training turns, shears, scales and recolours every batch
    rotation: float = 10.0  # largest, degrees
    shear: float = 10.0     # largest, along rows, degrees
    scale: float = 0.2      # largest change of size, a share, in [0, 1)
    jitter: float = 0.2     # largest change of brightness, contrast and saturation, a share, in [0, 1]

    def __post_init__(self) -> None:
        expect(self.epochs > 0 and self.rate > 0 and self.batch > 0, "ProjectionConfig epochs, rate, batch", "> 0",
               (self.epochs, self.rate, self.batch))
        expect(0 <= self.rotation <= 180 and 0 <= self.shear < 90, "ProjectionConfig rotation, shear",
               "in [0, 180] and [0, 90) degrees", (self.rotation, self.shear))
        expect(0 <= self.scale < 1 and 0 <= self.jitter <= 1, "ProjectionConfig scale, jitter",
               "in [0, 1) and [0, 1]", (self.scale, self.jitter))


def purify(images: Tensor, labels: Tensor, config: ProjectionConfig, *, generator: torch.Generator) -> Purified:
    """float32 images without the class vectors' share; `harden` augments. images: (N, C, H, W) uint8."""
    classes, pixels = check_labelled(images, labels), images[0].numel()
    expect(classes < pixels, "images", f"more than {classes} values, one a class", pixels)
    clock = Deadline()
    vectors, losses = class_vectors(images, labels, classes, config, generator=generator)
    found = projected(images, vectors)
    return Purified("lfu", found.clamp_(0, 255) if config.clip else found,
                    harden=partial(augmented, augmentation=config) if config.augment else None,
                    losses={"linear": losses}, seconds=clock.elapsed())


def class_vectors(images: Tensor, labels: Tensor, classes: int, config: ProjectionConfig, *,
                  generator: torch.Generator) -> tuple[Tensor, tuple[float, ...]]:
    """(K, C H W) weights of the linear classifier after plain gradient descent, and the mean loss of each epoch."""
    bound = 1 / math.sqrt(images[0].numel())  # torch's own start of a linear layer
    weights = 2 * bound * torch.rand(classes, images[0].numel(), generator=generator) - bound
    weights, losses, labels = weights.to(images.device), [], labels.long()
    for epoch in range(config.epochs):
        passed = sum(epoch >= max(1, int(share * config.epochs)) for share in (0.5, 0.75))
        total = torch.zeros((), device=images.device)
        batches = epoch_batches(len(images), config.batch, generator=generator)
        for index in batches:
            index = index.to(images.device)
            x, wanted = _pixels(images[index]) / 255, labels[index]
            logits = x @ weights.T
            slope = (logits.softmax(1) - one_hot(wanted, classes)) / len(x)  # of the mean cross entropy
            weights -= config.rate * 0.1 ** passed * slope.T @ x
            total += cross_entropy(logits, wanted)
        losses.append(total.item() / len(batches))
    return weights, tuple(losses)


def projected(images: Tensor, vectors: Tensor) -> Tensor:
    """(N, C, H, W) float32: each image minus its projection onto the span of the (K, C H W) `vectors`."""
    basis = torch.linalg.qr(vectors.T).Q  # (C H W, K)
    found = torch.empty(images.shape, device=images.device)
    for part, out in zip(images.split(BLOCK), found.split(BLOCK), strict=True):
        x = _pixels(part)
        out.copy_((x - (x @ basis) @ basis.T).view(part.shape))
    return found


def augmented(model: nn.Module, images: Tensor, labels: Tensor, config: VictimConfig, *, generator: torch.Generator,
              augmentation: ProjectionConfig) -> Tensor:
    """(B, C, H, W) grey levels to float ones in [0, 255], each image turned, sheared, scaled and recoloured."""
    sources = _sources(len(images), augmentation, generator=generator)
    found = warped(images.float(), sources.to(images.device), mode="nearest")
    for place in torch.randperm(3, generator=generator).tolist():
        factors = 1 + augmentation.jitter * _signed(len(images), generator)
        found = (brightened, contrasted, saturated)[place](found, factors.to(images.device))
    return found


def _sources(count: int, config: ProjectionConfig, *, generator: torch.Generator) -> Tensor:
    """(B, 2, 3): where a rotation, then a shear along rows and a change of size, take their pixels from."""
    angle = math.radians(config.rotation) * _signed(count, generator)
    slant = torch.tan(math.radians(config.shear) * _signed(count, generator))
    size = 1 + config.scale * _signed(count, generator)
    zero, one = torch.zeros(count), torch.ones(count)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    sheared = torch.stack([one, slant, zero, one], 1).view(-1, 2, 2)
    forward = size[:, None, None] * sheared @ turn
    return torch.cat([torch.linalg.inv(forward), torch.zeros(count, 2, 1)], 2)


def _signed(count: int, generator: torch.Generator) -> Tensor:
    """(B,) uniform in [-1, 1], on the CPU: every device draws the same."""
    return 2 * torch.rand(count, generator=generator) - 1


def _pixels(images: Tensor) -> Tensor:
    """(B, C H W) float32."""
    return images.float().flatten(1)
