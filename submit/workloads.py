"""What a run of each task consists of, as stages that can be counted or timed in small.

A stage on the device is counted - a net on `meta`, where its size does not matter - and predicted for a GPU. A stage
on the host (reading, resizing, tokenising, writing) is timed here and not scaled: no table says how fast the judge's
CPU is. Inputs are made up: photographs of 640 x 480, requests about one thing, noise as features, small PNG files.
"""
from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data.errors import expect
from data.threads import in_threads

if TYPE_CHECKING:  # a task's modules are imported where a workload of it is made
    from defense.dvae_network import DVAE, NetworkConfig
    from defense.dvae_stage import StageConfig

Work = Callable[[], object]


@dataclass(frozen=True)
class Place:
    """Where a sample of a stage is made: a folder for its files, and the device, which is `meta` for counting nets."""

    folder: Path
    device: torch.device


Prepare = Callable[[int, Place], Work]
SIZE = (640, 480)           # of a photograph, width and height
NAMES = 2                   # objects that a request names
SIDE, CHANNELS = 32, 3      # of the images of a network that is judged
SAMPLE_IMAGES, SAMPLE_TEXTS = 32, 512
SAMPLE_FILES = 256          # small ones, which take far less than a millisecond each
BLOCKS = (2, 3, 5)          # of images: the sizes at which the comparison is counted, quadratic in whole blocks
NET_BATCH = 16              # images at once through the nets of the anomaly task
CONVOLUTIONS = (torch.conv2d, torch.conv_transpose2d)  # of D-VAE: what autocast puts into 16 bits
JUDGED = 5                  # tunings of a repair before the last: the mark, and four ratios on the way to one of eleven
RETRIEVAL_NETS = {"embedded": None, "report": "ViTamin-L-384"}


@dataclass(frozen=True)
class Stage:
    """`prepare(n, place)` makes ready and gives back what works on n units; only that is counted or timed.

    units: of the run that is asked for, which does the stage `times` times. sizes: the n that are looked at; with one,
    cost is proportional to n, with more it is the polynomial through them. kept_bytes: of a unit, beside what the
    stage makes, on the device. host: timed, never counted. net: counted on `meta`, its units pass in batches unless it
    adapts. adapts: what it makes is cut to the memory there is, so only what is kept counts.
    """

    name: str
    counted: str  # what the units are
    units: int
    sizes: tuple[int, ...]
    prepare: Prepare
    times: int = 1
    kept_bytes: int = 0
    weight_bytes: int = 0  # of its net, on the device all the time
    host: bool = False
    net: bool = False
    gradients: bool = False
    adapts: bool = False
    once: bool = False  # timed the first time it runs


@dataclass(frozen=True)
class Workload:
    """One run of a task, or of one sample where `sample` says that the limit is a sample's.

    planned: the work keeps a deadline of its own, within the limit.
    """

    title: str
    stages: tuple[Stage, ...]
    sample: bool = False
    planned: bool = False
    notes: tuple[str, ...] = ()


# --- retrieval

def retrieval(preset: str, queries: int, half: bool) -> Workload:
    """As many database images as queries; every query has an image of its own and names two new objects."""
    from retrieval.encoder import IMAGE_BLOCK, TEXT_BLOCK
    from retrieval.parser import parse

    expect(preset in RETRIEVAL_NETS, "--preset", f"one of {', '.join(RETRIEVAL_NETS)} for retrieval", preset)
    config = _clip_config(RETRIEVAL_NETS[preset])
    side, context = config["vision_cfg"]["image_size"], config["text_cfg"].get("context_length", 77)
    weights = _clip_weights(RETRIEVAL_NETS[preset])

    def embed_images(n: int, place: Place) -> Work:
        model, pixels = _clip(config, place.device), torch.empty(n, 3, side, side, device=place.device)
        return lambda: model.encode_image(pixels)

    def embed_texts(n: int, place: Place) -> Work:
        model, tokens = _clip(config, place.device), torch.zeros(n, context, dtype=torch.long, device=place.device)
        return lambda: model.encode_text(tokens)

    def parse_requests(n: int, _: Place) -> Work:
        texts = [f"please remove the old chair and put a {i} lamp there" for i in range(n)]
        parse(texts[:1])  # the weights are read once
        return lambda: parse(texts)

    return Workload(f"retrieval, {preset}, {queries} queries, {queries} database images", (
        _start("retrieval.predict"),
        Stage("read and resize", "images", 2 * queries, (SAMPLE_IMAGES,), _read_images((side, side)), host=True),
        Stage("parse the requests", "texts", queries, (SAMPLE_TEXTS,), parse_requests, host=True),
        Stage("embed the images", "images", 2 * queries, (IMAGE_BLOCK,), embed_images, net=True,
              weight_bytes=4 * weights),
        Stage("embed the objects", "texts", NAMES * queries, (TEXT_BLOCK,), embed_texts, net=True)),
        notes=("single precision, as the kit's encoder runs",))


