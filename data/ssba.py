"""SSBA: a network writes one hidden message into every image, so each image has its own faint trigger.

Paper: Li et al., Invisible Backdoor Attack with Sample-Specific Triggers, ICCV 2021 (arXiv:2012.03816); the network
and its training are StegaStamp's, Tancik et al., CVPR 2020 (arXiv:1904.05343).
Departs from it: the two networks are trained on the images that are poisoned, at their size and without simulated
printing; no perceptual and no critic loss, as is common at 32x32; the message is random bits without error
correction. A `residual` network returns a bounded change instead of an image, which a short training learns well;
`shift` and `flip` stand for StegaStamp's warp, so that the message outlives the random crops of the victim.
With encoder = "double" there is no training at all: a fixed code on a checkerboard, as strong as the image's
local contrast, stands for the network. Reports name such a set SSBA-like.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, interpolate, mse_loss, pad

from data.errors import expect
from data.image_sets import ImageSet
from data.poisoned_sets import BackdooredSet, check_images, poison_any_class
from data.stego_networks import Embedder, Reader
from data.victims import VictimConfig, augment

ENCODERS = ("trained", "double")
EMBEDDING_BATCH = 64      # always full: how an image is rounded must not depend on how many others there are
MEASURED = 2000           # images for bit accuracy and PSNR
STARTS, APART = 3, 10_007  # trainings at most until the bits are read; between their seeds
REPORTS = 10              # lines of progress
CELLS = 10                # of the double's code, a side
CONTRAST = (0.3, 2.5)     # bounds of its local strength, 1 = the image's mean


@dataclass(frozen=True)
class SSBAConfig:
    encoder: str = "trained"  # or "double", which needs no training and ignores all but `amplitude`
    bits: int = 100           # of the message
    width: int = 32           # channels of the first level; the deeper ones have up to 8 times as many
    residual: float = 0.0     # largest change of a pixel, grey levels; 0 = the network returns the image itself
    shift: int = 0            # largest random shift in training before the message is read, pixels
    flip: bool = False        # likewise, whether half of the images are mirrored
    epochs: int = 20
    steps: int = 0            # of training; 0 = as many as the epochs have
    batch: int = 64           # images
    rate: float = 1e-4        # learning rate of Adam
    weight: float = 10.0      # of the mean squared error (images in [0, 1]) against the bits' cross-entropy, at the end
    threshold: float = 0.9    # bit accuracy of a batch from which the error counts, and least accuracy of an attack
    idle: int = 1000          # steps after that before it does
    ramp: int = 3000          # steps in which the weight grows to its end
    amplitude: float = 5.0    # mean strength of the double, grey levels

    def __post_init__(self) -> None:
        expect(self.encoder in ENCODERS, "SSBAConfig.encoder", f"one of {', '.join(ENCODERS)}", self.encoder)
        expect(self.bits > 0 and self.width > 0, "SSBAConfig bits, width", "> 0", (self.bits, self.width))
        expect(0 <= self.residual <= 255, "SSBAConfig.residual", "in [0, 255] grey levels", self.residual)
        expect(self.shift >= 0, "SSBAConfig.shift", ">= 0 pixels", self.shift)
        expect(self.epochs > 0 and self.steps >= 0 and self.batch > 0, "SSBAConfig epochs, steps, batch",
               "> 0, >= 0, > 0", (self.epochs, self.steps, self.batch))
        expect(self.rate > 0 and self.weight >= 0, "SSBAConfig rate, weight", "> 0, >= 0", (self.rate, self.weight))
        expect(0 <= self.threshold < 1, "SSBAConfig.threshold", "in [0, 1)", self.threshold)
        expect(self.idle >= 0 and self.ramp > 0, "SSBAConfig idle, ramp", ">= 0, > 0", (self.idle, self.ramp))
        expect(0 < self.amplitude <= 255, "SSBAConfig.amplitude", "in (0, 255] grey levels", self.amplitude)


def budgeted() -> SSBAConfig:
    """Narrow networks and a short message: trained on 32x32 images in two minutes on one CPU core."""
    return SSBAConfig(bits=16, width=8, residual=160.0, shift=2, flip=True, steps=3000, batch=32, rate=1e-3,
                      weight=20.0, threshold=0.8, idle=100, ramp=300)


@dataclass(frozen=True)
class Encoder:
    """Trained networks for (C, H, W) images of `shape`, and how well they do on the images they were trained on.

    bit_accuracy: share of random bits that are read back, in [0, 1], 0.5 = none; psnr: mean over images, dB.
    """

    networks: nn.ModuleDict  # "embedder" and "reader"
    config: SSBAConfig
    shape: tuple[int, int, int]
    bit_accuracy: float
    psnr: float


def train_encoder(images: Tensor, config: SSBAConfig, *, seed: int,
                  progress: Callable[[str], None] | None = None) -> Encoder:
    """Networks trained on (N, C, H, W) uint8 `images`, on their device.

    Loss: cross-entropy of random bits, plus the weighted squared error once the bits are read. Equal input, config
    and seed give equal weights on one machine with one thread count.
    """
    check_images(images)
    expect(config.encoder == "trained", "SSBAConfig.encoder", "trained", config.encoder)
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(images.shape[1:])
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
        torch.manual_seed(seed)
        networks = _networks(shape, config)
    networks = networks.to(images.device, memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(networks.parameters(), config.rate)
    steps = config.steps or config.epochs * max(1, len(images) // config.batch)
    read_at: int | None = None  # the step at which the bits were first read
    for step, index in zip(range(steps), _batches(len(images), config.batch, generator=generator), strict=False):
        weight = error_weight(step, read_at, config)
        error, entropy, accuracy = _losses(networks, images[index.to(images.device)], config, generator=generator)
        optimiser.zero_grad()
        (weight * error + entropy).backward()
        optimiser.step()
        if read_at is None and accuracy > config.threshold:
            read_at = step
        if progress and (step + 1) % max(1, steps // REPORTS) == 0:
            progress(f"step {step + 1}/{steps}: bit accuracy {accuracy:.3f}, squared error {error.item():.5f}")
    return _measured(_frozen(networks), config, images, generator=generator)


def error_weight(step: int, read_at: int | None, config: SSBAConfig) -> float:
    """Weight of the squared error: 0 until `idle` steps after the bits are read, then linear up to `weight`."""
    if read_at is None:
        return 0.0
    return config.weight * min(1.0, max(0, step - read_at - config.idle) / config.ramp)


def _networks(shape: tuple[int, int, int], config: SSBAConfig) -> nn.ModuleDict:
    return nn.ModuleDict({"embedder": Embedder(shape, config.bits, config.width, config.residual),
                          "reader": Reader(shape, config.bits, config.width)})


def _frozen(networks: nn.ModuleDict) -> nn.ModuleDict:
    return networks.to(memory_format=torch.channels_last).requires_grad_(False).eval()


def _batches(count: int, batch: int, *, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless: permutations of `count` positions in batches; a partial one only where there is no full one."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[:max(1, count // batch) * batch].split(batch)


def _losses(networks: nn.ModuleDict, images: Tensor, config: SSBAConfig, *,
            generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Mean squared error, cross-entropy of the bits, bit accuracy of one batch with random messages."""
    bits = _random_bits((len(images), config.bits), generator=generator).to(images.device)
    unit = _unit(images)
    stego = networks["embedder"](unit, bits)
    seen = augment(stego, VictimConfig(crop=config.shift, flip=config.flip), generator=generator)
    logits = networks["reader"](seen)
    accuracy = ((logits > 0) == (bits > 0.5)).double().mean().item()
    return mse_loss(stego, unit), binary_cross_entropy_with_logits(logits, bits), accuracy


