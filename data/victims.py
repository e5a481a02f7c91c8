"""Training the small classifiers that end up, clean or backdoored, in a model zoo.

The set lies on the training device as uint8; a batch is an index, a random crop (4 pixels of black around
the image) and, where mirrored images keep their class, a flip. SGD with momentum, warm-up, cosine schedule to zero,
the last epoch's weights: nothing is selected on test data. With a `radius` every batch is first moved to where
its loss is largest (projected gradient ascent; Madry et al., ICLR 2018, arXiv:1706.06083, Eq. 2.1).
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data.augmentation import shifted
from data.devices import PRECISIONS, autocast
from data.errors import expect
from data.image_sets import ImageSet
from data.preact_resnet import new_model

EVALUATION_BATCH = 512
Network = Callable[..., nn.Module]  # (num_classes, widths, in_channels, *, seed) to a new network
Hardening = Callable[..., Tensor]   # (model, (B, C, H, W) images, (B,) labels, config, *, generator) to such images


@dataclass(frozen=True)
class VictimConfig:
    widths: tuple[int, ...] = (64, 128, 256, 512)  # of the four stages
    epochs: int = 100
    batch: int = 128           # images; a last, partial batch is dropped where there are others
    rate: float = 0.01         # highest learning rate
    warm_up: float = 0.0       # share of all steps in which the rate rises linearly; then half a cosine to zero
    clip: float = 5.0          # largest norm of a step's gradient: the network has no norm before its pool, and a
                               # narrow one can blow up on triggered images and lose the clean ones for good
    momentum: float = 0.9
    decay: float = 5e-4        # weight decay
    crop: int = 4              # pixels of black around the image before the random crop
    flip: bool = False         # mirror left and right: for objects, never for digits and signs
    radius: float = 0.0        # of adversarial training: largest change of a pixel, grey levels; 0 = ordinary
    ascents: int = 5           # its gradient steps a batch, each of 2.5 * radius / ascents
    precision: str = "auto"    # float32, bfloat16 (autocast), or auto: bfloat16 on a GPU, else float32
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of the normalisation, in [0, 1]
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        expect(self.epochs > 0 and self.batch > 1, "VictimConfig epochs, batch", "> 0, > 1",
               (self.epochs, self.batch))
        expect(self.rate > 0 and self.clip > 0, "VictimConfig rate, clip", "> 0", (self.rate, self.clip))
        expect(0 <= self.warm_up < 1, "VictimConfig.warm_up", "in [0, 1)", self.warm_up)
        expect(self.crop >= 0, "VictimConfig.crop", ">= 0 pixels", self.crop)
        expect(self.radius >= 0 and self.ascents > 0, "VictimConfig radius, ascents", ">= 0, > 0",
               (self.radius, self.ascents))
        expect(self.precision in PRECISIONS, "VictimConfig.precision", f"one of {', '.join(PRECISIONS)}",
               self.precision)
        expect(len(self.mean) == len(self.std) and min(self.std) > 0, "VictimConfig mean, std",
               "one each a channel, std > 0", (self.mean, self.std))


def train_victim(images: Tensor, labels: Tensor, num_classes: int, config: VictimConfig, *, seed: int,
                 network: Network = new_model, harden: Hardening | None = None,
                 progress: Callable[[str], None] | None = None,
                 after_epoch: Callable[[int, nn.Module], None] | None = None) -> nn.Module:
    """A network trained on (N, C, H, W) `images`, uint8 or float grey levels, on their device; evaluation mode.

    network: makes it, a PreActResNet18 unless given. harden: changes every augmented batch before the step; else,
    with a radius, `hardened` does. after_epoch: is shown the number of epochs done, from 1 on, and the network in
    training mode, which it leaves as it is. Equal input, config and seed give equal weights on one machine with one
    thread count.
    """
    expect(len(config.mean) == images.shape[1], "VictimConfig.mean", f"{images.shape[1]} channels",
           len(config.mean))
    generator = torch.Generator().manual_seed(seed)
    harden = harden or (hardened if config.radius else None)
    model = network(num_classes, config.widths, images.shape[1], seed=seed)
    model = model.to(images.device, memory_format=torch.channels_last).train()
    batches = max(1, len(images) // config.batch)
    optimiser = torch.optim.SGD(model.parameters(), config.rate, config.momentum, weight_decay=config.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(_share_of_rate, config, config.epochs * batches))
    for epoch in range(config.epochs):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        total = torch.zeros((), device=images.device)
        for index in order[:batches * config.batch].chunk(batches):
            x = augment(images[index], config, generator=generator)
            if harden:
                x = harden(model, x, labels[index], config, generator=generator)
            loss = _loss(model, x, labels[index], config)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimiser.step()
            schedule.step()
            total += loss.detach()
        if progress:
            progress(f"epoch {epoch + 1}/{config.epochs}: loss {total.item() / batches:.4f}")
        if after_epoch:
            after_epoch(epoch + 1, model)
    return model.eval()


def check_weights(network: nn.Module, what: str) -> None:
    """Without this, an attack whose network blew up would silently change next to nothing: the sign of NaN is 0."""
    finite = all(value.isfinite().all() for value in network.state_dict().values())
    expect(finite, f"weights of the {what}", "finite: a lower rate trains more surely", "NaN or infinite values")


def _share_of_rate(config: VictimConfig, steps: int, step: int) -> float:
    """Of the highest rate, in [0, 1]: a linear rise, times half a cosine over all steps."""
    rising = min(1.0, (step + 1) / max(1, round(config.warm_up * steps)))
    return rising * (1 + math.cos(math.pi * step / steps)) / 2


def _loss(model: nn.Module, images: Tensor, labels: Tensor, config: VictimConfig) -> Tensor:
    return cross_entropy(outputs(model, images, config), labels)


def outputs(network: Callable[[Tensor], Tensor], images: Tensor, config: VictimConfig) -> Tensor:
    """Float, what a network (or a part of one) makes of (B, C, H, W) grey levels, in the config's precision."""
    return answered(network, normalise(images, config), config.precision)


