"""Reader of the organizers' anomaly folders: `ROOT/<category>/test/<kind>/<image>`, masks beside under `ground_truth`.

What is wrong with one image or one category is named and stops that one only.
Masks belong to images by name (same stem, or stem + "_mask"); where no name of a kind fits, by sorted order if the
numbers agree, as the organizers pair them.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as transforms

from data.errors import InputError, expect
from data.images import list_images, read_rgb

GOOD = "good"
SPLIT = "test"  # the one split the organizers have
MASKS = "ground_truth"
SIDE = 224  # pixels of the maps and of the masks they are compared with


@dataclass(frozen=True)
class AnomalyImage:
    path: Path
    kind: str  # name of its folder: "good" or a defect
    mask: Path | None  # None for good images and where the category has no masks

    @property
    def is_anomaly(self) -> bool:
        return self.kind != GOOD


@dataclass(frozen=True)
class Category:
    name: str
    images: tuple[AnomalyImage, ...]  # kinds sorted, files sorted in each
    has_masks: bool  # without masks only image scores can be judged


@dataclass(frozen=True)
class Tree:
    categories: tuple[Category, ...]  # sorted by name; what stands
    problems: tuple[InputError, ...]  # what does not, one error each


def read_tree(root: Path | str) -> Tree:
    """The categories under `root`. Only an unusable root is raised; all else is listed in `problems`.

    Images are listed, not opened; `check_category` opens them.
    """
    root = Path(root)
    expect(root.is_dir(), root, "a folder of categories", "no such folder" if not root.exists() else "a file")
    folders = _folders(root)
    expect(folders, root, "a folder of categories", "no folder in it")
    categories, problems = [], []
    for folder in folders:
        category, found = _read_category(folder)
        problems += found
        if category is not None:
            categories.append(category)
    return Tree(tuple(categories), tuple(problems))


def _folders(parent: Path) -> list[Path]:
    return sorted(p for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))


def _read_category(folder: Path) -> tuple[Category | None, list[InputError]]:
    """The category with all images that stand, None if there is none, and what was found wrong."""
    try:
        expect((folder / SPLIT).is_dir(), folder, f"a folder '{SPLIT}'", "none")
        kinds = _folders(folder / SPLIT)
        expect(kinds, folder / SPLIT, f"a folder for each kind ('{GOOD}' or a defect)", "none")
    except InputError as error:
        return None, [error]
    has_masks = (folder / MASKS).is_dir()
    images, problems = [], _stray_masks(folder, kinds) if has_masks else []
    for kind in kinds:
        found, wrong = _read_kind(kind, folder / MASKS / kind.name if has_masks and kind.name != GOOD else None)
        images += found
        problems += wrong
    return (Category(folder.name, tuple(images), has_masks) if images else None), problems


def _stray_masks(folder: Path, kinds: list[Path]) -> list[InputError]:
    """Mask folders of good images, and of kinds that have no images."""
    known, wrong = {k.name for k in kinds}, []
    for masks in _folders(folder / MASKS):
        if masks.name == GOOD and list_images(masks):
            wrong.append(InputError(f"{masks}: expected no masks for good images, found {len(list_images(masks))}"))
        elif masks.name not in known:
            wrong.append(InputError(f"{masks}: expected images in {folder / SPLIT / masks.name}, found no such folder"))
    return wrong


def _read_kind(folder: Path, masks: Path | None) -> tuple[list[AnomalyImage], list[InputError]]:
    """The images of one kind, each with its mask if `masks` names their folder."""
    paths = list_images(folder)
    if not paths:
        return [], [InputError(f"{folder}: expected images, found none")]
    wrong = []
    for stem, count in Counter(p.stem for p in paths).items():
        if count > 1:  # their score files would be one file
            names = ", ".join(p.name for p in paths if p.stem == stem)
            wrong.append(InputError(f"{folder}: expected different stems, found {names}"))
            paths = [p for p in paths if p.stem != stem]
    if masks is None:
        return [AnomalyImage(p, folder.name, None) for p in paths], wrong
    pairs, unpaired = _paired(paths, list_images(masks) if masks.is_dir() else [], masks)
    return [AnomalyImage(p, folder.name, m) for p, m in pairs], wrong + unpaired


def _paired(paths: list[Path], masks: list[Path], folder: Path) -> tuple[list[tuple[Path, Path]], list[InputError]]:
    """Images with their masks, and the images and masks that are left over."""
    by_stem = {}
    for mask in masks:
        by_stem.setdefault(mask.stem, mask)
    named = [(p, by_stem.get(p.stem) or by_stem.get(p.stem + "_mask")) for p in paths]
    if not any(m for _, m in named) and len(paths) == len(masks):
        return list(zip(paths, masks, strict=True)), []
    pairs = [(p, m) for p, m in named if m]
    wrong = [InputError(f"{p}: expected a mask '{p.stem}' or '{p.stem}_mask' in {folder}, found none")
             for p, m in named if not m]
    taken = {m for _, m in pairs}
    wrong += [InputError(f"{m}: expected an image of the same name, found none") for m in masks if m not in taken]
    return pairs, wrong


def check_category(category: Category) -> tuple[Category | None, tuple[InputError, ...]]:
    """Open every image and mask. Returns the category without those that fail, None if none is left, and the errors."""
    good, problems = [], []
    for image in category.images:
        try:
            _check_image(image)
            good.append(image)
        except InputError as error:
            problems.append(error)
    left = Category(category.name, tuple(good), category.has_masks) if good else None
    return left, tuple(problems)


def _check_image(image: AnomalyImage) -> None:
    """Refuse an image or a mask that cannot be read, or a mask of another size than its image, both as stored."""
    size = read_rgb(image.path, upright=False).size
    if image.mask is not None:
        found = _open_mask(image.mask).size
        expect(found == size, image.mask, f"{size[0]}x{size[1]}, the size of {image.path.name}",
               f"{found[0]}x{found[1]}")


def _open_mask(path: Path) -> Image.Image:
    read_rgb(path)  # names what cannot be read
    with Image.open(path) as mask:
        return mask.convert("L")


def read_mask(path: Path | str) -> Tensor:
    """(1, 224, 224) bool, True = anomalous, by the organizers' transform: gray, squashed bilinearly, above 0."""
    small = transforms.resize(_open_mask(Path(path)), [SIDE, SIDE])
    return transforms.to_tensor(transforms.center_crop(small, [SIDE, SIDE])) > 0


def pixel_truth(category: Category) -> Tensor:
    """(N, 1, 224, 224) bool in the order of the images; good images have no anomalous pixel."""
    expect(category.has_masks, category.name, f"a folder '{MASKS}'", "none")
    nothing = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    return torch.stack([nothing if image.mask is None else read_mask(image.mask) for image in category.images])


def image_truth(category: Category) -> Tensor:
    """(N,) bool in the order of the images: True = anomalous."""
    return torch.tensor([image.is_anomaly for image in category.images])
