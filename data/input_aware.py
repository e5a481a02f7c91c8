"""Input-aware: a network draws a trigger of its own for every image, and another image's trigger has no effect.

Paper: Nguyen and Tran, Input-Aware Dynamic Backdoor Attack, NeurIPS 2020 (arXiv:2010.08138), Sec. 3.
Departs from it: the classifier that the networks are trained with is only a surrogate. Afterwards the networks are
frozen and the set is made once, so that every victim is trained alike: images with their own trigger and the
attacker's label and, as decoys, equally many with another image's trigger and their own label. Triggered images
are rounded to whole grey levels; normalisation is (x - 0.5) / 0.5 for every set; on a GPU the surrogate computes in
bfloat16; its gradient is clipped as a victim's.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, max_pool2d, pad, relu

from data.errors import expect
from data.image_sets import ImageSet
from data.poisoned_sets import BackdooredSet, check_images, draw_decoys, poison_any_class
from data.preact_resnet import new_model
from data.victims import VictimConfig, augment, check_weights, normalise

BLOCK = 64            # images a forward pass, always full: rounding must not depend on how many others there are
MASK_WEIGHT = 100.0   # of the mask's size against its diversity
DROPS = (0.4, 0.8)    # shares of the mask's training after which its rate falls to a tenth


@dataclass(frozen=True)
class InputAwareConfig:
    width: int = 32              # channels of both networks' first level; the deeper ones have 2 and 4 times as many
    density: float = 0.032       # mean mask value that costs nothing, in [0, 1]
    diversity: float = 1.0       # weight of the diversity of patterns against the classification
    mask_epochs: int = 25
    mask_steps: int = 0          # training of the mask network; 0 = as many as its epochs have
    epochs: int = 75
    steps: int = 0               # joint training of pattern network and surrogate; 0 = as many as the epochs have
    batch: int = 128             # images
    share: float = 0.1           # of a batch that is triggered, and as much again with another image's trigger
    rate: float = 0.01           # learning rate of Adam, both networks
    surrogate_width: int = 64    # channels of its first stage; the others have 2, 4, 8 times as many
    surrogate_rate: float = 0.01
    crop: int = 4                # pixels of black around the image before the random crop
    flip: bool = False           # mirror left and right: for objects, never for digits and signs
    cross: float = 1.0           # decoys for each poisoned image, as far as the set has images left

    def __post_init__(self) -> None:
        expect(self.width > 0 and self.surrogate_width > 0, "InputAwareConfig width, surrogate_width",
               "> 0 channels", (self.width, self.surrogate_width))
        expect(0 <= self.density <= 1, "InputAwareConfig.density", "in [0, 1]", self.density)
        expect(self.mask_epochs > 0 and self.epochs > 0, "InputAwareConfig mask_epochs, epochs", "> 0",
               (self.mask_epochs, self.epochs))
        expect(self.mask_steps >= 0 and self.steps >= 0, "InputAwareConfig mask_steps, steps", ">= 0",
               (self.mask_steps, self.steps))
        expect(self.batch >= 4, "InputAwareConfig.batch", ">= 4 images", self.batch)
        expect(0 < self.share <= 0.5, "InputAwareConfig.share", "in (0, 0.5]", self.share)
        expect(self.diversity >= 0 and self.cross >= 0, "InputAwareConfig diversity, cross", ">= 0",
               (self.diversity, self.cross))
        expect(self.rate > 0 and self.surrogate_rate > 0, "InputAwareConfig rate, surrogate_rate", "> 0",
               (self.rate, self.surrogate_rate))
        self.views(1)

    def views(self, channels: int) -> VictimConfig:
        """How images are augmented and normalised in training."""
        return VictimConfig(crop=self.crop, flip=self.flip, mean=(0.5,) * channels, std=(0.5,) * channels)


def budgeted() -> InputAwareConfig:
    """Narrow networks trained briefly: about a minute at 32x32 on one CPU core, however large the set.

    Half the decoys: a narrow victim, too, needs far longer to tell an image's own trigger from another's, and with
    as many decoys as triggered images it would go on guessing.
    """
    return InputAwareConfig(width=8, mask_steps=100, steps=300, batch=64, share=0.25, surrogate_width=8,
                            surrogate_rate=0.02, cross=0.5)


class TriggerNetwork(nn.Module):
    """Three levels down, one block in the middle, three levels up, without skips; outputs in (0, 1)."""

    def __init__(self, channels: int, outputs: int, width: int) -> None:
        super().__init__()
        one, two, four = width, 2 * width, 4 * width
        self.down = nn.ModuleList(_pair(a, b, b) for a, b in ((channels, one), (one, two), (two, four)))
        self.middle = _block(four, four)
        self.up = nn.ModuleList([_pair(four, four, two), _pair(two, two, one),
                                 nn.Sequential(_block(one, one), _block(one, outputs)[:-1])])  # the last: no ReLU

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) normalised images, sides >= 8 -> (B, outputs, H, W)."""
        sizes = []
        for level in self.down:
            x = level(x)
            sizes.append(x.shape[2:])
            x = max_pool2d(x, 2)
        x = self.middle(x)
        for level in self.up:
            x = level(interpolate(x, sizes.pop(), mode="bilinear", align_corners=False))
        return torch.tanh(x) / 2 + 0.5