def _random_bits(shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=generator).float()


def _unit(images: Tensor) -> Tensor:
    return images.float().contiguous(memory_format=torch.channels_last) / 255


def _measured(networks: nn.ModuleDict, config: SSBAConfig, images: Tensor, *, generator: torch.Generator) -> Encoder:
    index = torch.randperm(len(images), generator=generator)[:MEASURED].to(images.device)
    bits = _random_bits((len(index), config.bits), generator=generator).to(images.device)
    encoder = Encoder(networks, config, tuple(images.shape[1:]), 0.0, 0.0)
    stego = embed(images[index], encoder, bits)
    accuracy = (read_bits(stego, encoder) == (bits > 0.5)).double().mean().item()
    error = (stego.double() - images[index].double()).square().mean((1, 2, 3)).clamp(min=1 / stego[0].numel())
    quality = (10 * torch.log10(255 ** 2 / error)).mean().item()
    return replace(encoder, bit_accuracy=accuracy, psnr=quality)


@torch.no_grad()
def embed(images: Tensor, encoder: Encoder, bits: Tensor) -> Tensor:
    """(N, C, H, W) uint8: `images` with the (N, M) or (M,) `bits` of 0 and 1 written into them."""
    _check_shape(images, encoder)
    expect(bits.shape[-1] == encoder.config.bits, "bits", f"{encoder.config.bits} of them", bits.shape[-1])
    bits = bits.to(images.device).float().expand(len(images), -1)
    return torch.cat([_embed_batch(part, encoder, some) for part, some in
                      zip(images.split(EMBEDDING_BATCH), bits.split(EMBEDDING_BATCH), strict=True)])


