"""Pictures inside the page: small copies as data addresses, bounded in all."""
from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from data.errors import InputError
from data.images import read_rgb

QUALITY = 70  # of WebP: no blocks that one sees at this size
# From nothing to the highest score; dark to light, so that it is read without colour too.
HEAT = np.array([(8, 8, 28), (76, 20, 104), (176, 48, 92), (240, 112, 48), (252, 200, 80), (255, 252, 220)], float)


class Album:
    """Small copies, up to `limit` bytes of the page in all; counts what it leaves out."""

    def __init__(self, limit: int, side: int) -> None:
        self.limit, self.side = limit, side  # bytes, pixels of the longer side
        self.bytes, self.left_out = 0, 0
        self.unreadable: list[str] = []
        self._known: dict[Path, str | None] = {}

    def file(self, path: Path) -> str | None:
        """The picture in a file; None where it cannot be read or there is no more room. A file is read once."""
        if path not in self._known:
            try:
                self._known[path] = _address(read_rgb(path), self.side)
            except InputError as problem:
                self.unreadable.append(str(problem))
                self._known[path] = None
        return self._counted(self._known[path])

    def image(self, image: Image.Image) -> str | None:
        return self._counted(_address(image, self.side))

    def _counted(self, address: str | None) -> str | None:
        if address is None:
            return None
        if self.bytes + len(address) > self.limit:
            self.left_out += 1
            return None
        self.bytes += len(address)
        return address

    def notes(self) -> list[str]:
        """What is missing, for the reader."""
        notes = [f"left out: {problem}" for problem in self.unreadable[:5]]
        if len(self.unreadable) > 5:
            notes.append(f"left out: {len(self.unreadable) - 5} more pictures that cannot be read")
        if self.left_out:
            notes.append(f"{self.left_out} pictures are left out: they would make the page larger than "
                         f"{self.limit / 2**20:.0f} MiB in this section")
        return notes


def _address(image: Image.Image, side: int) -> str:
    """`image` as a data address, its longer side at most `side` pixels."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def heat(scores: np.ndarray) -> Image.Image:
    """A map (H, W) of [0, 1] in colours, dark = 0."""
    steps = np.linspace(0, 1, len(HEAT))
    colours = [np.interp(np.clip(scores, 0, 1), steps, HEAT[:, channel]) for channel in range(3)]
    return Image.fromarray(np.rint(np.stack(colours, axis=-1)).astype(np.uint8))


def mask(truth: np.ndarray) -> Image.Image:
    """A mask (H, W) of bool, white = anomalous."""
    return Image.fromarray(np.where(truth, 255, 0).astype(np.uint8)).convert("RGB")
