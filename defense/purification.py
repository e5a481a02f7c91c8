"""The shipped purification: from a folder of poisoned training images to one of purified ones, before a deadline."""
from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data.devices import chosen_device, free_bytes
from data.errors import InputError, expect
from data.images import SUFFIXES, read_rgb, to_uint8
from data.threads import in_threads
from defense.deadline import Deadline
from defense.dvae import NOT_FINITE, DVAEConfig, purify
from defense.dvae_network import NetworkConfig
from defense.dvae_stage import StageConfig
from defense.purified import Purified

SEED = 0            # of every shipped purification
LIMIT_S = 3 * 3600  # for a whole set
MARGIN = 0.05       # of the limit: reading, writing, the last step
ROOM = 0.5          # share of the free memory that the images may take on a GPU: the rest is for the network
SETS = 3            # what they take there: they themselves, and what either stage makes of them
LARGE = 64          # pixels a side: beyond, the layers published for ImageNet
LARGE_BATCH = 32    # of such images, a quarter of the published: at 224 pixels 128 take 22 GiB


def shipped_config(height: int, width: int) -> DVAEConfig:
    """As published for small images; larger ones get three halvings, fewer epochs and their own first rate."""
    if max(height, width) <= LARGE:
        return DVAEConfig(perturbations=False)
    deep = StageConfig(epochs=20, batch=LARGE_BATCH, network=NetworkConfig(halvings=3))
    return DVAEConfig(replace(deep, rate_limit=1.5), replace(deep, rate_limit=3.0), perturbations=False)


def purify_folder(train_folder: Path | str, out_folder: Path | str, *, generator: torch.Generator,
                  config: DVAEConfig | None = None, limit_s: float = LIMIT_S,
                  clock: Callable[[], float] = time.perf_counter,
                  report: Callable[[str], None] | None = None) -> Purified:
    """Purify `train_folder`/<class>/**/<image> into `out_folder`, the same tree of PNG files, within `limit_s` seconds.

    Images of one size, RGB out; those of a set too large for the GPU go there batch by batch. `out_folder` must not
    exist, nor lie in `train_folder`; it appears when all files are written. Work lies in `.NAME.partial` beside it:
    finished stages are found there when the call is made again, with a new `limit_s`. config: None = `shipped_config`.
    A class folder without images, mixed sizes and unreadable files are named. Folders within class folders that are
    links are not followed.
    """
    deadline = Deadline((1 - MARGIN) * limit_s, clock=clock)
    expect(limit_s > 0, "limit_s", "> 0 seconds", limit_s)
    root, out = Path(train_folder), Path(out_folder)
    _check_out(out, root)
    files, labels = tree_images(root)
    device = chosen_device()
    images = placed(read_equal(files), device)
    kept = _work_folder(out)
    found = purify(images, labels.to(images.device), config or shipped_config(*images.shape[2:]), generator=generator,
                   deadline=deadline.part(1.0), kept=kept / "stages", report=report, device=device)
    broken = found.details[NOT_FINITE]
    expect(not found.failed, root, "images that give finite numbers in training" if broken else
           f"time enough to purify within {limit_s:g} s", found.failed)
    if not found.complete:
        why = f"NaN or infinity in stage {broken[0]}" if broken else f"the limit of {limit_s:g} s"
        warnings.warn(f"{root}: {why} cut the training short: {_epochs(found)}", stacklevel=2)
    _publish(_written(found.images.cpu(), [file.relative_to(root) for file in files], out), out)
    _clear(kept)
    return found


def placed(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images on the device, or where they are if it has no room for them."""
    return images.to(device) if SETS * images.numel() <= ROOM * free_bytes(device) else images


def _check_out(out: Path, root: Path) -> None:
    expect(not os.path.lexists(out), out, "a path where nothing lies yet", "an existing file or folder")
    expect(out.name != "..", out, "a new folder's name at the end", "..")
    inside = root.resolve() in out.resolve().parents
    expect(not inside, out, f"a path outside {root}, which stays as it is", "one inside")


def _work_folder(out: Path) -> Path:
    kept = out.parent / f".{out.name}.partial"
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: expected a path where a folder can be made, found {error.strerror}") from None
    writable = all(os.access(folder, os.W_OK | os.X_OK) for folder in (kept.parent, kept))
    expect(writable, out, f"{kept} and the folder around it to be writable", "they are not")
    return kept


def _written(images: Tensor, files: Sequence[Path], out: Path) -> Path:
    """A new folder that holds the images: each call its own, should two work at once."""
    scratch = Path(tempfile.mkdtemp(dir=_work_folder(out), prefix="images-"))  # another call may have cleared it away
    try:
        _write_tree(images, files, scratch)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return scratch


def _clear(kept: Path) -> None:
    """Remove the finished stages, and the folders unless another call works in them."""
    for stage in (kept / "stages").glob("stage*"):
        stage.unlink(missing_ok=True)
    for folder in (kept / "stages", kept):
        with suppress(OSError):
            folder.rmdir()


def _publish(scratch: Path, out: Path) -> None:
    """Give the finished tree its name, unless something took that meanwhile."""
    os.chmod(scratch, 0o755)  # mkdtemp gives 0700; results are for everyone to read
    expect(not os.path.lexists(out), out, f"nothing there still; the purified images lie in {scratch}",
           "a file or folder that was made meanwhile")
    os.replace(scratch, out)


def tree_images(root: Path) -> tuple[list[Path], Tensor]:
    """(files sorted by class and name, (N,) their classes in the order of the class folders' names)."""
    expect(root.is_dir(), root, "a folder of class folders", "no such folder")
    classes = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    expect(classes, root, "at least one class folder", "none")
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(classes):
        own = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir()
                     and not any(part.startswith(".") for part in p.relative_to(root).parts))
        expect(own, folder, "at least one image", "none")
        files += own
        labels += [label] * len(own)
    return files, torch.tensor(labels)


def read_equal(files: Sequence[Path]) -> Tensor:
    """(N, 3, H, W) uint8 of files of one size, decoded in threads straight into one tensor."""
    width, height = read_rgb(files[0]).size
    images = torch.empty(len(files), 3, height, width, dtype=torch.uint8)

    def decode(i: int) -> None:
        image = read_rgb(files[i])
        expect(image.size == (width, height), files[i], f"{width} x {height} pixels as {files[0].name}, all images of "
               "one size: resize them first", f"{image.width} x {image.height}")
        images[i] = to_uint8(image)

    in_threads(decode, range(len(files)))
    return images


def png_names(files: Sequence[Path]) -> list[Path]:
    """The files' names ending in .png; those that would coincide keep their own ending before it."""
    full: set[Path] = set()
    while True:
        names = [Path(f"{file}.png") if file in full else file.with_suffix(".png") for file in files]
        counts = Counter(names)
        more = {file for file, name in zip(files, names, strict=True) if counts[name] > 1} - full
        if not more:  # else a longer name may be another file's shorter one
            return names
        full |= more


def _write_tree(images: Tensor, files: Sequence[Path], folder: Path) -> None:
    names = png_names(files)
    for parent in {folder / name.parent for name in names}:
        parent.mkdir(parents=True, exist_ok=True)

    def write(i: int) -> None:
        Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(folder / names[i])

    in_threads(write, range(len(files)))


def _epochs(found: Purified) -> str:
    return ", ".join(f"{len(values)} epochs of {name.rsplit(' ', 1)[0]}" for name, values in found.losses.items()
                     if name.endswith("image"))
