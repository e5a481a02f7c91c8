"""Training the small classifiers that end up, clean or backdoored, in a model zoo.

The set lies on the training device as uint8; a batch is an index, a random crop (4 pixels of black around
the image) and, where mirrored images keep their class, a flip. SGD with momentum, cosine schedule to zero,
the last epoch's weights: nothing is selected on test data.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from data.errors import expect
from data.image_sets import ImageSet
from data.preact_resnet import new_model

EVALUATION_BATCH = 512


@dataclass(frozen=True)
class VictimConfig:
    widths: tuple[int, ...] = (64, 128, 256, 512)  # of the four stages
    epochs: int = 100
    batch: int = 128           # images; a last, partial batch is dropped where there are others
    rate: float = 0.01         # learning rate at the start
    momentum: float = 0.9
    decay: float = 5e-4        # weight decay
    crop: int = 4              # pixels of black around the image before the random crop
    flip: bool = False         # mirror left and right: for objects, never for digits and signs
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of the normalisation, in [0, 1]
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        expect(self.epochs > 0 and self.batch > 1, "VictimConfig epochs, batch", "> 0, > 1",
               (self.epochs, self.batch))
        expect(self.rate > 0, "VictimConfig.rate", "> 0", self.rate)
        expect(self.crop >= 0, "VictimConfig.crop", ">= 0 pixels", self.crop)
        expect(len(self.mean) == len(self.std) and min(self.std) > 0, "VictimConfig mean, std",
               "one each a channel, std > 0", (self.mean, self.std))


def train_victim(images: Tensor, labels: Tensor, num_classes: int, config: VictimConfig, *, seed: int,
                 progress: Callable[[str], None] | None = None) -> nn.Module:
    """A PreActResNet18 trained on (N, C, H, W) uint8 `images`, on their device; evaluation mode.

    Equal input, config and seed give equal weights on one machine with one thread count.
    """
    expect(len(config.mean) == images.shape[1], "VictimConfig.mean", f"{images.shape[1]} channels",
           len(config.mean))
    generator = torch.Generator().manual_seed(seed)
    model = new_model(num_classes, config.widths, images.shape[1], seed=seed)
    model = model.to(images.device, memory_format=torch.channels_last).train()
    batches = max(1, len(images) // config.batch)
    optimiser = torch.optim.SGD(model.parameters(), config.rate, config.momentum, weight_decay=config.decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.epochs * batches)
    for epoch in range(config.epochs):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        total = torch.zeros((), device=images.device)
        for index in order[:batches * config.batch].chunk(batches):
            x = normalise(augment(images[index], config, generator=generator), config)
            loss = cross_entropy(model(x), labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.detach()
        if progress:
            progress(f"epoch {epoch + 1}/{config.epochs}: loss {total.item() / batches:.4f}")
    return model.eval()


def augment(images: Tensor, config: VictimConfig, *, generator: torch.Generator) -> Tensor:
    """(B, C, H, W) uint8, each image shifted by up to `crop` pixels (black comes in) and perhaps mirrored."""
    count, _, height, width = images.shape
    draws = torch.randint(0, 2 * config.crop + 1, (2, count, 1), generator=generator).to(images.device)
    rows = draws[0] + torch.arange(height, device=images.device)     # (B, H)
    columns = draws[1] + torch.arange(width, device=images.device)   # (B, W)
    if config.flip:
        mirrored = torch.rand(count, 1, generator=generator).to(images.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = pad(images, (config.crop,) * 4)
    at = torch.arange(count, device=images.device)[:, None, None]
    shifted = padded[at, :, rows[:, :, None], columns[:, None, :]]   # (B, H, W, C)
    return shifted.permute(0, 3, 1, 2)


def normalise(images: Tensor, config: VictimConfig) -> Tensor:
    """uint8 to float, as ToTensor and Normalize do: (images / 255 - mean) / std; channels last."""
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
