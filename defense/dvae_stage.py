"""One stage of D-VAE: the loss, the training of a network on a poisoned set, what it makes of the set.

Loss: arXiv:2405.01460, Eq. 14, as the released code normalises it: squared errors are means over all numbers; the
rate is in nats a latent position, so its limit bounds the information an image may keep whatever its size.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from data.devices import PRECISIONS, autocast, device_generator
from data.errors import expect
from defense.deadline import Deadline
from defense.dvae_network import DVAE, Disentangled, NetworkConfig, new_dvae
from defense.training import Training, batch_count, run_epochs

TERMS = ("image", "both", "rate", "power")


@dataclass(frozen=True)
class StageConfig:
    epochs: int = 60
    rate_limit: float = 1.0      # nats a latent position up to which the code costs nothing (kld_1, kld_2)
    weight: float = 0.01         # of the rate beyond the limit (lambda)
    power: float = 0.002         # mean square of a perturbation, pixels in [0, 1], from which on it costs; 0 = never.
                                 # Not in the paper, in the released code: a perturbation is to stay small
    power_from: int = 11         # first epoch, from 0, that counts it
    clamp: bool = True           # image plus perturbation cut to [0, 1] before it is compared (released code)
    batch: int = 128             # images
    rate: float = 5e-3           # of Adam; half a cosine to zero, a step an epoch
    clip: float = 5.0            # largest norm of a step's gradient
    precision: str = "auto"      # float32, bfloat16 (autocast), or auto: bfloat16 on a GPU, else float32
    network: NetworkConfig = field(default_factory=NetworkConfig)

    def __post_init__(self) -> None:
        expect(self.epochs > 0 and self.batch > 1, "StageConfig epochs, batch", "> 0, > 1", (self.epochs, self.batch))
        expect(self.rate_limit >= 0 and self.weight >= 0, "StageConfig rate_limit, weight", ">= 0",
               (self.rate_limit, self.weight))
        expect(self.power >= 0 and self.power_from >= 0, "StageConfig power, power_from", ">= 0",
               (self.power, self.power_from))
        expect(self.rate > 0 and self.clip > 0, "StageConfig rate, clip", "> 0", (self.rate, self.clip))
        expect(self.precision in PRECISIONS, "StageConfig.precision",
               "auto, float32 or bfloat16", self.precision)


def loss_terms(found: Disentangled, images: Tensor, config: StageConfig, epoch: int) -> Tensor:
    """(4,) the terms named in `TERMS`, weighted; their sum is the loss. images: (B, C, H, W) float in [0, 1]."""
    both = found.image + found.perturbation
    rate = nats(found.mean, found.log_variance)
    power = found.perturbation.square().mean()
    counted = power.clamp_min(config.power) if config.power and epoch >= config.power_from else torch.zeros_like(power)
    return torch.stack([mse_loss(found.image, images), mse_loss(both.clamp(0, 1) if config.clamp else both, images),
                        config.weight * rate.clamp_min(config.rate_limit), counted])


def nats(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(code || standard normal) in nats, summed over the (B, latent, h, w) channels, mean over positions."""
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()


@dataclass(frozen=True)
class Stage:
    """A trained network in evaluation mode. losses: mean of each epoch by term.

    finite: False where an epoch gave NaN or infinity (it is undone). complete: all epochs were run.
    """

    model: DVAE
    losses: dict[str, tuple[float, ...]]
    finite: bool
    complete: bool


def train_stage(images: Tensor, labels: Tensor, num_classes: int, config: StageConfig, *, generator: torch.Generator,
                deadline: Deadline | None = None, report: Callable[[str], None] | None = None,
                device: torch.device | None = None) -> Stage:
    """A new network trained on (N, C, H, W) uint8 images and their (N,) labels, on their device.

    device: another one for the network, where the images go batch by batch. Where a deadline ends the epochs early,
    the learning rate falls to zero towards it.
    """
    deadline, device = deadline or Deadline(), device or images.device
    seed = int(torch.randint(1 << 31, (), generator=generator))
    model = new_dvae(num_classes, tuple(images.shape[1:]), config.network, seed=seed)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimiser = torch.optim.Adam(model.parameters(), config.rate)
    noises = device_generator(device, generator=generator)
    sums, history = torch.zeros(len(TERMS), device=device), []

    def step(batch: Tensor, of: Tensor) -> Tensor:
        for group in optimiser.param_groups:
            group["lr"] = config.rate * (1 + math.cos(math.pi * _progress(len(history), config.epochs, deadline))) / 2
        terms = _terms(model, unit(batch), of, config, len(history), generator=noises)
        optimiser.zero_grad(set_to_none=True)
        terms.sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimiser.step()
        sums.add_(terms.detach())
        return terms.detach().sum()

    def ended() -> bool:
        history.append((sums / batch_count(len(images), config.batch)).tolist())
        sums.zero_()
        if report:
            report(f"epoch {len(history)}/{config.epochs}: loss {sum(history[-1]):.5f}")
        return False

    done = run_epochs(model, Training(images, labels, generator, None, deadline, device), step, epochs=config.epochs,
                      batch=config.batch, done=ended)
    losses = {name: tuple(row[i] for row in history) for i, name in enumerate(TERMS)}
    return Stage(model.eval(), losses, done.finite, done.complete)


def _progress(epoch: int, epochs: int, deadline: Deadline) -> float:
    """Share of the epochs, or of the time where that is further; in [0, 1]."""
    length = deadline.length()
    return min(1.0, max(epoch / epochs, deadline.elapsed() / length if math.isfinite(length) else 0.0))


def _terms(model: DVAE, images: Tensor, labels: Tensor, config: StageConfig, epoch: int, *,
           generator: torch.Generator) -> Tensor:
    with autocast(images.device, config.precision):
        found = model(images, labels, noise(model, len(images), generator=generator))
    return loss_terms(Disentangled(*(part.float() for part in found)), images, config, epoch)


def unit(images: Tensor) -> Tensor:
    """Grey levels to floats in [0, 1], channels last."""
    return images.to(torch.float32, memory_format=torch.channels_last) / 255


def noise(model: DVAE, count: int, *, generator: torch.Generator | None) -> Tensor | None:
    """Standard normal, as the codes of `count` images are shaped; without a generator none, for the codes' means."""
    return generator and torch.randn(model.code_shape(count), generator=generator, device=generator.device)


@torch.no_grad()
def without_perturbation(model: DVAE, images: Tensor, labels: Tensor, *, generator: torch.Generator | None
                         ) -> tuple[Tensor, Tensor]:
    """((B, C, H, W) in [0, 1] the images minus their perturbation, the perturbation) of float images in [0, 1]."""
    found = model(images, labels, noise(model, len(images), generator=generator))
    return (images - found.perturbation).clamp(0, 1), found.perturbation


@torch.no_grad()
def reconstruction(model: DVAE, images: Tensor, labels: Tensor, *, generator: torch.Generator | None) -> Tensor:
    """(B, C, H, W) in (0, 1): what the code, drawn or its mean, keeps of float images in [0, 1]."""
    return model(images, labels, noise(model, len(images), generator=generator)).image
