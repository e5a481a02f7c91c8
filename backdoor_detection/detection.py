"""The shipped detector: from a model and a folder of clean images to a verdict, before a deadline.

A few universal changes of the picture for each class (`universal.py`) and, in networks that can be cut, features pushed
freely (`free_features.py`); then the question whether the class that gets furthest stands out from the others, with
what both say taken together (`outlier.py`). How much is done is planned from a timed pass and stays within the time.
"""
from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from backdoor_detection.changed_images import ChangedImages
from backdoor_detection.clean_images import CleanImages, draw_balanced, read_clean_images
from backdoor_detection.free_features import STEPS, free_margins, pushed_images
from backdoor_detection.outlier import deleted_residual_p_value, fisher_p_value, outlier_p_value
from backdoor_detection.split_model import SplitModel, can_be_split, check_classes, frozen_copy, input_channels
from backdoor_detection.universal import Reach, UniversalConfig, screening_step, universal_reach
from data.devices import chosen_device
from data.errors import expect

SEED = 0            # of the images drawn for a shipped verdict
PLANNED = 0.7       # share of the time left that a plan may fill: later blocks may be slower than the timed one
BLOCK_SHARE = 0.1   # of the time left that one block may take, by the timed pass
TOGETHER, QUICK = 16, 0.5  # images timed at once, where one by one they would take fewer seconds than that
TRIES = 5           # passes of one image that are timed, two if they take longer than that together
SMALLEST_SIDE = 32  # pixels below which images are not shrunk to save time
FREELY = 8          # classes from which free features are judged: with fewer their null alarms too often by itself


@dataclass(frozen=True)
class DetectorConfig:
    """What a verdict does where time allows. alarm is the one constant that may be tuned; 0.05 is a convention."""

    alarm: float = 0.05          # backdoored below this p
    deadline_s: float = 55.0     # seconds from the call to the answer
    reach: UniversalConfig = field(default_factory=UniversalConfig)

    def __post_init__(self) -> None:
        expect(0 < self.alarm < 1, "DetectorConfig.alarm", "in (0, 1)", self.alarm)
        expect(self.deadline_s > 0, "DetectorConfig.deadline_s", "> 0 seconds", self.deadline_s)


@dataclass(frozen=True)
class Detection:
    """p_value: that one class stands out, small = suspicious. margins: (K,) CPU, under changes of the picture. suspect:
    the class that stands out most. p_values: of the changes and, where there was time, the network can be cut and has
    eight classes, of free features.

    kept: classes that were followed to the end. How far the time reached: `images` of pixels `side`, `steps` of
    the `steps_asked`; seconds in all.
    """

    backdoored: bool
    p_value: float
    margins: Tensor
    suspect: int
    kept: tuple[int, ...] = ()
    images: int = 0
    side: int = 0
    steps: int = 0
    steps_asked: int = 0
    seconds: float = 0.0
    p_values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Images, their shrinking (side divided by it), gradient steps of each change, classes to follow, changes, steps of
    free features."""

    images: int
    shrink: int
    steps: int
    kept: int
    changes: int
    free_steps: int

    def passes(self, num_classes: int) -> float:
        """Images through the network and back, in images of full size."""
        screened = num_classes / screening_step(self.images) if num_classes > self.kept else 0
        followed = min(self.kept, num_classes)
        sweeps = screened * (1 + self.steps) + followed * (1 + self.steps * self.changes)
        free = followed * self.free_steps * pushed_images(self.images)
        return (self.images * sweeps + free) / self.shrink ** 2


def detect(model: nn.Module, num_classes: int, images_folder: Path | str, transformation: Callable,
           config: DetectorConfig, *, generator: torch.Generator,
           clock: Callable[[], float] = time.perf_counter) -> Detection:
    """Judge `model` on its own device. Model, transform and global random state stay as they are.

    generator: on the CPU. Raises InputError for a folder without images, an unreadable image, a transform
    that fails or gives something else, and a class count that is not the model's.
    """
    start = clock()
    check_classes(model, num_classes)
    given = read_clean_images(images_folder, transformation, size=None, channels=input_channels(model),
                              generator=generator)
    network = frozen_copy(model)
    device = next(model.parameters()).device
    seconds = _seconds_per_image(network, given, device, clock)
    left = start + config.deadline_s - clock()
    free_steps = STEPS if num_classes >= FREELY and can_be_split(model) else 0
    plan = _fitting_plan(seconds, num_classes, left, given, config.reach, free_steps)
    reach = replace(config.reach, images=plan.images, steps=plan.steps, kept=plan.kept,
                    block=_timely_block(seconds, left, given, config.reach))
    pixels, labels = _chosen(network, given, plan, num_classes, device, generator=generator)
    images = ChangedImages(network, pixels, labels, given.std.to(device), num_classes, reach.block)
    late = _Deadline(start + config.deadline_s, device, clock)
    found = universal_reach(images, reach, late=late)
    verdicts = [standing_out(found)]
    if plan.free_steps:
        margins = free_margins(SplitModel(model), pixels, found.kept, num_classes, block=reach.block, late=late)
        verdicts += [] if margins is None else [standing_out_freely(margins.cpu(), found)]
    p_value = fisher_p_value([p for p, _ in verdicts])
    return Detection(p_value < config.alarm, p_value, found.margins, min(verdicts)[1], found.kept, len(pixels),
                     pixels.shape[-1], found.steps, config.reach.all_steps, clock() - start,
                     tuple(p for p, _ in verdicts))


def judge(model: nn.Module, num_classes: int, images_folder: Path | str, transformation: Callable) -> Detection:
    """The shipped verdict: fixed settings, a fixed draw of images, a copy of `model` on the chosen device."""
    generator = torch.Generator().manual_seed(SEED)
    on_device = copy.deepcopy(model).to(chosen_device())
    return detect(on_device, num_classes, images_folder, transformation, DetectorConfig(), generator=generator)


class _Deadline:
    """Called between blocks: True where another, half as long again as the longest so far, would end after `end`."""

    def __init__(self, end: float, device: torch.device, clock: Callable[[], float]) -> None:
        self.end, self.device, self.clock = end, device, clock
        self.longest, self.last = 0.0, clock()

    def __call__(self) -> bool:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else the clock would time the queueing alone
        now = self.clock()
        self.longest, self.last = max(self.longest, now - self.last), now
        return now + 1.5 * self.longest > self.end


def standing_out(found: Reach) -> tuple[float, int]:
    """p that the class which reached furthest, in the mean over the changes, stands out from those that stand for all;
    and that class.

    1 where nothing can be compared: fewer than three classes, or margins that are not finite.
    """
    return _furthest(found.margins[[*found.kept]], found, deleted_residual_p_value)


def standing_out_freely(margins: Tensor, found: Reach) -> tuple[float, int]:
    """The same of (len(kept),) margins of free features, with the report's null; 1 where nothing can be compared."""
    return _furthest(margins, found, outlier_p_value)