def _clip_config(name: str | None) -> dict:
    import open_clip

    from retrieval.encoder import EMBEDDED

    if name is not None:
        return open_clip.get_model_config(name)
    return json.loads((EMBEDDED / "config.json").read_text(encoding="utf-8"))["model_cfg"]


@cache
def _clip_weights(name: str | None) -> int:
    """Their number."""
    return sum(p.numel() for p in _clip(_clip_config(name), torch.device("meta")).parameters())


def _clip(config: dict, device: torch.device) -> nn.Module:
    from retrieval.encoder import build_model

    with device, torch.random.fork_rng(devices=[]):
        return build_model(config).eval().requires_grad_(False)


# --- anomaly

def anomaly(preset: str, images: int, categories: int, half: bool) -> Workload:
    """`categories` categories of `images` images each. half: 16-bit nets and comparison, as on GPUs."""
    from anomaly.presets import PRESETS

    expect(preset in PRESETS, "--preset", f"one of {', '.join(PRESETS)} for anomaly", preset)
    expect(images >= 2, "--images", ">= 2 of a category", images)
    chosen, shapes = PRESETS[preset], _net_shapes(preset)
    files = images * categories
    stages = [_start("anomaly.predict"),
              Stage("read and resize", "images", files, (SAMPLE_IMAGES,),
                    _read_images(*(shape.config.size[::-1] for shape in shapes)), host=True)]
    if chosen.scoring.foreground != "off":
        stages.append(Stage("tell the background", "images", files, (SAMPLE_IMAGES,), _background, host=True))
    nets = [stage for shape in shapes for stage in _net_stages(shape, chosen.scoring, images, categories, half)]
    held = sum(stage.kept_bytes for stage in nets if stage.adapts)  # features of all nets lie there at once
    stages += [replace(stage, kept_bytes=held) if stage.adapts else stage for stage in nets]
    stages += [Stage("maps and image scores", "images", images, (SAMPLE_IMAGES,),
                     _finish(shapes[0], chosen.scoring), times=categories),
               Stage("write the score files", "images", images * categories, (SAMPLE_IMAGES,), _write, host=True)]
    return Workload(f"anomaly, {preset}, {categories} categories of {images} images", tuple(stages),
                    notes=("compared in bands of the free memory; where the features do not fit, in groups",
                           "the organizers' evaluation, which shares the limit, is not part of it"))


@dataclass(frozen=True)
class _NetShape:
    """Of a net for patch features, without its weights. width: of a feature; weights: their number."""

    config: object
    grid: tuple[int, int]
    width: int
    weights: int


@cache
def _net_shapes(preset: str) -> tuple[_NetShape, ...]:
    """Of the nets of a preset, that for maps first."""
    from anomaly.backbone import Backbone, load_backbone
    from anomaly.presets import PRESETS

    chosen = PRESETS[preset]
    configs = [chosen.for_maps or load_backbone().config]
    if chosen.for_images not in (None, chosen.for_maps):
        configs.append(chosen.for_images)
    with torch.device("meta"):
        nets = [Backbone(config) for config in configs]
    return tuple(_NetShape(net.config, net.grid, net.net.num_features, sum(p.numel() for p in net.parameters()))
                 for net in nets)


