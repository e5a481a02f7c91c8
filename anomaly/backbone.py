"""Patch features of a vision transformer: one (N, L, D) tensor a layer, with the grid and the class features.

Any timm vision transformer will do. Preprocessing travels with the weights in `config.json`.
Layers are 0-based block indices. DINOv2-type nets put their last norm on every chosen layer, CLIP-type nets give the
raw residual stream, as MuSc (Li et al., ICLR 2024, arXiv:2401.16753) reads them.
Departs from it: the grid is carried, so an input need not be square; one forward pass serves patches and class.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from data.errors import InputError, expect
from data.images import to_uint8

EMBEDDED = Path(__file__).parent / "weights" / "backbone"
INTERPOLATION = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class BackboneConfig:
    architecture: str  # a name of timm.create_model
    layers: tuple[int, ...]  # blocks whose outputs are features, 0-based, ascending
    size: tuple[int, int]  # input height and width in pixels; images are squashed to it
    mean: tuple[float, float, float]  # of each channel, for images in [0, 1]
    std: tuple[float, float, float]
    interpolation: str = "bilinear"
    final_norm: bool = True  # the net's last norm on every layer (DINO, DINOv2) or the raw stream (CLIP)
    class_features: bool = True  # whether the class token was trained to tell images apart
    arguments: dict = field(default_factory=dict)  # further arguments of timm.create_model

    def __post_init__(self) -> None:
        for name in ("layers", "size", "mean", "std"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        where = "BackboneConfig."
        ascending = list(self.layers) == sorted(set(self.layers)) and self.layers and self.layers[0] >= 0
        expect(ascending, where + "layers", "ascending block indices from 0", self.layers)
        expect(len(self.size) == 2 and min(self.size) > 0, where + "size", "height and width", self.size)
        expect(len(self.mean) == len(self.std) == 3, where + "mean, std", "3 numbers each", (self.mean, self.std))
        expect(min(self.std) > 0, where + "std", "positive numbers", self.std)
        expect(self.interpolation in INTERPOLATION, where + "interpolation", sorted(INTERPOLATION), self.interpolation)


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# The two nets of the report, at its size and with its layers. 518 pixels are 37 x 37 patches of 14.
DINOV2_LARGE = BackboneConfig("vit_large_patch14_dinov2", (5, 11, 17, 23), (518, 518), IMAGENET_MEAN, IMAGENET_STD,
                              arguments={"dynamic_img_size": True})
CLIP_LARGE = BackboneConfig("vit_large_patch14_clip_quickgelu_336", (5, 11, 17, 23), (518, 518), CLIP_MEAN, CLIP_STD,
                            "bicubic", final_norm=False,
                            arguments={"dynamic_img_size": True, "num_classes": 768})


@dataclass(frozen=True)
class Features:
    layers: tuple[Tensor, ...]  # (N, L, D) each, in the order of the config
    grid: tuple[int, int]  # rows and columns of patches, L = rows * columns
    classes: Tensor  # (N, C), unit length


class Backbone(nn.Module):
    """A timm vision transformer that gives patch features."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.net = timm.create_model(config.architecture, pretrained=False, **{"num_classes": 0} | config.arguments)
        blocks = len(self.net.blocks)
        expect(config.layers[-1] < blocks, "BackboneConfig.layers", f"indices below {blocks}", config.layers)
        patch = self.net.patch_embed.patch_size
        fits = all(side % step == 0 for side, step in zip(config.size, patch, strict=True))
        expect(fits, "BackboneConfig.size", f"multiples of the patch {patch}", config.size)
        self.grid = (config.size[0] // patch[0], config.size[1] // patch[1])

    def forward(self, images: Tensor) -> Features:
        """Features of (N, 3, H, W) images, uint8 or float in [0, 1], of the size of the config."""
        expect(images.ndim == 4 and tuple(images.shape[1:]) == (3, *self.config.size), "images.shape",
               f"(N, 3, {self.config.size[0]}, {self.config.size[1]})", tuple(images.shape))
        last, layers = self.net.forward_intermediates(
            self.normalised(images), indices=list(self.config.layers), norm=self.config.final_norm, output_fmt="NLC")
        return Features(tuple(layers), self.grid, normalize(self.net.forward_head(last), dim=-1))

    def normalised(self, images: Tensor) -> Tensor:
        """What the net takes: channels with the mean and deviation of its training data."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.config.mean, self.config.std))
        return (images - mean) / std

    def prepared(self, image: Image.Image) -> Tensor:
        """(3, H, W) uint8 of an RGB image, squashed to the input size (no aspect kept)."""
        height, width = self.config.size
        return to_uint8(image.resize((width, height), INTERPOLATION[self.config.interpolation]))


def random_backbone(config: BackboneConfig, *, seed: int) -> Backbone:
    """A backbone with fresh weights. The global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # timm initialises from the global state only
        return Backbone(config).eval()


def load_backbone(folder: Path = EMBEDDED, *, device: torch.device | str = "cpu") -> Backbone:
    """The backbone whose `config.json` and `model.safetensors` lie in `folder`; a wrong or missing file is named."""
    config = _read_config(folder / "config.json")
    weights = folder / "model.safetensors"
    expect(weights.is_file(), weights, "the weights of the backbone", "no such file")
    backbone = random_backbone(config, seed=0)
    state = {name: value.float() for name, value in load_file(weights).items()}
    _check_names(weights, set(backbone.net.state_dict()), set(state))
    try:
        backbone.net.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{weights}: expected the shapes of {config.architecture}, found {reason}") from None
    return backbone.to(device)


def _read_config(path: Path) -> BackboneConfig:
    expect(path.is_file(), path, "the description of a backbone", "no such file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, found {error}") from None
    expect(isinstance(values, dict), path, "a JSON object", type(values).__name__)
    known = {f.name for f in fields(BackboneConfig)}
    expect(values.keys() <= known, path, f"keys among {sorted(known)}", sorted(values.keys() - known))
    try:
        return BackboneConfig(**values)
    except TypeError as error:
        raise InputError(f"{path}: expected the fields of a backbone, found {error}") from None


def _check_names(path: Path, expected: set[str], found: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    expect(not missing and not extra, path, "exactly the tensors of the architecture",
           f"missing {missing[:3]}, extra {extra[:3]}")


def config_record(config: BackboneConfig) -> dict:
    """The config as `config.json` holds it."""
    return asdict(config)


@torch.inference_mode()
def extract(backbone: Backbone, images: Sequence[Image.Image] | Tensor, *, batch: int = 16) -> Features:
    """Features of many images: RGB images of any size, or (N, 3, H, W) ready ones. On the backbone's device."""
    expect(len(images) > 0, "images", "at least one image", 0)
    device = next(backbone.parameters()).device
    parts = []
    for start in range(0, len(images), batch):
        chunk = images[start:start + batch]
        if not isinstance(chunk, Tensor):
            chunk = torch.stack([backbone.prepared(image) for image in chunk])
        parts.append(backbone(chunk.to(device)))
    layers = tuple(torch.cat(same) for same in zip(*(p.layers for p in parts), strict=True))
    return Features(layers, parts[0].grid, torch.cat([p.classes for p in parts]))
