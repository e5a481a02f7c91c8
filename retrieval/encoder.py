"""Images and prompts to one space: a CLIP model with the preprocessing and vocabulary it was trained with.

The embedded small model and the full one (ViTamin-L-384) are built by the same open_clip classes and loaded by
the same function; a folder holds either. Embeddings are raw, as the arithmetic of `retrieval.compose` wants them.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

import retrieval.small_trunk  # noqa: F401  (makes the small trunk known to timm)
from data.errors import InputError, expect
from data.weight_files import read_json, read_weights
from retrieval.vocabulary import Vocabulary

EMBEDDED = Path(__file__).parent / "weights" / "encoder"
CONFIGS = ("config.json", "open_clip_config.json")        # ours; the name open_clip gives it on the hub
WEIGHTS = ("model.safetensors", "open_clip_model.safetensors")
VOCABULARY = "vocabulary.json"  # of an encoder with a cut one
IMAGE_BLOCK, TEXT_BLOCK = 64, 256  # 64: by its layer shapes ViTamin-L-384 in float32 then stays well under 24 GB


class Encoder:
    """A CLIP model in eval mode, its preprocessing and vocabulary; everything runs on the model's device."""

    def __init__(self, model: nn.Module, preprocess: PreprocessCfg, vocabulary: Vocabulary, width: int) -> None:
        self.width = width  # D
        self.model = model.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.vocabulary = vocabulary
        self._to_input = image_transform_v2(preprocess, is_train=False)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def encode_images(self, images: Iterable | Tensor, *, opened: Callable[..., Image.Image] = lambda image: image
                      ) -> Tensor:
        """Raw image embeddings (N, D) float32.

        images: RGB images of any size, or (N, 3, S, S) uint8 of the model's own size S, or anything that `opened`
        makes an RGB image of (it runs in threads, a bounded number ahead of the model).
        """
        found = [self.model.encode_image(block).float() for block in self.inputs(images, opened=opened)]
        return torch.cat(found) if found else self._nothing()

    def inputs(self, images: Iterable | Tensor, *, opened: Callable[..., Image.Image] = lambda image: image
               ) -> Iterator[Tensor]:
        """What the image tower takes, in blocks (up to 64, 3, S, S) on its device; images as for `encode_images`."""
        if isinstance(images, Tensor):
            blocks = (self._normalised(block) for block in images.split(IMAGE_BLOCK))
        else:
            prepared = in_order(lambda image: self._to_input(opened(image)), images)
            blocks = (torch.stack(block) for block in _blocks(prepared, IMAGE_BLOCK))
        return (block.to(self.device) for block in blocks)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Raw text embeddings (N, D) float32 of prompts in English."""
        found = [self.model.encode_text(self.vocabulary.encode(block).to(self.device)).float()
                 for block in _blocks(texts, TEXT_BLOCK)]
        return torch.cat(found) if found else self._nothing()

    def _nothing(self) -> Tensor:
        return torch.zeros(0, self.width, device=self.device)

    def _normalised(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) of the model's size -> its input."""
        size = self.preprocess.size
        size = (size, size) if isinstance(size, int) else tuple(size)
        expect(images.dtype == torch.uint8 and tuple(images.shape[1:]) == (3, *size), "images",
               f"(N, 3, {size[0]}, {size[1]}) torch.uint8", f"{tuple(images.shape)} {images.dtype}")
        return normalised(images, self.preprocess)


def normalised(images: Tensor, preprocess: PreprocessCfg) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 with the model's mean and deviation taken out."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (preprocess.mean, preprocess.std))
    return (images.float() / 255 - mean) / std


def in_order(work: Callable, items: Iterable, *, ahead: int = 2 * IMAGE_BLOCK) -> Iterator:
    """work(item) for each item, in order, done in threads; at most `ahead` results wait in memory."""
    stream = iter(items)
    with ThreadPoolExecutor() as pool:
        waiting = deque(pool.submit(work, item) for item in islice(stream, ahead))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(work, item) for item in islice(stream, 1))


def _blocks(items: Iterable, size: int) -> Iterable[list]:
    stream = iter(items)
    while block := list(islice(stream, size)):
        yield block


def build_model(model_cfg: dict) -> nn.Module:
    """The open_clip model of a configuration in open_clip's own form; weights random from the global generator."""
    settings = {k: v for k, v in model_cfg.items() if k != "custom_text"}
    kind = open_clip.CustomTextCLIP if model_cfg.get("custom_text") else open_clip.CLIP
    return kind(**settings)


def load_encoder(folder: Path | None = None, *, device: torch.device | str) -> Encoder:
    """The encoder of a folder: configuration, weights, and the vocabulary if it is cut. None: the embedded one."""
    folder = EMBEDDED if folder is None else Path(folder)
    config_file, weights_file = one_of(folder, CONFIGS), one_of(folder, WEIGHTS)
    config = read_config(config_file)
    try:
        with torch.random.fork_rng(devices=[]):  # the random start is replaced at once
            model = build_model(config["model_cfg"])
        preprocess = PreprocessCfg(**config["preprocess_cfg"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise InputError(f"{config_file}: expected settings of an open_clip model, found "
                         f"{type(error).__name__}: {error}") from error
    load_strictly(model, read_weights(weights_file), weights_file)
    kept_file = folder / VOCABULARY
    kept = read_json(kept_file) if kept_file.exists() else None
    vocabulary = Vocabulary(kept, context_length=config["model_cfg"]["text_cfg"].get("context_length", 77))
    return Encoder(model.to(device), preprocess, vocabulary, config["model_cfg"]["embed_dim"])


def read_config(path: Path) -> dict:
    """open_clip's configuration of a model and its preprocessing."""
    config = read_json(path)
    for key in ("model_cfg", "preprocess_cfg"):
        expect(isinstance(config, dict) and isinstance(config.get(key), dict), path, f"a table {key}", "none")
    return config


def load_strictly(model: nn.Module, state: dict[str, Tensor], where: object) -> None:
    """Give the model its weights; the first name or shape that does not fit is named. Half precision is widened."""
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | state.keys()):
        expect(name in state, where, f"a weight {name}", "none of that name")
        expect(name in wanted, where, "only weights of the model", name)
        expect(state[name].shape == wanted[name].shape, f"{where} {name}",
               tuple(wanted[name].shape), tuple(state[name].shape))
    model.load_state_dict(state, strict=True)


def one_of(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files that lies in the folder; none is an error."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    expect(False, folder, f"a file {' or '.join(names)}", "neither")
    raise AssertionError
