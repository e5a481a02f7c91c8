"""Training of the small backbone, on generated surfaces and, where a folder of them is given, pieces of photographs.

The objective is the use: in a small set of images of one kind, some disturbed, the mutual scores (MuSc, Li et al., ICLR
2024, arXiv:2401.16753) of disturbed patches are to rank above those of all others. Light, shift, turn and noise vary
within a set, so features learn to ignore them. Departs from it: MuSc takes a pretrained net and trains nothing.
Data of step i depend on (seed, i) and the photographs alone; an interrupted training goes on from its checkpoint with
the same result.
"""
from __future__ import annotations

import io
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d, softplus

from anomaly.backbone import Backbone, BackboneConfig, Features, config_record, random_backbone
from anomaly.lnamd import neighbourhood_features
from anomaly.training_textures import photos_in, texture_set
from data.devices import autocast, half_is_faster
from data.errors import expect
from data.files import new_folder, write_atomic, write_json
from data.safe_load import load_untrusted

COMMAND = "python -m submit weights train backbone --out FOLDER"
SMALL = BackboneConfig(
    "vit_tiny_patch16_224", layers=(1, 3), size=(240, 240), mean=(0.5,) * 3, std=(0.25,) * 3,
    class_features=False,  # no loss reaches the class token
    arguments={"img_size": 240, "patch_size": 12, "embed_dim": 192, "depth": 4, "num_heads": 3,
               "dynamic_img_size": True, "embed_layer": "convolutions"})
DEGREES = (1, 3)  # as scoring uses them
MOST_STEPS = 100_000  # seeds of step i: MOST_STEPS * seed + i
MOST_SEEDS = 2 ** 32 // MOST_STEPS  # generators of the CPU know 32 bits of a seed: more would come round to used ones
# Sets of the validation start here, above all training.
VALIDATION_SEED = MOST_SEEDS * MOST_STEPS


@dataclass(frozen=True)
class TrainingConfig:
    steps: int = 7000  # one set of images each; about 50 minutes of two CPU cores
    normal: int = 3  # undisturbed images of a set
    disturbed: int = 3
    learning_rate: float = 5e-4
    warmup: int = 200  # steps
    weight_decay: float = 0.05
    clip: float = 1.0  # norm of the gradient
    checkpoint_every: int = 100  # steps

    def __post_init__(self) -> None:
        expect(self.steps <= MOST_STEPS, "TrainingConfig.steps", f"<= {MOST_STEPS}", self.steps)
        for name in ("steps", "warmup"):
            expect(getattr(self, name) >= 1, f"TrainingConfig.{name}", ">= 1", getattr(self, name))
        expect(self.normal >= 1 and self.disturbed >= 1 and self.normal + self.disturbed >= 3,
               "TrainingConfig.normal, disturbed", "at least one of each and three in all",
               (self.normal, self.disturbed))


def train(folder: Path, *, seed: int = 0, config: TrainingConfig | None = None, backbone_config: BackboneConfig = SMALL,
          photos: Path | None = None, device: torch.device | None = None,
          progress: Callable[[str], None] | None = None) -> dict:
    """Train the backbone and write config.json, model.safetensors (float16) and card.json to the new `folder`.

    Returns the card. photos: a folder of photographs, materials of which join the generated ones. device: of the steps;
    surfaces are drawn and figures measured on the CPU, which is the default, with the caller's number of threads.
    `progress` gets a line now and then.
    """
    config = config or TrainingConfig()
    expect(0 <= seed < MOST_SEEDS, "seed", f"0 to {MOST_SEEDS - 1}", seed)
    expect(not folder.exists(), folder, "a path where nothing lies yet", "an existing file or folder")
    start, files = time.monotonic(), photos_in(photos) if photos else []
    backbone = _fresh(backbone_config, seed)
    before = validation_figures(backbone)
    backbone.to(device or "cpu")
    sets = TrainingSets(config, backbone_config.size[0], seed, files)
    seconds = _optimise(backbone, sets, folder.with_name(folder.name + ".checkpoint.pt"), progress)
    backbone.to("cpu")
    half = {name: value.half().contiguous() for name, value in backbone.net.state_dict().items()}
    backbone.net.load_state_dict({name: value.float() for name, value in half.items()})  # figures of what is stored
    card = {"command": COMMAND, "seed": seed, "seconds": round(seconds), "training": asdict(config),
            "data": "generated surfaces and objects (anomaly/training_textures.py), "
                    + (f"pieces of {len(files)} photographs among them" if files else "no photograph"),
            "figures": {"validation": validation_figures(backbone), "validation before training": before,
                        "validation sets": f"generated, seeds from {VALIDATION_SEED}"},
            "parameters": sum(value.numel() for value in half.values()),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}}
    with new_folder(folder) as scratch:
        write_json(scratch / "config.json", config_record(backbone_config))
        save_file(half, scratch / "model.safetensors")
        write_json(scratch / "card.json", card)
    folder.with_name(folder.name + ".checkpoint.pt").unlink(missing_ok=True)
    if progress:
        progress(f"done in {time.monotonic() - start:.0f} s: {json.dumps(card['figures'])}")
    return card