def _furthest(margins: Tensor, found: Reach, p_value: Callable[[Tensor, int], float]) -> tuple[float, int]:
    """p and class of the largest of (len(kept),) margins, beside those that stand for all."""
    by_class = dict(zip(found.kept, margins, strict=True))
    furthest = max(found.kept, key=lambda k: float(by_class[k]))
    compared = sorted({furthest, *found.null})
    if len(compared) < 3 or not margins.isfinite().all():
        return 1.0, furthest
    return p_value(torch.stack([by_class[k] for k in compared]), found.margins.numel()), furthest


def _chosen(network: nn.Module, given: CleanImages, plan: Plan, num_classes: int, device: torch.device, *,
            generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The plan's images on the device, and their labels: as named, else as the network sees them."""
    places = draw_balanced(given.labels.tolist(), plan.images, generator=generator)
    pixels = given.pixels[places].to(device)
    labels = given.labels[places].to(device)
    if plan.shrink > 1:
        pixels = avg_pool2d(pixels, plan.shrink)
    unknown = (labels < 0) | (labels >= num_classes)
    if unknown.any():
        with torch.no_grad():
            labels = torch.where(unknown, network(pixels).argmax(1), labels)
    return pixels, labels


def _seconds_per_image(network: nn.Module, given: CleanImages, device: torch.device,
                       clock: Callable[[], float]) -> float:
    """Of a pass forward and back: of one image, and where that is quick of some at once, as they will be run.

    The least of some: the first warms up, and on a busy machine one may wait longer than it works.
    """
    single: list[float] = []
    while len(single) < 2 or (len(single) < TRIES and sum(single) < QUICK):
        single.append(_pass_seconds(network, given.pixels[:1], device, clock))
    seconds = min(single)
    together = min(TOGETHER, len(given.pixels))
    if together > 1 and seconds * together < QUICK:
        seconds = min(seconds, _pass_seconds(network, given.pixels[:together], device, clock) / together)
    return seconds


def _pass_seconds(network: nn.Module, pixels: Tensor, device: torch.device, clock: Callable[[], float]) -> float:
    begin = clock()
    free = pixels.to(device).clone(memory_format=torch.channels_last).requires_grad_(True)
    (gradient,) = torch.autograd.grad(network(free).sum(), free)
    gradient.sum().item()  # waits for the device
    return clock() - begin


def _fitting_plan(seconds: float, num_classes: int, left: float, given: CleanImages, asked: UniversalConfig,
                  free_steps: int) -> Plan:
    """The most thorough plan that fits the time, else the quickest."""
    images = min(asked.images, len(given.pixels))
    side = min(given.pixels.shape[-2:])
    pair = min(2, images)  # of two labels, so that every class has images of another
    plans = [Plan(max(pair, images // fewer), shrink, max(1, asked.steps // fewer), max(5, asked.kept // fewer),
                  len(asked.changes), free_steps)
             for shrink in (1, 2, 4) if shrink == 1 or side // shrink >= SMALLEST_SIDE for fewer in (1, 2, 4)]
    plans.sort(key=lambda plan: -plan.passes(num_classes))
    return next((plan for plan in plans if plan.passes(num_classes) * seconds <= PLANNED * left), plans[-1])


def _timely_block(seconds: float, left: float, given: CleanImages, asked: UniversalConfig) -> int:
    """Pixel values through the network at once: of a time that the deadline can be asked in between."""
    images = BLOCK_SHARE * left / max(seconds, 1e-9)
    return max(1, min(asked.block, int(images * given.pixels[0].numel())))
