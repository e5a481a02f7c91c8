"""What a defense is given - a model and clean images - checked, and the copy of the model it may change."""
from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.errors import InputError, expect

HALVES = (torch.float16, torch.bfloat16)  # too coarse for the small steps of a repair


@dataclass(frozen=True)
class Given:
    """model: a copy of its own, at least float32, every parameter trainable. images: (N, C, H, W) of its dtype.

    labels: (N,) int64 in [0, num_classes). Same device. missing: classes without a clean image, ascending.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    num_classes: int
    missing: tuple[int, ...]


def take(model: nn.Module, images: Tensor, labels: Tensor) -> Given:
    """Check what was given and copy the model; nothing given is changed.

    images: (N, C, H, W) float as the model takes them (resized and normalised), on any device. labels: (N,)
    integers. Models in 16 bits are worked on in float32, frozen ones are thawed in the copy; `give_back` undoes both.
    Classes without images are allowed and listed: tuning may forget them.
    """
    _check_model(model)
    _check_images(images, labels)
    ours = working_copy(model)
    first = next(p for p in ours.parameters() if p.is_floating_point())
    images = images.detach().to(first.device, first.dtype)
    num_classes = count_classes(ours, images[:2])
    lowest, highest = int(labels.min()), int(labels.max())
    expect(lowest >= 0 and highest < num_classes, "labels", f"in [0, {num_classes}), as the model has classes",
           f"{lowest} to {highest}")
    expect(len(images) > 1 or not any(isinstance(m, _BatchNorm) for m in ours.modules()), "images",
           "at least 2 for the batch norm of this model", len(images))
    counts = torch.bincount(labels.detach().long().cpu(), minlength=num_classes)
    missing = tuple((counts == 0).nonzero()[:, 0].tolist())
    return Given(ours, images, labels.detach().to(first.device, torch.int64), num_classes, missing)


def _check_model(model: nn.Module) -> None:
    expect(any(p.is_floating_point() for p in model.parameters()), "model", "floating-point parameters", "none")
    devices = sorted({str(p.device) for p in model.parameters()})
    expect(len(devices) == 1 and devices != ["meta"], "model", "its parameters on one device, not meta",
           ", ".join(devices))
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point():
            expect(tensor.detach().isfinite().all(), f"model {name!r}", "finite numbers", "NaN or infinity")


def _check_images(images: Tensor, labels: Tensor) -> None:
    expect(images.ndim == 4 and images.is_floating_point(), "images", "(N, C, H, W) of floating point",
           f"{tuple(images.shape)} {images.dtype}")
    expect(len(images) > 0, "images", "at least one", 0)
    expect(labels.shape == images.shape[:1], "labels", f"one for each of {len(images)} images", tuple(labels.shape))
    whole = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
    expect(whole, "labels", "whole numbers", labels.dtype)
    expect(images.isfinite().all(), "images", "finite numbers", "NaN or infinity")


def count_classes(model: nn.Module, images: Tensor) -> int:
    """K of the (B, K) logits that the model gives in evaluation mode, on its own device and in its own dtype."""
    first = next(p for p in model.parameters() if p.is_floating_point())
    images = images.to(first.device, first.dtype)
    shape = f"images {tuple(images.shape)}"
    try:
        with evaluation(model), torch.no_grad():
            logits = model(images)
    except Exception as error:  # it comes from a stranger and may fail in any way
        raise InputError(f"model: expected one that takes {shape}, found {type(error).__name__}: {error}") from None
    expect(isinstance(logits, Tensor), "model", f"one tensor of logits for {shape}", type(logits).__name__)
    expect(logits.ndim == 2 and len(logits) == len(images) and logits.shape[1] > 1, "model",
           f"logits of {len(images)} images by at least 2 classes", tuple(logits.shape))
    return logits.shape[1]


def working_copy(model: nn.Module) -> nn.Module:
    """An independent copy, 16-bit numbers widened to float32, every floating-point parameter trainable."""
    ours = copy.deepcopy(model)
    for tensor in chain(ours.parameters(), ours.buffers()):
        if tensor.dtype in HALVES:
            tensor.data = tensor.data.float()
    for parameter in ours.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.grad = None
    return ours


def give_back(ours: nn.Module, like: nn.Module) -> nn.Module:
    """The copy `ours` with the dtypes, `requires_grad` flags and training modes of the given model `like`."""
    for mine, given in zip(chain(ours.parameters(), ours.buffers()), chain(like.parameters(), like.buffers()),
                           strict=True):
        mine.data = mine.data.to(given.dtype)
        mine.grad = None
    for mine, given in zip(ours.parameters(), like.parameters(), strict=True):
        mine.requires_grad_(given.requires_grad)
    for mine, given in zip(ours.modules(), like.modules(), strict=True):
        mine.training = given.training
    return ours


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each module then has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def own_randomness(device: torch.device, *, generator: torch.Generator) -> Iterator[None]:
    """Gradients on, and the global generators, from which dropout draws, seeded by `generator` for a while."""
    seed = int(torch.randint(1 << 31, (), generator=generator))
    gpus = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed every GPU
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