def _fresh(config: BackboneConfig, seed: int) -> Backbone:
    """Random weights, positions as waves: so nearness is known from the first step."""
    backbone = random_backbone(config, seed=seed)
    table = backbone.net.pos_embed.data  # (1, 1 + L, D), class first
    table[:, 1:] = 0.5 * _waves(backbone.grid, table.shape[-1])
    return backbone


def _waves(grid: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines of row and column, (rows * columns, width)."""
    rates = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    rows, columns = (torch.arange(side)[:, None] * rates for side in grid)
    parts = [f(rows)[:, None].expand(-1, grid[1], -1) for f in (torch.sin, torch.cos)]
    parts += [f(columns)[None].expand(grid[0], -1, -1) for f in (torch.sin, torch.cos)]
    return torch.cat(parts, -1).flatten(0, 1)


@dataclass(frozen=True)
class TrainingSets:
    """The set of images of each step."""

    config: TrainingConfig
    size: int  # pixels
    seed: int
    photos: list[Path]

    def of(self, step: int) -> tuple[Tensor, Tensor]:
        generator = Generator().manual_seed(MOST_STEPS * self.seed + step)
        return texture_set(self.config.normal, self.config.disturbed, self.size, generator=generator,
                           photos=self.photos)

    def from_step(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """To the last step; the next one is drawn meanwhile, as photographs take time to be read."""
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.of, first)
            for step in range(first, self.config.steps):
                found = ahead.result()
                if step + 1 < self.config.steps:
                    ahead = pool.submit(self.of, step + 1)
                yield found


def _optimise(backbone: Backbone, sets: TrainingSets, checkpoint: Path,
              progress: Callable[[str], None] | None) -> float:
    """Run the steps that are left; returns the seconds of all steps, those before an interruption too."""
    config = sets.config
    optimiser = torch.optim.AdamW(backbone.parameters(), lr=config.learning_rate, betas=(0.9, 0.95),
                                  weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, config))
    of = [sets.seed, asdict(config), config_record(backbone.config), len(sets.photos)]
    parts = {"net": backbone.net, "optimiser": optimiser, "schedule": schedule}
    first, spent = _resumed(checkpoint, parts, of)
    start, losses = time.monotonic() - spent, []
    backbone.train()
    for step, (images, changed) in enumerate(sets.from_step(first), first):
        losses.append(_step(backbone, optimiser, images, changed, config.clip))
        schedule.step()
        if (step + 1) % config.checkpoint_every == 0:
            buffer = io.BytesIO()
            torch.save({"of": of, "step": step + 1, "seconds": time.monotonic() - start}
                       | {name: part.state_dict() for name, part in parts.items()}, buffer)
            write_atomic(checkpoint, buffer.getvalue())
            if progress:
                progress(f"step {step + 1} of {config.steps}, loss {np.mean(losses):.4f}")
            losses = []
    backbone.eval()
    return time.monotonic() - start


def _rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then half a cosine to zero."""
    rest = (step - config.warmup) / max(1, config.steps - config.warmup)
    return min((step + 1) / config.warmup, 0.5 + 0.5 * math.cos(math.pi * max(0.0, rest)))


def _resumed(checkpoint: Path, parts: dict, of: list) -> tuple[int, float]:
    """Step and seconds to go on from: those of a checkpoint of the same training, else 0."""
    if not checkpoint.is_file():
        return 0, 0.0
    state = load_untrusted(checkpoint)  # which names a file that was cut
    expect(state["of"] == of, checkpoint, f"the checkpoint of {of}", state["of"])
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"], state["seconds"]


def _step(backbone: Backbone, optimiser: torch.optim.Optimizer, images: Tensor, changed: Tensor, clip: float) -> float:
    device = next(backbone.parameters()).device
    share = patch_share(changed, backbone.grid).to(device)
    with autocast(device, "bfloat16" if half_is_faster(device) else "float32"):
        features = backbone(images.to(device))
    loss = ranking_loss(set_scores(features), share)
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(backbone.parameters(), clip)
    optimiser.step()
    return float(loss.detach())


def patch_share(changed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of changed pixels in each patch, (N, L) in [0, 1], of (N, H, W) bool."""
    step = (changed.shape[1] // grid[0], changed.shape[2] // grid[1])
    return avg_pool2d(changed[:, None].float(), step).flatten(1)


UNIT = 0.1  # of the distance between features of unit length; random nets give scores of about 0.3
DISTURBED_FROM = 0.03  # share of changed pixels that makes a patch a disturbed one; less but not none is left out


def set_scores(features: Features) -> Tensor:
    """Mutual scores (N, L) of a small set, by the plain formula and with a gradient."""
    total = 0
    for layer in features.layers:
        for degree in DEGREES:
            total = total + _plain_scores(neighbourhood_features(layer.float(), features.grid, degree))
    return total / (len(features.layers) * len(DEGREES))


def _plain_scores(patches: Tensor) -> Tensor:
    """Mean distance to the nearest patch of the closest third (two at least) of the other images: (N, L)."""
    count, length, _ = patches.shape
    pool = patches.flatten(0, 1)
    with torch.no_grad():  # which patches are nearest; the gradient needs the chosen pairs only
        likeness, places = (pool @ pool.T).view(count, length, count, length).max(3)
        likeness[torch.arange(count), :, torch.arange(count)] = -9.0  # own image
        images = likeness.topk(min(count - 1, max(2, count // 3)), dim=2).indices
        chosen = images * length + places.gather(2, images)
    apart = patches[:, :, None] - pool[chosen]  # (N, L, k, D)
    return apart.square().sum(-1).clamp_min(1e-6).sqrt().mean(2)  # bounded off 0: the root has no slope there


def ranking_loss(scores: Tensor, share: Tensor) -> Tensor:
    """How often and how far normal patches and images rank above disturbed ones; 0 is best.

    scores, share: (N, L). Differences count in a fixed unit of distance: measured by the spread of the scores
    themselves, features soon collapsed to one point (400 steps: validation AUROC of patches 0.72, below 250 steps).
    """
    low, high = scores[share == 0], scores[share >= DISTURBED_FROM]
    if not len(low) or not len(high):
        return scores.sum() * 0
    loss = softplus((low[:, None] - high[None, :]) / UNIT).mean()
    spoilt = (share >= DISTURBED_FROM).any(1)
    clean = (share == 0).all(1)
    if spoilt.any() and clean.any():
        top = scores.topk(2, dim=1).values.mean(1)
        loss = loss + 0.3 * softplus((top[clean][:, None] - top[spoilt][None, :]) / UNIT).mean()
    return loss


@torch.inference_mode()
def validation_figures(backbone: Backbone, *, sets: int = 24) -> dict[str, float]:
    """Mean AUROC over generated sets of images and patches, of seeds that training never sees."""
    found = {"image_auroc": [], "patch_auroc": []}
    for index in range(sets):
        generator = Generator().manual_seed(VALIDATION_SEED + index)
        images, changed = texture_set(6, 6, backbone.config.size[0], generator=generator)
        share = patch_share(changed, backbone.grid)
        scores = set_scores(backbone(images))
        for name, truth, score in (("image_auroc", (share >= DISTURBED_FROM).any(1), scores.amax(1)),
                                   ("patch_auroc", share >= DISTURBED_FROM, scores)):
            if truth.any() and not truth.all():
                found[name].append(roc_auc_score(truth.flatten().numpy(), score.flatten().numpy()))
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}