def answered(network: Callable[[Tensor], Tensor], x: Tensor, precision: str) -> Tensor:
    """Float, what a network makes of (B, C, H, W) float `x`, which it sees as it is, in one of `PRECISIONS`."""
    with autocast(x.device, precision):
        found = network(x)
    return found.float()


def hardened(model: nn.Module, images: Tensor, labels: Tensor, config: VictimConfig, *,
             generator: torch.Generator) -> Tensor:
    """(B, C, H, W) float in [0, 255]: each image moved within `radius` to where its loss is largest.

    Random start, then `ascended` in `ascents` steps of 2.5 * radius / ascents.
    """
    centre = images.float()
    start = 2 * torch.rand(images.shape, generator=generator) - 1  # drawn on the CPU: every device draws the same
    moved = (centre + config.radius * start.to(images.device)).clamp(0, 255)
    return ascended(model, moved, centre, labels, config, radius=config.radius,
                    step=2.5 * config.radius / config.ascents, steps=config.ascents)


def ascended(model: nn.Module, start: Tensor, centre: Tensor, labels: Tensor, config: VictimConfig, *, radius: float,
             step: float, steps: int) -> Tensor:
    """(B, C, H, W) float in [0, 255]: `start` after `steps` sign steps of the loss's gradient, each of `step` grey
    levels and then projected onto the cube of `radius` around `centre` and onto the grey levels.

    The model works with its running statistics and is in training mode again afterwards.
    """
    moved = start.detach().clone()  # it is marked for gradients
    model.eval()
    for _ in range(steps):
        moved.requires_grad_(True)
        (gradient,) = torch.autograd.grad(_loss(model, moved, labels, config), moved)
        moved = moved.detach() + step * gradient.sign()
        moved = torch.minimum(torch.maximum(moved, centre - radius), centre + radius).clamp(0, 255)
    model.train()
    return moved.detach()


def augment(images: Tensor, config: VictimConfig, *, generator: torch.Generator) -> Tensor:
    """(B, C, H, W) uint8, each image shifted by up to `crop` pixels (black comes in) and perhaps mirrored."""
    return shifted(images, config.crop, mirror=config.flip, border="constant", generator=generator)


def normalise(images: Tensor, config: VictimConfig) -> Tensor:
    """Grey levels to float, as ToTensor and Normalize do: (images / 255 - mean) / std; channels last."""
    mean = torch.tensor(config.mean, device=images.device)[:, None, None]
    std = torch.tensor(config.std, device=images.device)[:, None, None]
    x = images.float().contiguous(memory_format=torch.channels_last)
    return (x / 255 - mean) / std


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, config: VictimConfig) -> Tensor:
    """(N,) predicted classes of uint8 images. The model must be in evaluation mode."""
    return torch.cat([model(normalise(part, config)).argmax(1) for part in images.split(EVALUATION_BATCH)])


def clean_accuracy(model: nn.Module, test: ImageSet, config: VictimConfig) -> float:
    """ACC: share of test images, as they are, that get their true class; in [0, 1]."""
    return (predict(model, test.images, config) == test.labels).double().mean().item()


def attack_success(model: nn.Module, test: ImageSet, config: VictimConfig,
                   trigger: Callable[[Tensor], Tensor], target: int) -> float:
    """ASR: share of the triggered test images of all other classes that get the target's; in [0, 1]."""
    others = test.images[test.labels != target]
    expect(len(others) > 0, "test images", f"some of another class than {target}", "none")
    return (predict(model, trigger(others), config) == target).double().mean().item()