def _net_stages(shape: _NetShape, scoring: object, images: int, categories: int, half: bool) -> list[Stage]:
    """The features of one net, and the comparison of all images by them, layer by layer."""
    from anomaly.backbone import Backbone
    from anomaly.category import COPIES
    from anomaly.mutual_scoring import CPU_BYTES, GPU_BYTES, block_side
    from data.devices import half_is_faster

    config, width = shape.config, shape.width
    patches, layers = shape.grid[0] * shape.grid[1], len(config.layers)
    dtype = torch.float16 if half else torch.float32

    def features(n: int, place: Place) -> Work:
        with place.device, torch.random.fork_rng(devices=[]):
            net = Backbone(config).eval().requires_grad_(False).to(dtype)
            pixels = torch.zeros(n, 3, *config.size, dtype=dtype)
        return lambda: net(pixels)

    def compare(n: int, place: Place) -> Work:
        generator = None if place.device.type == "meta" else torch.Generator(place.device).manual_seed(n)
        layer = torch.randn(n, patches, width, generator=generator, device=place.device)
        return _comparison(scoring, shape.grid, layer, half)

    short = half or (scoring.precision != "float32" and half_is_faster(torch.device("cpu")))
    name, side = config.architecture, block_side(patches, 2 if short else 4, GPU_BYTES if half else CPU_BYTES)
    kept = layers * patches * width * dtype.itemsize
    return [Stage(f"features, {name}", "images", images, (NET_BATCH,), features, times=categories, kept_bytes=kept,
                  weight_bytes=4 * shape.weights, net=True),
            Stage(f"compare, {name}", "images", images, tuple(k * side for k in BLOCKS), compare,
                  times=categories * layers, kept_bytes=kept + COPIES * patches * width * 4, net=half,
                  adapts=True)]


def _comparison(scoring: object, grid: tuple[int, int], layer: Tensor, half: bool) -> Work:
    """Of one layer in all neighbourhoods, by the pipeline's own code."""
    from anomaly.backbone import Features
    from anomaly.pipeline import feature_scores

    config = replace(scoring, smoothing="none", precision="half" if half else scoring.precision)
    return lambda: feature_scores(Features((layer,), grid, None), config)


def _finish(shape: _NetShape, scoring: object) -> Prepare:
    """What follows the patch scores: image scores, maps, background, calibration."""
    from anomaly.pipeline import PatchScores, category_scores
    from data.anomaly_tree import SIDE as MAP

    grid = shape.grid

    def prepare(n: int, place: Place) -> Work:
        generator = torch.Generator().manual_seed(n)
        scores = torch.rand(n, grid[0] * grid[1], generator=generator).to(place.device)
        found = PatchScores(scores, grid, shape.config.size, None)
        hidden = torch.rand(n, MAP, MAP, generator=generator) < 0.5 if scoring.foreground != "off" else None
        return lambda: category_scores(found, found, scoring, hidden)

    return prepare


def _background(n: int, place: Place) -> Work:
    """By colour; reads every file again."""
    from anomaly.category import backgrounds

    paths = _photographs(n, place)
    return lambda: backgrounds(paths)


def _write(n: int, place: Place) -> Work:
    from anomaly.score_files import write_scores
    from data.anomaly_tree import SIDE as MAP
    from data.anomaly_tree import AnomalyImage

    images = [AnomalyImage(place.folder / f"{i}.png", "good", None) for i in range(n)]
    rng = np.random.default_rng(0)
    scores, maps = rng.random(n), rng.random((n, 1, MAP, MAP))
    return lambda: write_scores(place.folder / "scores", "category", images, scores, maps)


# --- networks: detection and repair

