"""D-VAE: poisoned training images without what makes them unlearnable, from nothing but themselves.

Paper: Yu et al., Purify Unlearnable Examples via Rate-Constrained Variational Autoencoders, ICML 2024
(arXiv:2405.01460), Algorithm 1. Stage 1, at a low rate, takes off most of the perturbation; stage 2, at a higher one,
takes off the rest and gives back what its code keeps of the image. Three inferences: stage 1 once, stage 2 twice.
Departs from the released code in: no classifier watches the training, as its losses were never added; on a
GPU the default is bfloat16, there float32; batches are as equal as can be, there the last, partial one is dropped.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data import resnet
from data.devices import carried, device_generator
from data.errors import expect
from data.files import fingerprint
from data.tensor_files import read_tensors, write_tensors
from defense import dvae_network, dvae_stage, training
from defense.deadline import Deadline
from defense.dvae_stage import (
    TERMS,
    StageConfig,
    reconstruction,
    train_stage,
    unit,
    without_perturbation,
)
from defense.purified import Purified, check_labelled
from defense.training import batch_count

INFERENCE_PIXELS = 500 * 32 * 32  # of the images that go through a trained network at once
PASS = 0.5         # of an epoch's time: one pass of all images through a network that learns nothing from it
ROUNDINGS = ("floor", "nearest")
NOT_FINITE = "not finite"  # in a result's details: numbers of the stages that NaN or infinity ended
FIRST_SHARE = 0.5  # of the time, for the first of two equal stages
CODE = (Path(__file__), *(Path(module.__file__) for module in (dvae_network, dvae_stage, training, resnet)))


@dataclass(frozen=True)
class DVAEConfig:
    first: StageConfig = field(default_factory=lambda: StageConfig(rate_limit=1.0))
    second: StageConfig = field(default_factory=lambda: StageConfig(rate_limit=3.0))
    stages: str = "both"     # both, first (only its subtraction) or second (only, on the images as given)
    rounding: str = "floor"  # of purified images to grey levels: floor as released (half a level darker), nearest
    sampled: bool = True     # codes drawn at inference too, as released; False = their means: less noise in the images
    perturbations: bool = True  # also give them: twice the memory of the images

    def __post_init__(self) -> None:
        expect(self.stages in ("both", "first", "second"), "DVAEConfig.stages", "both, first or second", self.stages)
        expect(self.rounding in ROUNDINGS, "DVAEConfig.rounding", " or ".join(ROUNDINGS), self.rounding)


@dataclass(frozen=True)
class StageOutput:
    """What a stage made of a set: (N, C, H, W) uint8 images and, where asked for, float16 perturbations in grey
    levels; else see `Stage`. spared: seconds of the earlier call that this one found it from."""

    images: Tensor
    perturbations: Tensor | None
    losses: dict[str, tuple[float, ...]]
    finite: bool
    complete: bool
    spared: float = 0.0


def purify(images: Tensor, labels: Tensor, config: DVAEConfig, *, generator: torch.Generator,
           deadline: Deadline | None = None, kept: Path | None = None,
           report: Callable[[str], None] | None = None, device: torch.device | None = None) -> Purified:
    """(N, C, H, W) uint8 images and their (N,) labels, all that is used of the world; the result on the same device.

    The perturbations are those of the first stage that ran: the published measure of what was disentangled.
    kept: a folder where a finished stage is written, and found again by its input, config, seed and code; `seconds`
    of the result count what it took then. report: gets a line an epoch. device: where the work is done; None = where
    the images are. Images elsewhere stay there, as does what is made of them, and go batch by batch: for sets that no
    GPU can hold. With a deadline, epochs are cut short; without time for one, the images come back as they are.
    """
    check_labelled(images, labels)
    labels = labels.long()  # as an index, uint8 would be a mask
    deadline = deadline or Deadline()
    seeds = torch.randint(1 << 62, (2,), generator=generator).tolist()  # a stage found again draws nothing
    stages = {"both": (1, 2), "first": (1,), "second": (2,)}[config.stages]
    found, perturbations, complete, losses = images, None, True, {}
    broken: list[int] = []
    spared = 0.0
    for number in stages:
        own = config.first if number == 1 else config.second
        time = deadline.part(FIRST_SHARE if number != stages[-1] else 1.0,
                             after=PASS * number * batch_count(len(images), own.batch))
        output = _kept_stage(number, found, labels, config, seeds[number - 1], time, kept, report,
                             device or images.device)
        losses |= {f"stage {number} {name}": values for name, values in output.losses.items()}
        broken += [] if output.finite else [number]
        spared += output.spared
        if not output.losses[TERMS[0]]:
            reason = "no time for an epoch" if output.finite else "no finite epoch"
            return Purified("dvae", images.clone(), complete=False, failed=f"stage {number}: {reason}", losses=losses,
                            seconds=deadline.elapsed() + spared, details={NOT_FINITE: broken})
        found, complete = output.images, complete and output.complete
        perturbations = output.perturbations if perturbations is None else perturbations
    return Purified("dvae", found, perturbations, complete=complete, losses=losses,
                    seconds=deadline.elapsed() + spared, details={NOT_FINITE: broken})


def _kept_stage(number: int, images: Tensor, labels: Tensor, config: DVAEConfig, seed: int, deadline: Deadline,
                kept: Path | None, report: Callable[[str], None] | None, device: torch.device) -> StageOutput:
    """`run_stage`, or its output of an earlier call."""
    run = partial(run_stage, number, images, labels, config, deadline=deadline, report=report, device=device,
                  generator=torch.Generator().manual_seed(seed))
    if kept is None:
        return run()
    content = hashlib.sha256(images.cpu().contiguous().numpy()).hexdigest()  # their repr would be thrice their size
    name = fingerprint(number, tuple(images.shape), content, labels.tolist(), config, seed, *CODE)
    path = kept / f"stage{number}-{name}.safetensors"
    if (found := _read(path, images.device)) is not None:
        return found
    before = deadline.elapsed()
    output = run()
    if output.complete:  # one cut short by its deadline is not what the next call asks for
        _write(path, output, deadline.elapsed() - before)
    return output


def run_stage(number: int, images: Tensor, labels: Tensor, config: DVAEConfig, *, generator: torch.Generator,
              deadline: Deadline | None = None, report: Callable[[str], None] | None = None,
              device: torch.device | None = None) -> StageOutput:
    """Train stage 1 or 2 on the images and put them through it: minus their perturbation, and (2) rebuilt from it.
    device: see `purify`."""
    device = device or images.device
    say = (lambda line: report(f"stage {number}, {line}")) if report else None
    stage = train_stage(images, labels, int(labels.max()) + 1, config.first if number == 1 else config.second,
                        generator=generator, deadline=deadline, report=say, device=device)
    noises = device_generator(device, generator=generator) if config.sampled else None
    found = torch.empty_like(images)
    perturbations = torch.empty_like(images, dtype=torch.float16) if config.perturbations else None
    size = inference_batch(*images.shape[2:])
    for part in (slice(start, start + size) for start in range(0, len(images), size)):
        of = carried(labels[part], device)
        x, perturbation = without_perturbation(stage.model, unit(carried(images[part], device)), of, generator=noises)
        x = x if number == 1 else reconstruction(stage.model, x, of, generator=noises)
        found[part] = grey_levels(x, config.rounding)
        if perturbations is not None:
            perturbations[part] = (255 * perturbation).half()
    return StageOutput(found, perturbations, stage.losses, stage.finite, stage.complete)


def inference_batch(height: int, width: int) -> int:
    """Images of that size that go through a trained network at once."""
    return max(1, INFERENCE_PIXELS // (height * width))


def grey_levels(images: Tensor, rounding: str) -> Tensor:
    """Floats in [0, 1] to uint8, cut or rounded."""
    levels = 255 * images
    return (levels.floor() if rounding == "floor" else levels.round()).to(torch.uint8)


def _write(path: Path, output: StageOutput, seconds: float) -> None:
    tensors = {"images": output.images}
    if output.perturbations is not None:
        tensors["perturbations"] = output.perturbations
    write_tensors(path, tensors, {"losses": output.losses, "seconds": seconds})


def _read(path: Path, device: torch.device) -> StageOutput | None:
    """None where there is no file yet, or a spoiled one: the stage is run again."""
    found = read_tensors(path)
    if found is None or "images" not in found[0] or not {"losses", "seconds"} <= found[1].keys():
        return None
    tensors = {name: tensor.to(device) for name, tensor in found[0].items()}
    losses = {name: tuple(values) for name, values in found[1]["losses"].items()}
    return StageOutput(tensors["images"], tensors.get("perturbations"), losses, True, True, found[1]["seconds"])
