"""EM: perturbations that make the training loss small before a network has learnt anything about the images.

Paper: Huang et al., Unlearnable Examples: Making Personal Data Unexploitable, ICLR 2021, arXiv:2101.04898. A network
and the perturbations of its training images lower the same loss in turn: some steps of SGD on the perturbed images,
then signed gradient descent of the perturbations. "steps" is the variant that Fu et al. compare theirs with (Robust
Unlearnable Examples, ICLR 2022): every batch is perturbed from a random start before its one step of SGD, and the
network of the end perturbs all images.
Departs from it: works in grey levels on images that stay on their device, within the grey levels after every step;
both signs of a perturbation are kept, where the released code loses the negative one when it stores the set; batches
come in a new order each time round for images too; the number of rounds has a cap, and the error that ends them is
that of the whole set.
Memory beside the images, which have a byte a number: for their perturbations two bytes a number between the rounds
(307 MB for 50,000 images of 3 x 32 x 32, 15 GB of 3 x 224 x 224), one with "steps" (up to a radius of 127).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data.devices import PRECISIONS, device_generator
from data.errors import expect
from data.image_sets import ImageSet
from data.poisoned_sets import PoisonedSet
from data.resnet import new_resnet
from data.unlearnable_sets import (
    added,
    check_radius,
    check_widths,
    drawn_positions,
    level_type,
    perturbed_set,
)
from data.victims import answered, check_weights

# Each image's perturbation between two visits: exact for whole steps, else within 1/512 of a grey level up to a radius
# of 8. That hardly moves a grey level by itself; over many rounds it leads elsewhere, as another order of sums does.
HELD = torch.float16
KINDS = ("sample", "class")
SCHEDULES = ("alternating", "steps")


@dataclass(frozen=True)
class ErrorMinimisingConfig:
    kind: str = "sample"           # one perturbation an image, or one a class
    schedule: str = "alternating"  # as published, or "steps": random starts, one batch at a time
    radius: float = 8.0            # largest change of a pixel, grey levels
    step: float = 0.8              # of the signed descent, grey levels
    steps: int = 20                # of it whenever an image is visited
    widths: tuple[int, ...] = (64, 128, 256, 512)  # of the surrogate's four stages
    batch: int = 512               # images
    rate: float = 0.1              # learning rate
    momentum: float = 0.9
    decay: float = 5e-4            # weight decay
    clip: float = 5.0              # largest norm of a step's gradient
    precision: str = "auto"        # float32, bfloat16 (autocast), or auto: bfloat16 on a GPU, else float32
    batches: int = 10              # alternating: steps of SGD a round
    rounds: int = 50               # alternating: at most
    stop_error: float = 0.01       # alternating: share of wrong answers on the perturbed images that ends it
    share: float = 1.0             # alternating: of the images that are visited a round; below 1 for classes only
    training_steps: int = 5000     # steps: of SGD
    drop_every: int = 2000         # steps: after which the rate falls to a tenth

    def __post_init__(self) -> None:
        expect(self.kind in KINDS, "ErrorMinimisingConfig.kind", f"one of {', '.join(KINDS)}", self.kind)
        expect(self.schedule in SCHEDULES, "ErrorMinimisingConfig.schedule", f"one of {', '.join(SCHEDULES)}",
               self.schedule)
        expect(self.kind == "sample" or self.schedule == "alternating", "ErrorMinimisingConfig.schedule",
               "alternating for perturbations of classes", self.schedule)
        expect(0 < self.share <= 1, "ErrorMinimisingConfig.share", "in (0, 1]", self.share)
        expect(self.kind == "class" or self.share == 1, "ErrorMinimisingConfig.share",
               "1 for perturbations of images", self.share)
        expect(self.batches > 0 and self.rounds > 0, "ErrorMinimisingConfig batches, rounds", "> 0",
               (self.batches, self.rounds))
        expect(0 <= self.stop_error <= 1, "ErrorMinimisingConfig.stop_error", "in [0, 1]", self.stop_error)
        check_descent(self)
        check_training(self)


def budgeted() -> ErrorMinimisingConfig:
    """A narrow surrogate and few, longer steps, for a CPU."""
    return ErrorMinimisingConfig(step=2.0, steps=4, widths=(8, 16, 32, 64), batch=128, rounds=15)


def check_descent(config: object) -> None:
    """What a config with a radius and signed steps owes."""
    name = type(config).__name__
    check_radius(config)
    expect(config.step > 0 and config.steps > 0, f"{name} step, steps", "> 0", (config.step, config.steps))


def check_training(config: object) -> None:
    """What a config with a surrogate owes."""
    name = type(config).__name__
    check_widths(config)
    expect(config.batch > 1, f"{name}.batch", "> 1 images", config.batch)
    expect(config.rate > 0 and config.clip > 0, f"{name} rate, clip", "> 0", (config.rate, config.clip))
    expect(0 <= config.momentum < 1 and config.decay >= 0, f"{name} momentum, decay", "in [0, 1), >= 0",
           (config.momentum, config.decay))
    expect(config.precision in PRECISIONS, f"{name}.precision", f"one of {', '.join(PRECISIONS)}",
           config.precision)
    expect(config.training_steps > 0 and config.drop_every > 0, f"{name} training_steps, drop_every", "> 0",
           (config.training_steps, config.drop_every))


def poison(clean: ImageSet, config: ErrorMinimisingConfig, *, ratio: float, seed: int) -> PoisonedSet:
    """round(ratio * N) of the images altered by at most `radius`; the surrogate sees and perturbs all of them."""
    positions = drawn_positions(clean, ratio, seed=seed)
    noise = error_minimising(clean, config, seed=seed)
    owners = _owners(clean, config)
    return perturbed_set(clean, positions, lambda images, at: within(images, noise[owners[at]], config.radius), "em",
                         asdict(config), seed=seed)


def within(images: Tensor, noise: Tensor, radius: float) -> Tensor:
    """(B, C, H, W) uint8: `images` plus `noise`, rounded by itself, no pixel changed by more than `radius`."""
    whole = math.floor(radius)  # else 8.5 may round to 9
    return added(images, noise.round().clamp(-whole, whole))


def error_minimising(clean: ImageSet, config: ErrorMinimisingConfig, *, seed: int,
                     progress: Callable[[str], None] | None = None) -> Tensor:
    """(N, C, H, W), or (K, C, H, W) for classes: perturbations in grey levels, within the radius.

    float16 for images, float32 for classes; with "steps" whole numbers, int8 or int16.
    """
    expect(len(clean.images) > 1, f"{clean.name} images", "at least two", len(clean.images))
    if config.schedule == "alternating":
        return _alternating(clean, config, seed, progress)

    def perturb(model: nn.Module, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return descended(model, x, labels, random_start(x, config.radius, generator=generator), config)

    return in_steps(clean, config, perturb, lambda model, x, labels, noise, generator: x + noise, seed=seed,
                    progress=progress)


def _owners(clean: ImageSet, config: ErrorMinimisingConfig) -> Tensor:
    """(N,) which perturbation an image gets."""
    return clean.labels if config.kind == "class" else torch.arange(len(clean.images), device=clean.labels.device)


def _alternating(clean: ImageSet, config: ErrorMinimisingConfig, seed: int,
                 progress: Callable[[str], None] | None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    model, optimiser = new_surrogate(clean, config, seed=seed)
    owners = _owners(clean, config)
    count = clean.num_classes if config.kind == "class" else len(clean.images)
    noise = torch.zeros(count, *clean.images.shape[1:], device=clean.images.device,
                        dtype=HELD if config.kind == "sample" else torch.float32)
    visited = torch.randperm(len(clean.images), generator=generator)[:math.ceil(config.share * len(clean.images))]
    visited = visited.sort().values.to(clean.images.device)
    batches = shuffled_batches(len(clean.images), config.batch, generator=generator)
    for done in range(1, config.rounds + 1):
        for index in islice(batches, config.batches):
            index = index.to(clean.images.device)
            learn(model, optimiser, clean.images[index] + noise[owners[index]].float(), clean.labels[index], config)
        with frozen(model):
            for index in visited.split(config.batch):
                _visit(model, clean, index, noise, config)
            error = _error(model, clean, noise, owners, config)
        if progress:
            progress(f"round {done}/{config.rounds}: error {error:.4f}")
        if error < config.stop_error:
            break
    check_weights(model, "surrogate")
    return noise


def _visit(model: nn.Module, clean: ImageSet, index: Tensor, noise: Tensor, config: ErrorMinimisingConfig) -> None:
    """Renew `noise` of the images at `index`, or of their classes."""
    x, labels = clean.images[index].float(), clean.labels[index]
    if config.kind == "sample":
        noise[index] = descended(model, x, labels, noise[index].float(), config).to(noise.dtype)
        return
    found = descended(model, x, labels, bounded(noise[labels], x, config.radius), config)
    for name in labels.unique():
        noise[name] = found[labels == name].mean(0)


def _error(model: nn.Module, clean: ImageSet, noise: Tensor, owners: Tensor, config: ErrorMinimisingConfig) -> float:
    """Share of the perturbed images, in [0, 1], that the model gives a wrong class."""
    wrong = torch.zeros((), device=clean.images.device)
    with torch.no_grad():
        for index in torch.arange(len(owners), device=owners.device).split(config.batch):
            found = answers(model, clean.images[index] + noise[owners[index]].float(), config)
            wrong += (found.argmax(1) != clean.labels[index]).sum()
    return wrong.item() / len(owners)


def in_steps(clean: ImageSet, config: object, perturb: Callable[..., Tensor], seen: Callable[..., Tensor], *,
             seed: int, progress: Callable[[str], None] | None) -> Tensor:
    """(N, C, H, W) perturbations in whole grey levels by the network that `training_steps` batches have formed.

    perturb: (model, images, labels, generator) to the batch's perturbation; seen: (model, images, labels,
    perturbation, generator) to the images of its step of SGD. Both find the model frozen in evaluation mode, and
    images and perturbations as (B, C, H, W) float grey levels.
    """
    generator = torch.Generator().manual_seed(seed)
    model, optimiser = new_surrogate(clean, config, seed=seed)
    batches = shuffled_batches(len(clean.images), config.batch, generator=generator)
    for done, index in enumerate(islice(batches, config.training_steps)):
        index = index.to(clean.images.device)
        x, labels = clean.images[index].float(), clean.labels[index]
        with frozen(model):
            x = seen(model, x, labels, perturb(model, x, labels, generator), generator)
        optimiser.param_groups[0]["lr"] = config.rate * 0.1 ** (done // config.drop_every)
        loss = learn(model, optimiser, x, labels, config)
        if progress and (done + 1) % 100 == 0:
            progress(f"step {done + 1}/{config.training_steps}: loss {loss.item():.4f}")
    check_weights(model, "surrogate")
    noise = torch.empty(clean.images.shape, device=clean.images.device, dtype=level_type(config.radius))
    with frozen(model):
        for index in torch.arange(len(noise), device=noise.device).split(config.batch):
            found = perturb(model, clean.images[index].float(), clean.labels[index], generator)
            noise[index] = found.round().to(noise.dtype)  # as `within` would round it: nothing is lost
    return noise


def new_surrogate(clean: ImageSet, config: object, *, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A fresh network on the images' device, and its SGD."""
    model = new_resnet(clean.num_classes, config.widths, clean.images.shape[1], seed=seed)
    model = model.to(clean.images.device, memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), config.rate, config.momentum, weight_decay=config.decay)


