"""TAP: every image is an adversarial example that a network trained on the clean set takes for the next class.

Paper: Fowl et al., Adversarial Examples Make Strong Poisons, NeurIPS 2021 (arXiv:2106.10807), class-targeted attack:
a network is trained on the clean set and frozen, and signed gradient descent moves every image towards another
class, seen through a random crop and mirror at each step.
Departs from it: one start, where the authors keep the best of eight; crops move by whole pixels and show black
borders; starts are compared by the loss of the finished, rounded images without crops, where the released code takes
the last step's; the surrogate sees pixels in [0, 1] without normalisation and its rate falls as half a cosine.
"""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data.errors import expect
from data.image_sets import ImageSet
from data.poisoned_sets import PoisonedSet
from data.resnet import new_resnet
from data.unlearnable_sets import check_radius, check_widths, drawn_positions, perturbed_set
from data.victims import VictimConfig, augment, check_weights, outputs, train_victim


@dataclass(frozen=True)
class TargetedMaximisingConfig:
    radius: float = 8.0    # largest change of a pixel, grey levels
    shift: int = 1         # the class an image moves towards: its own plus this, modulo the number of classes
    steps: int = 250       # of signed descent
    step: float = 0.05     # of the radius
    restarts: int = 1      # random starts, of which the one with the lowest mean loss stays; the authors take 8
    block: int = 512       # images that are moved at once: bounds memory
    crop: int = 4          # pixels of black around the image before a random crop, in training and at each step
    flip: bool = True      # mirror left and right, in both: for objects, never for digits and signs
    widths: tuple[int, ...] = (64, 128, 256, 512)  # of the surrogate's four stages
    epochs: int = 40       # of its training
    batch: int = 128       # images of a step of its training
    rate: float = 0.1      # its highest learning rate
    precision: str = "auto"  # float32, bfloat16 (autocast), or auto: bfloat16 on a GPU, else float32

    def __post_init__(self) -> None:
        name = type(self).__name__
        expect(0 < self.step <= 1, f"{name}.step", "in (0, 1] of the radius", self.step)
        expect(self.steps > 0 and self.restarts > 0, f"{name} steps, restarts", "> 0", (self.steps, self.restarts))
        expect(self.shift > 0, f"{name}.shift", "> 0", self.shift)
        check_surrogate(self)

    def views(self, channels: int) -> VictimConfig:
        """How the surrogate is trained, and how it sees an image."""
        return surrogate_views(self, channels)


def budgeted() -> TargetedMaximisingConfig:
    """A narrow surrogate and few, longer steps, for a CPU."""
    return TargetedMaximisingConfig(steps=40, step=0.1, widths=(16, 32, 64, 128), epochs=15)


def check_surrogate(config: object) -> None:
    """What a config owes that moves images within a radius by a network of its own."""
    name = type(config).__name__
    check_radius(config)
    expect(config.block > 0, f"{name}.block", "> 0 images", config.block)
    check_widths(config)
    surrogate_views(config, 1)  # names a wrong batch, rate, crop and precision


def surrogate_views(config: object, channels: int) -> VictimConfig:
    """How the config's surrogate is trained on images of so many channels, and how it sees them: in [0, 1]."""
    return VictimConfig(widths=config.widths, epochs=config.epochs, batch=config.batch, rate=config.rate,
                        crop=config.crop, flip=config.flip, precision=config.precision, mean=(0.0,) * channels,
                        std=(1.0,) * channels)


def frozen(network: nn.Module) -> nn.Module:
    """The same trained network in evaluation mode, whose weights get no gradients."""
    check_weights(network, "surrogate")
    return network.eval().requires_grad_(False)


def targets_of(labels: Tensor, num_classes: int, shift: int) -> Tensor:
    """(N,) labels to the classes that the images move towards: (label + shift) mod num_classes."""
    expect(shift % num_classes != 0, "shift", f"no multiple of the {num_classes} classes", shift)
    return (labels + shift) % num_classes


def limits(images: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest grey levels within the radius of (B, C, H, W) uint8 images: whole numbers, float."""
    whole = math.floor(radius)  # images are rounded in the end, and 8.5 may round to 9
    return (images.float() - whole).clamp(min=0), (images.float() + whole).clamp(max=255)


def stepped(x: Tensor, gradient: Tensor, step: float, within: tuple[Tensor, Tensor]) -> Tensor:
    """(B, C, H, W) float `x` after one signed step of `step` grey levels down the gradient, inside the limits."""
    return torch.clamp(x.detach() - step * gradient.sign(), *within)


def class_loss(surrogate: nn.Module, x: Tensor, targets: Tensor, views: VictimConfig) -> Tensor:
    """Cross-entropy of (B, C, H, W) grey levels and the target classes, summed: no image's part depends on B."""
    return cross_entropy(outputs(surrogate, x, views), targets, reduction="sum")


def moved(surrogate: nn.Module, images: Tensor, targets: Tensor, config: TargetedMaximisingConfig, *,
          generator: torch.Generator) -> Tensor:
    """(B, C, H, W) uint8 images, each moved within the radius to where the frozen surrogate sees (B,) `targets`.

    The start is normal, of the radius as its deviation, cut to the radius. Returns uint8 of the same shape.
    """
    views, within = config.views(images.shape[1]), limits(images, config.radius)
    start = config.radius * torch.randn(images.shape, generator=generator)  # on the CPU: every device draws the same
    x = torch.clamp(images + start.to(images.device), *within)
    for _ in range(config.steps):
        x.requires_grad_(True)
        loss = class_loss(surrogate, augment(x, views, generator=generator), targets, views)
        (gradient,) = torch.autograd.grad(loss, x)
        x = stepped(x, gradient, config.step * config.radius, within)
    return x.round().to(torch.uint8)


@torch.no_grad()
def mean_loss(surrogate: nn.Module, images: Tensor, targets: Tensor, config: TargetedMaximisingConfig) -> float:
    """Mean cross-entropy of (N, C, H, W) uint8 images, as they are, and (N,) classes; lower = nearer to them."""
    views, blocks = config.views(images.shape[1]), zip(images.split(config.block), targets.split(config.block),
                                                       strict=True)
    return sum(class_loss(surrogate, part, wanted, views).item() for part, wanted in blocks) / len(images)


def poison(clean: ImageSet, config: TargetedMaximisingConfig, *, ratio: float, seed: int) -> PoisonedSet:
    """round(ratio * N) of the images altered by at most `radius`; the surrogate is trained on the whole clean set."""
    positions = drawn_positions(clean, ratio, seed=seed)
    targets = targets_of(clean.labels, clean.num_classes, config.shift)
    surrogate = frozen(train_victim(clean.images, clean.labels, clean.num_classes,
                                    config.views(clean.images.shape[1]), seed=seed, network=new_resnet))
    generator = torch.Generator().manual_seed(seed)

    def perturb(images: Tensor, index: Tensor) -> Tensor:
        blocks = zip(images.split(config.block), targets[index].split(config.block), strict=True)
        return torch.cat([moved(surrogate, part, wanted, config, generator=generator) for part, wanted in blocks])

    best, lowest = None, math.inf
    for _ in range(config.restarts):
        found = perturbed_set(clean, positions, perturb, "tap", asdict(config), seed=seed)
        loss = mean_loss(surrogate, found.images[positions], targets[positions], config)
        if best is None or loss < lowest:
            best, lowest = found, loss
    return best