def backdoor(classes: int, half: bool) -> Workload:
    """The whole plan of the detector on a full-width PreActResNet18; it does less where its deadline is near."""
    from backdoor_detection.detection import DetectorConfig, Plan
    from backdoor_detection.free_features import STEPS

    reach = DetectorConfig().reach
    plan = Plan(reach.images, 1, reach.steps, reach.kept, len(reach.changes), STEPS)
    together = max(1, reach.block // (reach.images * CHANNELS * SIDE * SIDE))  # classes in one block
    at_once = reach.images * min(together, classes, reach.kept)
    return Workload(f"one network of {classes} classes, {SIDE} x {SIDE}", (
        Stage("read the clean images", "images", 512, (SAMPLE_IMAGES,), _read_images((SIDE, SIDE)), host=True),
        Stage("search for perturbations", "images", round(plan.passes(classes)), (at_once,), _pass(classes, False),
              net=True, gradients=True)),
        sample=True, planned=True,
        notes=("the detector plans what fits its own deadline; this is its whole plan",))


def repair(images: int, classes: int, half: bool) -> Workload:
    """TSBD as `repair_model` does it: every tuning of the search for n, and the last."""
    from defense.neuron_ratio import FEWEST
    from defense.repair import BATCH, shipped_config
    from defense.tsbd import TUNING_STEP

    tuning, ratio = shipped_config().tuning, shipped_config().ratio
    part = images - max(round(ratio.held_out * images), min(images // 2, 20))  # the others judge
    tunings = [images] + (JUDGED * [part] if images >= 2 * FEWEST else [])
    passes = sum(TUNING_STEP * tuning.epochs_of(n) * n for n in tunings)
    return Workload(f"repair of one network of {classes} classes with {images} clean images", (
        Stage("read the clean images", "images", images, (SAMPLE_IMAGES,), _read_images((SIDE, SIDE)), host=True),
        Stage("tune", "images", passes, (BATCH,), _pass(classes, True), net=True,
              gradients=True)),
        sample=True, planned=True,
        notes=("a repair is given back by its deadline, whatever is done by then",
               "unlearning ends at chance, which cannot be told beforehand: at most 30 % of its deadline, not here"))


def _pass(classes: int, weights: bool) -> Prepare:
    """Forward and back: to the pixels, or to the weights and a step of SGD."""
    from data.preact_resnet import WIDTHS, PreActResNet

    def prepare(n: int, place: Place) -> Work:
        with place.device, torch.random.fork_rng(devices=[]):
            model = PreActResNet(classes, WIDTHS, CHANNELS).eval().requires_grad_(weights)
            pixels = torch.zeros(n, CHANNELS, SIDE, SIDE).requires_grad_(not weights)
        wanted = list(model.parameters()) if weights else [pixels]
        step = torch.optim.SGD(wanted, 0.01, 0.9)

        def work() -> None:
            for one, gradient in zip(wanted, torch.autograd.grad(model(pixels).sum(), wanted), strict=True):
                one.grad = gradient
            step.step()

        return work

    return prepare


# --- purification

def purify(images: int, classes: int, side: int, half: bool) -> Workload:
    """D-VAE as `purify_dataset` does it: two stages, each trained and then applied, the second one twice.

    images: of all classes, `side` pixels high and wide. half: as on GPUs, where training is in bfloat16.
    """
    from defense.dvae import inference_batch
    from defense.purification import shipped_config

    config = shipped_config(side, side)
    held = CHANNELS * side * side  # bytes of an image; all that a stage was given stay on the device, beside its own
    nets = []
    for number, own in enumerate((config.first, config.second), 1):
        shape = _DvaeShape(own.network, classes, side)
        # one net at a time; beside its weights, training keeps their last finite state
        weights = 2 * 4 * _dvae_weights(shape) if number == 1 else 0
        nets += [Stage(f"train stage {number}", "images", images, (own.batch,), _dvae_step(shape, own, half),
                       times=own.epochs, kept_bytes=number * held, weight_bytes=weights, net=True, gradients=True),
                 Stage(f"apply stage {number}", "images", images, (inference_batch(side, side),),
                       _dvae_inference(shape, config.rounding), times=number, kept_bytes=(number + 1) * held,
                       net=True)]
    return Workload(f"purification of {images} images of {side} x {side} in {classes} classes", (
        Stage("read the images", "images", images, (SAMPLE_FILES,), _read_tree(side), host=True), *nets,
        Stage("write the PNG files", "images", images, (SAMPLE_FILES,), _write_pngs(side), host=True)),
        planned=True,
        notes=("the deadline of a purification cuts epochs where time is short; this is all of them",
               "images are counted as on the GPU; a set that takes more than half of its free memory stays on the CPU "
               "and goes there batch by batch, which takes less of it",
               f"{'bfloat16' if half else 'single precision'} in training, single precision when applied"))


@dataclass(frozen=True)
class _DvaeShape:
    """Of D-VAE's network and of the images it is for."""

    config: NetworkConfig
    classes: int
    side: int

    def build(self, device: torch.device) -> DVAE:
        from defense.dvae_network import new_dvae

        with device:
            model = new_dvae(self.classes, (CHANNELS, self.side, self.side), self.config, seed=0)
        return model.to(memory_format=torch.channels_last)

    def batch(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """n black images and their classes."""
        return (torch.zeros(n, CHANNELS, self.side, self.side, dtype=torch.uint8, device=device),
                torch.zeros(n, dtype=torch.long, device=device))


@cache
def _dvae_weights(shape: _DvaeShape) -> int:
    """Their number."""
    return sum(p.numel() for p in shape.build(torch.device("meta")).parameters())


def _dvae_step(shape: _DvaeShape, config: StageConfig, half: bool) -> Prepare:
    """A batch of `train_stage`: forward, back, the gradient's norm, a step of Adam."""
    from defense.dvae_network import Disentangled
    from defense.dvae_stage import loss_terms, unit

    sixteen = config.precision == "bfloat16" or (config.precision == "auto" and half)

    def prepare(n: int, place: Place) -> Work:
        model, (images, labels) = shape.build(place.device).train(), shape.batch(n, place.device)
        adam = torch.optim.Adam(model.parameters(), config.rate, foreach=half)  # all weights in one call, as on GPUs

        def work() -> None:
            pixels = unit(images)
            with _autocast(place.device) if sixteen else nullcontext():
                found = model(pixels, labels, _noise(model, n, place.device))
            terms = loss_terms(Disentangled(*(part.float() for part in found)), pixels, config, config.power_from)
            adam.zero_grad(set_to_none=True)
            terms.sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            adam.step()

        return work

    return prepare


def _dvae_inference(shape: _DvaeShape, rounding: str) -> Prepare:
    """Images minus their perturbation, in grey levels; the image rebuilt instead costs the same."""
    from defense.dvae import grey_levels
    from defense.dvae_stage import unit

    def prepare(n: int, place: Place) -> Work:
        model, (images, labels) = shape.build(place.device).eval(), shape.batch(n, place.device)

        def work() -> Tensor:
            pixels = unit(images)
            found = model(pixels, labels, _noise(model, n, place.device))
            return grey_levels((pixels - found.perturbation).clamp(0, 1), rounding)

        return work

    return prepare


def _noise(model: DVAE, n: int, device: torch.device) -> Tensor:
    """For the codes of n images; `meta` has no generators."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(n)
    return torch.randn(model.code_shape(n), generator=generator, device=device)


def _autocast(device: torch.device) -> AbstractContextManager:
    return _HalfConvolutions() if device.type == "meta" else torch.autocast(device.type, torch.bfloat16)


class _HalfConvolutions(TorchFunctionMode):
    """What autocast does to convolutions, which it leaves alone on `meta`."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func in CONVOLUTIONS:
            args = tuple(one.bfloat16() if isinstance(one, Tensor) else one for one in args)
        return func(*args, **(kwargs or {}))


def _read_tree(side: int) -> Prepare:
    from defense.purification import read_equal, tree_images

    def prepare(n: int, place: Place) -> Work:
        folder = place.folder / "class"
        folder.mkdir()
        for i, image in enumerate(_small_images(n, side)):
            image.save(folder / f"{i}.png")

        def work() -> None:
            with torch.inference_mode(False):  # its threads, which are not in that mode, fill one tensor
                read_equal(tree_images(place.folder)[0])

        return work

    return prepare


def _write_pngs(side: int) -> Prepare:
    """In threads, as `purify_folder` does it."""
    def prepare(n: int, place: Place) -> Work:
        images = _small_images(n, side)

        return lambda: in_threads(lambda i: images[i].save(place.folder / f"{i}.png"), range(n))

    return prepare


def _small_images(n: int, side: int) -> list[Image.Image]:
    """Of noise half as fine: they take as long to decode and to compress as photographs of this size."""
    shape = (n, math.ceil(side / 2), math.ceil(side / 2), CHANNELS)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return [Image.fromarray(one).resize((side, side)) for one in noise]


# --- shared

def _start(module: str) -> Stage:
    """A fresh Python that imports what is shipped."""
    def prepare(n: int, _: Place) -> Work:
        return lambda: [subprocess.run([sys.executable, "-c", f"import {module}"], check=True) for _ in range(n)]

    return Stage("start Python", "starts", 1, (1,), prepare, host=True, once=True)


def _read_images(*sizes: tuple[int, int]) -> Prepare:
    """Decoding once and resizing to every size, in threads, as the tasks do it."""
    from data.images import read_rgb

    def read(path: Path) -> list:
        image = read_rgb(path)
        return [np.asarray(image.resize(size)) for size in sizes]

    def prepare(n: int, place: Place) -> Work:
        paths = _photographs(n, place)

        return lambda: in_threads(read, paths)

    return prepare


def _photographs(n: int, place: Place) -> list[Path]:
    paths = [place.folder / f"{i}.jpg" for i in range(n)]
    noise = np.random.default_rng(0).integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), dtype=np.uint8)
    for path in paths:
        Image.fromarray(noise).resize(SIZE).save(path)
    return paths