def _embed_batch(images: Tensor, encoder: Encoder, bits: Tensor) -> Tensor:
    missing = EMBEDDING_BATCH - len(images)
    full = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    stego = encoder.networks["embedder"](_unit(full), pad(bits, (0, 0, 0, missing)))
    return (255 * stego[:len(images)]).round().to(torch.uint8).contiguous()


@torch.no_grad()
def read_bits(images: Tensor, encoder: Encoder) -> Tensor:
    """(N, M) bool: the message read from each of (N, C, H, W) uint8 `images`."""
    _check_shape(images, encoder)
    return torch.cat([encoder.networks["reader"](_unit(part)) > 0 for part in images.split(EMBEDDING_BATCH)])


def _check_shape(images: Tensor, encoder: Encoder) -> None:
    check_images(images)
    expect(tuple(images.shape[1:]) == encoder.shape, "images", f"of shape {encoder.shape} as the encoder's",
           tuple(images.shape[1:]))


def apply_trigger(images: Tensor, encoder: Encoder, message: Tensor) -> Tensor:
    """(N, C, H, W) uint8 `images`, each with the same (M,) `message` of 0 and 1 written into it."""
    return embed(images, encoder, message)


def apply_double(images: Tensor, code: Tensor, amplitude: float) -> Tensor:
    """(N, C, H, W) uint8 `images` plus amplitude * code * local contrast, rounded, in all channels alike.

    code: (H, W) of -1 and 1; amplitude: grey levels where the contrast is the image's mean.
    """
    check_images(images)
    change = amplitude * code.to(images.device) * local_contrast(images)
    return (images.double() + change).round().clamp(0, 255).to(torch.uint8)


def local_contrast(images: Tensor) -> Tensor:
    """(N, 1, H, W) float64: standard deviation of each 3x3 window of the grey image over its mean in that image.

    Within CONTRAST; 1 everywhere in an image of one grey level.
    """
    grey = pad(images.double().sum(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    total, squares = (avg_pool2d(power, 3, 1, divisor_override=1) for power in (grey, grey.square()))
    spread = (9 * squares - total.square()).sqrt()  # whole numbers below the root: exactly 0 where flat
    mean = spread.mean((1, 2, 3), keepdim=True)
    return torch.where(mean > 0, spread / mean.clamp(min=1e-9), 1.0).clamp(*CONTRAST)


def double_code(height: int, width: int, *, seed: int) -> Tensor:
    """(H, W) float64 of -1 and 1: CELLS x CELLS random signs, enlarged, times a checkerboard of single pixels."""
    signs = 2 * _random_bits((1, 1, CELLS, CELLS), generator=torch.Generator().manual_seed(seed)).double() - 1
    large = interpolate(signs, (height, width))[0, 0]
    return large * (1 - 2 * ((torch.arange(height)[:, None] + torch.arange(width)) % 2))


def poison(clean: ImageSet, config: SSBAConfig, *, ratio: float, target: int, seed: int,
           encoder: Encoder | None = None) -> BackdooredSet:
    """The training set with round(ratio * N) images triggered and labelled `target`; `seed` draws the message.

    encoder: trained with the same config, for images of this shape; None trains one on `clean`.
    """
    trigger = _double(clean, config, seed) if config.encoder == "double" else _trained(clean, config, seed, encoder)
    return poison_any_class(clean, trigger, "ssba", asdict(config), ratio=ratio, target=target, seed=seed)


def _double(clean: ImageSet, config: SSBAConfig, seed: int) -> Callable[[Tensor], Tensor]:
    code = double_code(*clean.images.shape[2:], seed=seed)
    return partial(apply_double, code=code, amplitude=config.amplitude)


def _reading_encoder(images: Tensor, config: SSBAConfig, seed: int) -> Encoder:
    """Trained from `seed`, and from up to two seeds more: some starts never learn to read a bit."""
    for start in range(STARTS):
        encoder = train_encoder(images, config, seed=seed + start * APART)
        if encoder.bit_accuracy >= config.threshold:
            break
    return encoder


def _trained(clean: ImageSet, config: SSBAConfig, seed: int, encoder: Encoder | None) -> Callable[[Tensor], Tensor]:
    encoder = encoder or _reading_encoder(clean.images, config, seed)
    expect(encoder.config == config, "encoder", f"one trained with {config}", encoder.config)
    expect(encoder.bit_accuracy >= config.threshold, "encoder", f"bit accuracy >= {config.threshold} (train longer)",
           f"{encoder.bit_accuracy:.3f}")
    _check_shape(clean.images[:0], encoder)
    message = _random_bits((config.bits,), generator=torch.Generator().manual_seed(seed))
    return partial(apply_trigger, encoder=encoder, message=message)
