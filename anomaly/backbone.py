"""Patch features of a vision transformer: one (N, L, D) tensor a layer, with the grid and the class features.

Any plain vision transformer of timm will do, by name: DINO, DINOv2, DINOv3, CLIP, SigLIP. Preprocessing travels with
the weights in `config.json`.
Layers are 0-based block indices. DINOv2-type nets put their last norm on every chosen layer, CLIP-type nets give the
raw residual stream, as MuSc (Li et al., ICLR 2024, arXiv:2401.16753) reads them. Like there, position tables are
resized by bicubic interpolation without antialiasing, and GPUs run the net under 16-bit autocast.
Departs from it: the grid is carried, so an input need not be square; one forward pass serves patches and class; several
nets share one reading of the images; class features of every net have unit length.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from math import isqrt, prod
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import normalize

from anomaly.conv_stem import ConvStem
from data.errors import InputError, expect
from data.images import to_uint8
from data.weight_files import read_json, read_weights

EMBEDDED = Path(__file__).parent / "weights" / "backbone"
INTERPOLATION = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
ACTIVATION = {"quick": "quick_gelu", "erf": "gelu"}  # our names to timm's
OURS = {"pretrained", "checkpoint_path"}  # arguments of timm.create_model that would load weights behind our checks
STEMS = {"convolutions": ConvStem}  # names in config.json of what makes the patches


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
    activation: str | None = None  # GELU: "quick" (OpenAI's CLIP) or "erf"; None = the architecture's
    arguments: dict = field(default_factory=dict)  # of timm.create_model; img_size = input of the stored position table

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
        expect(self.activation in (None, *ACTIVATION), where + "activation", ["erf", "quick", None], self.activation)
        ours = not isinstance(self.arguments, dict) or OURS & self.arguments.keys()
        expect(not ours, where + "arguments", f"a mapping without {sorted(OURS)}", self.arguments)


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# The two nets of the report, at its size and with its layers. 518 pixels are 37 x 37 patches of 14.
DINOV2_LARGE = BackboneConfig("vit_large_patch14_dinov2", (5, 11, 17, 23), (518, 518), IMAGENET_MEAN, IMAGENET_STD)
CLIP_LARGE = BackboneConfig("vit_large_patch14_clip_336", (5, 11, 17, 23), (518, 518), CLIP_MEAN, CLIP_STD, "bicubic",
                            final_norm=False, activation="quick", arguments={"num_classes": 768})


@dataclass(frozen=True)
class Features:
    layers: tuple[Tensor, ...]  # (N, L, D) each, in the order of the config
    grid: tuple[int, int]  # rows and columns of patches, L = rows * columns
    classes: Tensor | None  # (N, C), unit length; None = not trained to tell images apart


class Backbone(nn.Module):
    """A timm vision transformer that gives patch features."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.net = _timm_net(config)
        blocks = len(self.net.blocks)
        expect(config.layers[-1] < blocks, "BackboneConfig.layers", f"indices below {blocks}", config.layers)
        normed = not config.final_norm or not isinstance(self.net.norm, nn.Identity)
        expect(normed, "BackboneConfig.final_norm", "False where the net has no norm before its pooling", True)
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
        return Features(tuple(layers), self.grid, normalize(self._class_features(last).float(), dim=-1))

    def _class_features(self, last: Tensor) -> Tensor:
        """(N, C) of the last tokens (N, T, D): the class token even if timm averages (DINOv3), or its pooling."""
        net = self.net
        attends = getattr(net, "attn_pool", None) is not None
        if net.cls_token is None or attends or not isinstance(net.fc_norm, nn.Identity):
            return net.forward_head(last)
        return net.head(last[:, 0])

    def normalised(self, images: Tensor) -> Tensor:
        """What the net takes: channels with the mean and deviation of its training data."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.config.mean, self.config.std))
        return (images - mean) / std

    def prepared(self, image: Image.Image) -> Tensor:
        """(3, H, W) uint8 of an RGB image, squashed to the input size (no aspect kept)."""
        expect(image.mode == "RGB", "image.mode", "RGB", image.mode)
        height, width = self.config.size
        return to_uint8(image.resize((width, height), INTERPOLATION[self.config.interpolation]))


def _timm_net(config: BackboneConfig) -> nn.Module:
    """The net with a position table of the grid of the config."""
    where = "BackboneConfig.architecture"
    expect(timm.is_model(config.architecture), where, f"a name that timm {timm.__version__} knows", config.architecture)
    arguments = {"num_classes": 0} | config.arguments | {"img_size": config.size}
    if config.activation is not None:
        arguments["act_layer"] = ACTIVATION[config.activation]
    if "embed_layer" in arguments:
        stem = arguments["embed_layer"]
        expect(stem in [*STEMS],  # not in STEMS: a stranger's value may have no hash
               "BackboneConfig.arguments embed_layer", f"one of {', '.join(STEMS)}", stem)
        arguments["embed_layer"] = STEMS[stem]
    try:
        net = timm.create_model(config.architecture, pretrained=False, **arguments)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise InputError(f"BackboneConfig.arguments: expected those of {config.architecture}, found {error}") from None
    plain = isinstance(net, VisionTransformer | Eva) and isinstance(net.patch_embed, PatchEmbed)
    expect(plain, where, "a plain vision transformer", config.architecture)
    return net


def random_backbone(config: BackboneConfig, *, seed: int) -> Backbone:
    """A backbone with fresh weights. The global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # timm initialises from the global state only
        return Backbone(config).eval()