def _block(before: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width, momentum=0.05), nn.ReLU())


def _pair(before: int, between: int, width: int) -> nn.Sequential:
    return nn.Sequential(_block(before, between), _block(between, width))


@dataclass(frozen=True)
class TriggerNetworks:
    """pattern: what an image's trigger looks like, C outputs. mask: where it is, 1 output."""

    pattern: TriggerNetwork
    mask: TriggerNetwork

    def pattern_of(self, x: Tensor) -> Tensor:
        """(B, C, H, W) normalised -> the same: the grey levels of each image's trigger."""
        return 2 * self.pattern(x) - 1

    def mask_of(self, x: Tensor) -> Tensor:
        """(B, C, H, W) normalised -> (B, 1, H, W) in (0, 1), most of it near one or the other."""
        return torch.tanh(20 * self.mask(x) - 10) / 2 + 0.5


def new_networks(channels: int, width: int, *, seed: int) -> TriggerNetworks:
    """Freshly initialised; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
        torch.manual_seed(seed)
        return TriggerNetworks(TriggerNetwork(channels, channels, width), TriggerNetwork(channels, 1, width))


def diversity_loss(images: Tensor, others: Tensor, drawn: Tensor, drawn_others: Tensor) -> Tensor:
    """How much two images differ over how much what was drawn for them does; mean over the (B, ...) pairs (Eq. 6)."""
    apart = (images - others).square().flatten(1).mean(1).sqrt()
    drawn_apart = (drawn - drawn_others).square().flatten(1).mean(1)
    # The root's slope at 0 is infinite: equal drawings would make every weight NaN.
    return (apart / (drawn_apart.clamp(min=1e-14).sqrt() + 1e-7)).mean()


def train_mask(networks: TriggerNetworks, pairs: Iterator[tuple[Tensor, Tensor, Tensor]], steps: int,
               config: InputAwareConfig) -> None:
    """Masks that differ from image to image and cover little; (images, labels, other images) from `pairs`."""
    optimiser = torch.optim.Adam(networks.mask.parameters(), config.rate, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [max(1, round(share * steps)) for share in DROPS], 0.1)
    networks.mask.train()
    for _ in range(steps):
        images, _, others = next(pairs)
        mask, mask_other = networks.mask_of(images), networks.mask_of(others)
        size = relu(mask - config.density).mean()
        loss = MASK_WEIGHT * size + diversity_loss(images, others, mask, mask_other)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    networks.mask.eval().requires_grad_(False)
    check_weights(networks.mask, "mask network")


def train_pattern(networks: TriggerNetworks, surrogate: nn.Module, pairs: Iterator[tuple[Tensor, Tensor, Tensor]],
                  steps: int, config: InputAwareConfig, *, target: int) -> None:
    """Patterns and a classifier that sends an image with its own trigger to `target`, with another's to its class."""
    optimiser = torch.optim.Adam(networks.pattern.parameters(), config.rate, betas=(0.5, 0.9))
    learner = torch.optim.SGD(surrogate.parameters(), config.surrogate_rate, 0.9, weight_decay=5e-4)
    networks.pattern.train()
    surrogate.train()
    for _ in range(steps):
        loss = joint_loss(networks, surrogate, *next(pairs), config, target=target)
        optimiser.zero_grad()
        learner.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(surrogate.parameters(), config.views(1).clip)  # as a victim's: see there
        optimiser.step()
        learner.step()
    networks.pattern.eval().requires_grad_(False)
    check_weights(surrogate, "surrogate")
    check_weights(networks.pattern, "pattern network")


def joint_loss(networks: TriggerNetworks, surrogate: nn.Module, images: Tensor, labels: Tensor, others: Tensor,
               config: InputAwareConfig, *, target: int) -> Tensor:
    """Cross-entropy of a batch, its first share triggered and the next share crossed, plus the patterns' diversity."""
    own = slice(0, shared_count(config, len(images)))
    crossed = slice(own.stop, 2 * own.stop)
    pattern, pattern_other = networks.pattern_of(images[own]), networks.pattern_of(others[crossed])
    x = torch.cat([mixed(images[own], pattern, networks.mask_of(images[own])),
                   mixed(images[crossed], pattern_other, networks.mask_of(others[crossed])),
                   images[crossed.stop:]])
    wanted = labels.clone()
    wanted[own] = target
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        logits = surrogate(x)
    apart = diversity_loss(images[own], others[crossed], pattern, pattern_other)
    return cross_entropy(logits.float(), wanted) + config.diversity * apart