def shuffled_batches(count: int, batch: int, *, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions in [0, count), without end: a new order each time round, its last, partial batch left out."""
    size = min(batch, count)
    while True:
        yield from torch.randperm(count, generator=generator)[:count // size * size].split(size)


def learn(model: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor,
          config: object) -> Tensor:
    """One step of SGD on (B, C, H, W) float grey levels; the loss before it."""
    model.train()
    loss = cross_entropy(answers(model, images, config), labels)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimiser.step()
    return loss.detach()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Running statistics are used and kept, weights get no gradients; afterwards they do again."""
    was_training = model.training
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(was_training).requires_grad_(True)


def answers(model: nn.Module, images: Tensor, config: object) -> Tensor:
    """(B, K) float32 logits of (B, C, H, W) float grey levels; the network sees them in [0, 1]."""
    return answered(model, (images / 255).contiguous(memory_format=torch.channels_last), config.precision)


def input_gradient(model: nn.Module, images: Tensor, labels: Tensor, config: object) -> Tensor:
    """Of the summed loss, by (B, C, H, W) float `images`: the same shape."""
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        loss = cross_entropy(answers(model, images, config), labels, reduction="sum")
    return torch.autograd.grad(loss, images)[0]


def descended(model: nn.Module, images: Tensor, labels: Tensor, noise: Tensor, config: object) -> Tensor:
    """(B, C, H, W) perturbation of the float `images` after `steps` signed steps down the loss from `noise`."""
    return moved(model, images, labels, noise, config, (config.radius, -config.step, config.steps))


def moved(model: nn.Module, images: Tensor, labels: Tensor, noise: Tensor, config: object,
          walk: tuple[float, float, int]) -> Tensor:
    """The perturbation `noise` of the float `images` after signed steps along the gradient of the loss.

    walk: radius, length of a step (below zero: down) in grey levels, and how many.
    """
    radius, step, steps = walk
    for _ in range(steps):
        noise = bounded(noise + step * input_gradient(model, images + noise, labels, config).sign(), images, radius)
    return noise


def bounded(noise: Tensor, images: Tensor, radius: float) -> Tensor:
    """The nearest perturbation within the radius that keeps the float `images` in [0, 255]."""
    return torch.minimum(torch.maximum(noise.clamp(-radius, radius), -images), 255 - images)


def random_start(images: Tensor, radius: float, *, generator: torch.Generator) -> Tensor:
    """A uniform perturbation of the float `images`, within the radius and the grey levels."""
    there = device_generator(images.device, generator=generator)
    return bounded(radius * (2 * torch.rand(images.shape, generator=there, device=images.device) - 1), images, radius)
