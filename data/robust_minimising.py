"""REM: perturbations that make the loss small even where an adversary makes it large.

Paper: Fu et al., Robust Unlearnable Examples: Protecting Data Privacy Against Adversarial Learning, ICLR 2022. As the
step-based EM, but the loss that perturbations lower is that of randomly shifted and mirrored images, averaged over
several draws, at the worst point of a smaller ball around each; the network learns from such worst points too.
Departs from it: works in grey levels, so that black comes in at the border of a shifted image; the draws of one step
pass through the network as one batch.
Memory beside the images: as much again for their perturbations (154 MB for 50,000 of 3 x 32 x 32, 7.5 GB of
3 x 224 x 224), twice that beyond a radius of 127.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from data.augmentation import shifted
from data.error_minimising import (
    bounded,
    check_descent,
    check_training,
    in_steps,
    input_gradient,
    moved,
    random_start,
    within,
)
from data.errors import expect
from data.image_sets import ImageSet
from data.poisoned_sets import PoisonedSet
from data.unlearnable_sets import drawn_positions, perturbed_set


@dataclass(frozen=True)
class RobustMinimisingConfig:
    radius: float = 8.0          # largest change of a pixel, grey levels
    step: float = 1.6            # of the signed descent, grey levels
    steps: int = 10              # of it for a batch
    draws: int = 5               # of shift and mirror a step
    attack_radius: float = 4.0   # of the adversary, grey levels; 0 = none
    attack_step: float = 0.8     # of its signed ascent, grey levels
    attack_steps: int = 10
    crop: int = 4                # pixels of black around the image before the random crop
    flip: bool = True            # mirror left and right: for objects, never for digits and signs
    widths: tuple[int, ...] = (64, 128, 256, 512)  # of the surrogate's four stages
    batch: int = 128             # images
    rate: float = 0.1            # learning rate
    momentum: float = 0.9
    decay: float = 5e-4          # weight decay
    clip: float = 5.0            # largest norm of a step's gradient
    precision: str = "auto"      # float32, bfloat16 (autocast), or auto: bfloat16 on a GPU, else float32
    training_steps: int = 5000   # of SGD
    drop_every: int = 2000       # of them, after which the rate falls to a tenth

    def __post_init__(self) -> None:
        check_descent(self)
        check_training(self)
        expect(self.draws > 0, "RobustMinimisingConfig.draws", "> 0", self.draws)
        expect(self.crop >= 0, "RobustMinimisingConfig.crop", ">= 0 pixels", self.crop)
        expect(0 <= self.attack_radius < self.radius, "RobustMinimisingConfig.attack_radius",
               f"in [0, {self.radius}), below the radius", self.attack_radius)
        expect(self.attack_step > 0 and self.attack_steps > 0, "RobustMinimisingConfig attack_step, attack_steps",
               "> 0", (self.attack_step, self.attack_steps))


def budgeted() -> RobustMinimisingConfig:
    """A narrow surrogate and few, longer steps, for a CPU."""
    return RobustMinimisingConfig(step=4.0, steps=3, draws=2, attack_step=2.0, attack_steps=2,
                                  widths=(8, 16, 32, 64), training_steps=40, drop_every=30)


def poison(clean: ImageSet, config: RobustMinimisingConfig, *, ratio: float, seed: int) -> PoisonedSet:
    """round(ratio * N) of the images altered by at most `radius`; the surrogate sees and perturbs all of them."""
    positions = drawn_positions(clean, ratio, seed=seed)
    noise = robust_minimising(clean, config, seed=seed)
    return perturbed_set(clean, positions, lambda images, at: within(images, noise[at], config.radius), "rem",
                         asdict(config), seed=seed)


def robust_minimising(clean: ImageSet, config: RobustMinimisingConfig, *, seed: int,
                      progress: Callable[[str], None] | None = None) -> Tensor:
    """(N, C, H, W) int8 or int16 perturbations in whole grey levels, within the radius."""
    expect(len(clean.images) > 1, f"{clean.name} images", "at least two", len(clean.images))

    def perturb(model: nn.Module, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return robustly_descended(model, x, labels, config, generator=generator)

    def seen(model: nn.Module, x: Tensor, labels: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        return worst_point(model, varied(x + noise, config, generator=generator), labels, config,
                           generator=generator)

    return in_steps(clean, config, perturb, seen, seed=seed, progress=progress)


def robustly_descended(model: nn.Module, images: Tensor, labels: Tensor, config: RobustMinimisingConfig, *,
                       generator: torch.Generator) -> Tensor:
    """(B, C, H, W) perturbation of the float `images` after `steps` signed steps from a random start.

    A step follows the gradient at the worst points, carried back through shifts and mirrors alone: the adversary's
    own dependence on the perturbation is left out, as published.
    """
    noise = random_start(images, config.radius, generator=generator)
    labels = labels.repeat(config.draws)
    for _ in range(config.steps):
        noise.requires_grad_(True)
        variants = varied((images + noise).repeat(config.draws, 1, 1, 1), config, generator=generator)
        worst = worst_point(model, variants.detach(), labels, config, generator=generator)
        at_worst = input_gradient(model, worst, labels, config)
        (gradient,) = torch.autograd.grad(variants, noise, at_worst)
        noise = bounded(noise.detach() - config.step * gradient.sign(), images, config.radius)
    return noise


def varied(images: Tensor, config: RobustMinimisingConfig, *, generator: torch.Generator) -> Tensor:
    """(B, C, H, W) float, each image shifted by up to `crop` pixels (black comes in) and perhaps mirrored."""
    return shifted(images, config.crop, mirror=config.flip, border="constant", generator=generator)


def worst_point(model: nn.Module, images: Tensor, labels: Tensor, config: RobustMinimisingConfig, *,
                generator: torch.Generator) -> Tensor:
    """The float `images` moved within `attack_radius` up the loss, from a random start."""
    if not config.attack_radius:
        return images
    start = random_start(images, config.attack_radius, generator=generator)
    return images + moved(model, images, labels, start, config,
                          (config.attack_radius, config.attack_step, config.attack_steps))