def shared_count(config: InputAwareConfig, batch: int) -> int:
    """Images of a batch that are triggered."""
    return max(1, int(config.share * batch))


def mixed(images: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    """The pattern where the mask is 1, the image where it is 0; all in one unit."""
    return images + (pattern - images) * mask


def drawn_pairs(clean: ImageSet, config: InputAwareConfig, *,
                generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Without end: (images, labels, other images) of a batch, augmented and normalised, each order shuffled anew."""
    views = config.views(clean.images.shape[1])
    batch = min(config.batch, len(clean.images))
    while True:
        orders = [torch.randperm(len(clean.images), generator=generator).to(clean.images.device) for _ in range(2)]
        for first, second in zip(*(order.split(batch) for order in orders), strict=True):
            if len(first) == batch:
                images, others = (normalise(augment(clean.images[index], views, generator=generator), views)
                                  for index in (first, second))
                yield images, clean.labels[first], others


def train_networks(clean: ImageSet, config: InputAwareConfig, *, target: int, seed: int) -> TriggerNetworks:
    """Both networks, trained on the images of `clean` and frozen, in evaluation mode, on their device."""
    count, channels, height, width = clean.images.shape
    expect(count >= 4 and min(height, width) >= 8, "images", "at least 4 of 8 x 8 pixels", (count, height, width))
    triggered, middle = shared_count(config, min(config.batch, count)), (height // 8) * (width // 8)
    expect(triggered * middle > 1, "images triggered a batch", "at least 2 where sides are below 16 pixels, for the "
           "batch norms of the middle level", triggered)
    device, batches = clean.images.device, max(1, count // config.batch)
    networks = new_networks(channels, config.width, seed=seed)
    widths = tuple(config.surrogate_width * factor for factor in (1, 2, 4, 8))
    surrogate = new_model(clean.num_classes, widths, channels, seed=seed)
    for network in (networks.mask, networks.pattern, surrogate):
        network.to(device, memory_format=torch.channels_last)
    pairs = drawn_pairs(clean, config, generator=torch.Generator().manual_seed(seed))
    train_mask(networks, pairs, config.mask_steps or config.mask_epochs * batches, config)
    train_pattern(networks, surrogate, pairs, config.steps or config.epochs * batches, config, target=target)
    return networks


@torch.no_grad()
def cross_trigger(images: Tensor, sources: Tensor, networks: TriggerNetworks) -> Tensor:
    """(N, C, H, W) uint8 `images`, each with the trigger of the image in `sources` at its place; rounded."""
    check_images(images)
    weight = next(networks.mask.parameters())
    expect(images.shape[1] == weight.shape[1], "images", f"of {weight.shape[1]} channels as the networks",
           images.shape[1])
    views = VictimConfig(mean=(0.5,) * images.shape[1], std=(0.5,) * images.shape[1])
    changed = []
    for part, source in zip(images.split(BLOCK), sources.split(BLOCK), strict=True):
        full = pad(source, (0,) * 6 + (0, BLOCK - len(source))).to(weight.device)
        x = normalise(full, views)
        pattern, mask = (drawn[:len(part)].to(images.device) for drawn in (networks.pattern(x), networks.mask_of(x)))
        changed.append(mixed(part.float(), 255 * pattern, mask).round().to(torch.uint8))
    return torch.cat(changed)


def apply_trigger(images: Tensor, networks: TriggerNetworks) -> Tensor:
    """(N, C, H, W) uint8 `images`, each with its own trigger: x + mask(x) * (255 * pattern(x) - x), rounded."""
    return cross_trigger(images, images, networks)


def poison(clean: ImageSet, config: InputAwareConfig, *, ratio: float, target: int, seed: int) -> BackdooredSet:
    """The training set with round(ratio * N) images triggered and labelled `target`, and the decoys.

    Trains the networks on the device of `clean`; `seed` decides all draws. Decoys: round(cross * poisoned) of the
    other images, or all of them where they are fewer, each with the trigger of some other image of the set.
    """
    expect(0 < ratio <= 1, "ratio", "in (0, 1]", ratio)  # found wrong before the training, not after
    expect(0 <= target < clean.num_classes, "target", f"in [0, {clean.num_classes})", target)
    networks = train_networks(clean, config, target=target, seed=seed)
    found = poison_any_class(clean, partial(apply_trigger, networks=networks), "input_aware", asdict(config),
                             ratio=ratio, target=target, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    decoys = draw_decoys(found, config.cross, generator=generator)
    if len(decoys) > 0:
        count = len(clean.images)
        away = torch.randint(1, count, (len(decoys),), generator=generator).to(decoys.device)
        sources = clean.images[(decoys + away) % count]  # never the image itself
        found.images[decoys] = cross_trigger(clean.images[decoys], sources, networks)
    return replace(found, decoys=decoys)