def load_backbone(folder: Path = EMBEDDED, config: BackboneConfig | None = None, *,
                  device: torch.device | str = "cpu") -> Backbone:
    """The backbone of the `model.safetensors` in `folder`, named as timm names its tensors; any float type.

    config: None = that of `config.json` in the folder. Positions stored for another grid are resized to its size.
    Errors: a missing or wrong file, named.
    """
    weights = folder / "model.safetensors"
    config = config or _read_config(folder / "config.json")
    expect(weights.is_file(), weights, "the weights of the backbone", "no such file")
    backbone = random_backbone(config, seed=0)
    state = {name: value.float() for name, value in read_weights(weights).items()}
    _check_names(weights, set(backbone.net.state_dict()), set(state))
    _fit_positions(weights, state, backbone)
    try:
        backbone.net.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{weights}: expected the shapes of {config.architecture}, found {reason}") from None
    return backbone.to(device)


def _fit_positions(path: Path, state: dict[str, Tensor], backbone: Backbone) -> None:
    """Bring the stored position table, where there is one, to the grid of the backbone."""
    table, net = state.get("pos_embed"), backbone.net
    if table is None or table.ndim != 3:  # a table of another kind fails when it is loaded
        return
    prefix = 0 if net.no_embed_class else net.num_prefix_tokens
    grid = _stored_grid(path, table.shape[1] - prefix, backbone)
    if grid != backbone.grid:
        state["pos_embed"] = resample_abs_pos_embed(table, backbone.grid, grid, prefix, antialias=False)


