"""Running a transform that came with a model from strangers: it may be random, and may fail in any way."""
from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from data.errors import InputError
from data.images import read_rgb


@contextmanager
def seeded_transforms(*, generator: torch.Generator) -> Iterator[None]:
    """The global generators of torch and of Python, which torchvision's transforms draw from, seeded for a while."""
    seed = int(torch.randint(1 << 31, (), generator=generator))
    before = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed every GPU
            random.seed(seed)
            yield
    finally:
        random.setstate(before)


def transformed(path: Path, transformation: Callable) -> object:
    """What the transform makes of the image in `path`, read as RGB; InputError with the path where it fails."""
    image = read_rgb(path)
    try:
        return transformation(image)
    except Exception as error:
        raise InputError(f"{path}: expected a transform that takes this image, "
                         f"found {type(error).__name__}: {error}") from None
