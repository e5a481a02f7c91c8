"""Labelled sets of small images, each loaded once into one contiguous uint8 tensor.

Every reader returns (train, test). Greyscale sets come as RGB with three equal channels, so that one
network fits all sets.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.datasets import MNIST

from data.errors import InputError, expect
from data.images import list_images, read_rgb, to_uint8
from data.threads import in_threads

DIGITS_TEST_SHARE = 0.2  # of the 1,797 images; scikit-learn names no split of its own


@dataclass(frozen=True)
class ImageSet:
    """images: (N, C, H, W) uint8, contiguous. labels: (N,) int64 in [0, num_classes). Same device."""

    images: Tensor
    labels: Tensor
    num_classes: int
    name: str

    def __post_init__(self) -> None:
        expect(self.images.ndim == 4 and self.images.dtype == torch.uint8, f"{self.name} images",
               "(N, C, H, W) uint8", f"{tuple(self.images.shape)} {self.images.dtype}")
        expect(self.labels.shape == self.images.shape[:1], f"{self.name} labels",
               f"one for each of {len(self.images)} images", tuple(self.labels.shape))
        expect(len(self.images) > 0, f"{self.name} images", "at least one", 0)
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        expect(lowest >= 0 and highest < self.num_classes, f"{self.name} labels",
               f"in [0, {self.num_classes})", f"{lowest} to {highest}")

    def to(self, device: torch.device) -> ImageSet:
        """The same set on `device`."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.num_classes, self.name)

    def subset(self, index: Tensor) -> ImageSet:
        """The images at `index`, in that order."""
        return ImageSet(self.images[index], self.labels[index], self.num_classes, self.name)


def read_digits(*, seed: int = 0, size: int = 16) -> tuple[ImageSet, ImageSet]:
    """scikit-learn's 8x8 handwritten digits, enlarged to `size`; a fifth, drawn by `seed`, is the test set.

    At 32 pixels they look no different, and networks and detector take four times as long.
    """
    from sklearn.datasets import load_digits  # slow to import, and only this reader needs it

    bunch = load_digits()
    levels = torch.from_numpy(bunch.images).float().unsqueeze(1) * (255 / 16)  # stored as 0..16
    large = interpolate(levels, (size, size), mode="bilinear", align_corners=False)
    images = large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    whole = ImageSet(images, torch.from_numpy(bunch.target).long(), 10, "digits")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    cut = int(DIGITS_TEST_SHARE * len(images))
    return whole.subset(order[cut:]), whole.subset(order[:cut])


def read_mnist(root: Path, *, size: int = 32) -> tuple[ImageSet, ImageSet]:
    """MNIST from `root/MNIST/raw/*-ubyte` (nothing is downloaded), padded from 28 to 32, resized (bilinear), as RGB."""
    return _mnist_half(root, size, train=True), _mnist_half(root, size, train=False)


def _mnist_half(root: Path, size: int, train: bool) -> ImageSet:
    try:
        half = MNIST(str(root), train=train, download=False)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{root}: expected MNIST/raw/*-ubyte files, found {error}") from None
    images = pad(half.data.unsqueeze(1), (2, 2, 2, 2))
    if size != images.shape[2]:
        images = interpolate(images, (size, size), mode="bilinear", antialias=True)
    images = images.expand(-1, 3, -1, -1).contiguous()
    return ImageSet(images, half.targets.long(), 10, "mnist")


def read_image_folder(root: Path, *, size: int = 32) -> tuple[ImageSet, ImageSet]:
    """`root/train/<class>/*` and `root/test/<class>/*`; classes are numbered in the order of their names.

    Images of another size are resized (bilinear). A missing or empty folder, a class of the test set that
    the training set lacks, and an unreadable image are named.
    """
    root = Path(root)
    classes = [folder.name for folder in _class_folders(root / "train")]
    expect(len(classes) >= 2, root / "train", "at least two class folders", len(classes))
    return tuple(_folder_half(root, half, classes, size) for half in ("train", "test"))


def _class_folders(folder: Path) -> list[Path]:
    expect(folder.is_dir(), folder, "a folder of class folders", "no such folder")
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _folder_half(root: Path, half: str, classes: Sequence[str], size: int) -> ImageSet:
    paths, labels = [], []
    for folder in _class_folders(root / half):
        expect(folder.name in classes, folder, f"a class that {root / 'train'} has", folder.name)
        found = list_images(folder)
        expect(found, folder, "at least one image", "none")
        paths += found
        labels += [classes.index(folder.name)] * len(found)
    expect(paths, root / half, "at least one image", "none")
    return ImageSet(read_images(paths, size), torch.tensor(labels), len(classes), root.name)


def read_images(paths: Sequence[Path], size: int) -> Tensor:
    """(N, 3, size, size) uint8 of the files, decoded in threads straight into one tensor."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)

    def decode(i: int) -> None:
        image = read_rgb(paths[i])
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        images[i] = to_uint8(image)

    in_threads(decode, range(len(paths)))
    return images