def _stored_grid(path: Path, positions: int, backbone: Backbone) -> tuple[int, int]:
    """Rows and columns of a position table: those that its config states, else a square, else the backbone's own."""
    size = backbone.config.arguments.get("img_size")
    candidates = [(max(isqrt(max(positions, 0)), 1),) * 2, backbone.grid]
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        patch = backbone.net.patch_embed.patch_size
        candidates.insert(0, (height // patch[0], width // patch[1]))
    grid = next((grid for grid in candidates if prod(grid) == positions), None)
    expect(grid, path, "positions of a square grid, or of arguments.img_size", f"{positions} positions")
    return grid


def _read_config(path: Path) -> BackboneConfig:
    expect(path.is_file(), path, "the description of a backbone", "no such file")
    values = read_json(path)
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
    """The config as `config.json` holds it beside weights that a backbone of this config has."""
    return asdict(config) | {"arguments": config.arguments | {"img_size": list(config.size)}}


def extract(backbone: Backbone, images: Sequence | Tensor, **options: object) -> Features:
    """Features of many images by one backbone; arguments as in `extract_all`."""
    return extract_all([backbone], images, **options)[0]


@torch.inference_mode()
def extract_all(backbones: Sequence[Backbone], images: Sequence | Tensor, *, batch: int = 16,
                read: Callable[[object], Image.Image] | None = None, dtype: torch.dtype = torch.float32,
                keep_on: torch.device | str | None = None, half: bool = True,
                name: Callable[[int], object] = "image {}".format) -> tuple[Features, ...]:
    """Features of many images by each backbone, in one pass: every image is read once, while the nets run.

    images: RGB images of any size, or (N, 3, H, W) ready ones of the size of every backbone, or anything that `read`
    makes an RGB image of; it is called in threads, at most two batches ahead of the nets.
    dtype, keep_on: of the layers that are returned; keep_on None = the device of the backbone. Class features: float32.
    half: 16-bit autocast on GPUs, as MuSc; the CPU computes in float32.
    name: what errors call the image at a position. Errors: features that are not finite, with the image's name.
    """
    expect(len(images) > 0, "images", "at least one image", 0)
    expect(batch >= 1, "batch", ">= 1 image", batch)
    kept: list[Features | None] = [None] * len(backbones)
    for start, inputs in _batches(backbones, images, batch, read):
        for index, (backbone, ready) in enumerate(zip(backbones, inputs, strict=True)):
            found = _features(backbone, ready, start, dtype, half, name)
            kept[index] = kept[index] or _room(found, len(images), keep_on)
            for room, part in zip(_tensors(kept[index]), _tensors(found), strict=True):
                room[start:start + len(part)] = part
    return tuple(kept)


def _batches(backbones: Sequence[Backbone], images: Sequence | Tensor, batch: int,
             read: Callable[[object], Image.Image] | None) -> Iterator[tuple[int, list[Tensor]]]:
    """Position of the first image and a (B, 3, H, W) input for each backbone; the next batch is made meanwhile."""
    starts = range(0, len(images), batch)
    if isinstance(images, Tensor):
        yield from ((start, [images[start:start + batch]] * len(backbones)) for start in starts)
        return
    kinds = {(b.config.size, b.config.interpolation): b for b in backbones}

    def prepared(item: object) -> dict:
        image = read(item) if read else item
        return {kind: backbone.prepared(image) for kind, backbone in kinds.items()}

    with ThreadPoolExecutor() as pool:
        ahead = [pool.submit(prepared, item) for item in images[:batch]]
        for start in starts:
            ready = [future.result() for future in ahead]
            ahead = [pool.submit(prepared, item) for item in images[start + batch:start + 2 * batch]]
            inputs = {kind: torch.stack([sizes[kind] for sizes in ready]) for kind in kinds}
            yield start, [inputs[b.config.size, b.config.interpolation] for b in backbones]


def _features(backbone: Backbone, ready: Tensor, start: int, dtype: torch.dtype, half: bool,
              name: Callable[[int], object]) -> Features:
    """Features of one batch, whose first image has position `start`; layers as `dtype`."""
    device = next(backbone.parameters()).device
    with torch.autocast(device.type, torch.float16, enabled=half and device.type == "cuda"):
        found = backbone(ready.to(device))
    found = Features(tuple(layer.to(dtype) for layer in found.layers), found.grid, found.classes)
    # a sum is finite where all its terms are, and reads them once
    sums = torch.stack([values.flatten(1).sum(1, dtype=torch.float32) for values in _tensors(found)])
    for index, sound in enumerate(sums.isfinite().all(0).tolist(), start):
        expect(sound, f"{name(index)} through {backbone.config.architecture}", "finite features", "NaN or infinity")
    return found


def _room(like: Features, images: int, keep_on: torch.device | str | None) -> Features:
    """Space for the features of all images."""
    layers = tuple(layer.new_empty((images, *layer.shape[1:]), device=keep_on) for layer in like.layers)
    return Features(layers, like.grid, like.classes.new_empty((images, like.classes.shape[1]), device=keep_on))


def _tensors(features: Features) -> tuple[Tensor, ...]:
    return (*features.layers, features.classes)
