"""Training the embedded dual encoder from scratch on generated scenes.

Composition loss: image embedding - its objects' texts + a sibling's texts must find the sibling among all images
of the batch, the query image included; InfoNCE both ways with a learned temperature. Siblings share ground,
places and kept objects, so only the named difference tells them apart. A weaker caption loss (image <-> sum of
its objects' texts) keeps the text of a single object meaningful. The last step is kept: no checkpoint is chosen.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg
from safetensors.torch import save
from torch import Tensor, nn

from data.errors import expect
from data.files import fingerprint, new_folder, write_atomic, write_json
from data.pictograms import NAMES
from data.scenes import (
    DEVELOPMENT,
    SIDE,
    TRAINING,
    VALIDATION,
    Triplet,
    draw_scene,
    make_family,
    request_texts,
    retrieval_triplets,
)
from retrieval.compose import compose
from retrieval.encoder import EMBEDDED, Encoder, build_model, normalised
from retrieval.gallery import nearest
from retrieval.info_nce import both_ways
from retrieval.parser import parse
from retrieval.prompts import PROMPT
from retrieval.small_trunk import NAME
from retrieval.vocabulary import Vocabulary, pieces_used

PARSER = EMBEDDED.with_name("parser") / "model.safetensors"


@dataclass(frozen=True)
class TrainingConfig:
    steps: int = 1400             # 40 minutes on one thread of a busy machine
    families: int = 40            # a step
    family: tuple[int, int] = (4, 2)  # scenes of a family: contents of its two varied cells
    rate: float = 2e-3            # AdamW, 50 steps of warm-up, then cosine to zero
    weight_decay: float = 0.02
    composition_weight: float = 1.0   # 0: an encoder that knows captions only, as CLIP does
    caption_weight: float = 0.2   # of the caption loss: a grounding beside the main loss, not a rival to it
    checkpoint_every: int = 100   # steps
    width: int = 192              # D
    text_width: int = 96
    text_layers: int = 2
    context_length: int = 24      # tokens; the longest prompt of a six-word name fits

    def __post_init__(self) -> None:
        expect(self.steps >= 1, "TrainingConfig.steps", ">= 1", self.steps)
        expect(self.families >= 1, "TrainingConfig.families", ">= 1", self.families)
        expect(math.prod(self.family) >= 2, "TrainingConfig.family", "at least two scenes", self.family)
        expect(min(self.composition_weight, self.caption_weight) >= 0 < self.composition_weight + self.caption_weight,
               "TrainingConfig.composition_weight, caption_weight", "both >= 0, one above",
               (self.composition_weight, self.caption_weight))


PREPROCESS = PreprocessCfg(size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
                           resize_mode="longest", fill_color=127)


def new_encoder(cfg: TrainingConfig, *, seed: int) -> tuple[Encoder, dict]:
    """An untrained encoder and its open_clip configuration."""
    vocabulary = Vocabulary(pieces_used(PROMPT.format(name) for name in NAMES), context_length=cfg.context_length)
    model_cfg = {
        "embed_dim": cfg.width,
        "vision_cfg": {"timm_model_name": NAME, "timm_pool": "avg", "timm_proj": "linear", "image_size": SIDE},
        "text_cfg": {"context_length": cfg.context_length, "vocab_size": len(vocabulary), "width": cfg.text_width,
                     "heads": cfg.text_width // 32, "layers": cfg.text_layers},
        "custom_text": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(model_cfg)
    return Encoder(model, PREPROCESS, vocabulary, cfg.width), model_cfg


def draw_batch(cfg: TrainingConfig, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Images (F, S, 3, H, W) uint8 of F families of S scenes, and which names they hold: (F, S, names) float32."""
    families = [[s for row in make_family(TRAINING, cfg.family, rng=rng) for s in row] for _ in range(cfg.families)]
    images = torch.from_numpy(np.stack([[draw_scene(s) for s in family] for family in families]))
    holds = torch.tensor([[[name in s.names for name in NAMES] for s in family] for family in families])
    return images.permute(0, 1, 4, 2, 3), holds.float()


def composition_loss(images: Tensor, captions: Tensor, scale: Tensor) -> Tensor:
    """Mean InfoNCE, both ways, over every ordered pair of siblings.

    images (F, S, D) raw embeddings; captions (F, S, D) sums of the raw text embeddings of a scene's objects, so that
    the caption of the target minus that of the query is added minus removed texts. scale: 1 / temperature.
    """
    gallery, without = images.flatten(0, 1), images - captions  # (F S, D), (F, S, D)
    losses = [both_ways((without.roll(shift, 1) + captions).flatten(0, 1), gallery, scale)
              for shift in range(1, images.shape[1])]
    return torch.stack(losses).mean()


def train(folder: Path, *, seed: int = 0, cfg: TrainingConfig | None = None,
          device: torch.device | None = None, progress: Callable[[str], None] | None = None, checks: int = 300,
          dev_queries: int = 1000) -> dict:
    """Train and write the folder `load_encoder` reads; returns the card, which is written beside the weights.

    An interrupted run goes on from its last checkpoint (`<folder>.partial`, for the same seed, config and generator).
    device: of the steps; scenes are drawn and figures measured on the CPU, which is the default.
    checks: validation queries at each checkpoint, reported only. dev_queries: size of the measured development split.
    """
    cfg = cfg or TrainingConfig()
    folder, say = Path(folder), progress or (lambda line: None)
    expect(not folder.exists(), folder, "a path where nothing lies yet", "an existing file or folder")
    encoder, model_cfg = new_encoder(cfg, seed=seed)
    partial = folder.with_name(f".{folder.name}.partial")
    encoder.model.to(device or "cpu")
    seconds = _optimise(encoder, cfg, seed, partial, say, checks)
    encoder.model.cpu()
    card = finish(folder, encoder, model_cfg, cfg, seed=seed, seconds=seconds, dev_queries=dev_queries)
    partial.unlink(missing_ok=True)
    return card


def finish(folder: Path, encoder: Encoder, model_cfg: dict, cfg: TrainingConfig, *, seed: int, seconds: float,
           dev_queries: int) -> dict:
    """Round the weights to half precision, measure what is then stored, write the folder; returns the card."""
    for weight in encoder.model.state_dict().values():
        if weight.is_floating_point():
            weight.copy_(weight.half())
    card = {"command": "python -m submit weights train encoder --out FOLDER", "seed": seed, "steps": cfg.steps,
            "seconds": round(seconds), "config": asdict(cfg),
            "figures": {"split": f"development, seed 0, {dev_queries} queries; top-1 in percent",
                        **development_figures(encoder, queries=dev_queries)},
            "versions": {"torch": torch.__version__, "open_clip": open_clip.__version__},
            "threads": torch.get_num_threads(),  # sums are split by thread: other counts end at other weights
            "data": "scenes generated during training (data.scenes, part TRAINING); no file, no real image"}
    save_encoder(folder, encoder, model_cfg, card)
    return card


def development_figures(encoder: Encoder, *, queries: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """`measure` on the development split: with the true parse, and with the embedded parser's if it is there."""
    triplets = retrieval_triplets(DEVELOPMENT, seed=seed, queries=queries)
    found = {"true parse": measure(encoder, triplets)}
    if PARSER.is_file():
        read = parse(request_texts(triplets, seed=seed))
        asked = [(change.add, change.remove) for change in read]
        found[f"predicted parse, parser {fingerprint(PARSER)}"] = measure(encoder, triplets, asked)
    return found


def _optimise(encoder: Encoder, cfg: TrainingConfig, seed: int, partial: Path,
              say: Callable[[str], None], checks: int) -> float:
    """All steps; leaves the model in eval mode. Returns the seconds of all runs together."""
    model = encoder.model.requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=cfg.rate, weight_decay=cfg.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, cfg.steps))
    prompts = encoder.vocabulary.encode([PROMPT.format(name) for name in NAMES]).to(encoder.device)
    first_images = draw_batch(cfg, np.random.default_rng([TRAINING.index, seed, 0]))[0]
    key = fingerprint(asdict(cfg), seed, first_images.numpy().tobytes())  # other drawings, other run
    state = {"model": model, "optimiser": optimiser, "schedule": schedule}
    first, before = _resume(partial, key, state)
    started = time.monotonic()
    for step in range(first, cfg.steps):
        model.train()
        rng = np.random.default_rng([TRAINING.index, seed, step])  # a resumed run draws what it would have drawn
        loss = _step(encoder, optimiser, *draw_batch(cfg, rng), prompts, cfg)
        schedule.step()
        if (step + 1) % cfg.checkpoint_every == 0 or step + 1 == cfg.steps:
            model.eval()
            seconds = before + time.monotonic() - started
            _checkpoint(partial, {"key": key, "step": step + 1, "seconds": seconds}, state)
            held = retrieval_triplets(VALIDATION, seed=seed, queries=checks) if checks else []
            found = f", validation top-1 {measure(encoder, held)['composed']}" if held else ""
            say(f"step {step + 1}/{cfg.steps}, {seconds:.0f} s, loss {loss:.3f}{found}")
    model.eval().requires_grad_(False)
    return before + time.monotonic() - started


def _step(encoder: Encoder, optimiser: torch.optim.Optimizer, images: Tensor, holds: Tensor, prompts: Tensor,
          cfg: TrainingConfig) -> float:
    model = encoder.model
    images, holds = images.to(encoder.device), holds.to(encoder.device)
    pixels = normalised(images.flatten(0, 1), encoder.preprocess).contiguous(memory_format=torch.channels_last)
    found = model.encode_image(pixels).unflatten(0, images.shape[:2])   # (F, S, D)
    captions = holds @ model.encode_text(prompts)                       # (F, S, names) @ (names, D)
    scale = model.logit_scale.exp().clamp(max=100.0)                    # temperature at least 0.01
    loss = cfg.composition_weight * composition_loss(found, captions, scale) if cfg.composition_weight else 0.0
    loss = loss + cfg.caption_weight * both_ways(found.flatten(0, 1), captions.flatten(0, 1), scale)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.item()


def _rate(step: int, steps: int, warm_up: int = 50) -> float:
    """Share of the full rate: linear warm-up, then half a cosine to zero."""
    warm_up = min(warm_up, max(1, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _checkpoint(path: Path, record: dict, state: dict) -> None:
    scratch = path.with_name(path.name + ".new")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(record | {name: part.state_dict() for name, part in state.items()}, scratch)
    scratch.replace(path)


def _resume(path: Path, key: str, state: dict) -> tuple[int, float]:
    """Steps and seconds already done; fills `state` if a checkpoint of this very run exists."""
    if not path.exists():
        return 0, 0.0
    record = torch.load(path, map_location="cpu", weights_only=True)
    if record["key"] != key:
        return 0, 0.0
    for name, part in state.items():
        part.load_state_dict(record[name])
    return record["step"], record["seconds"]


def measure(encoder: Encoder, triplets: Sequence[Triplet],
            asked: Sequence[tuple[Sequence[str], Sequence[str]]] | None = None) -> dict[str, float]:
    """Top-1 in percent over the unique targets: composed, query image alone, text alone; how often the query wins;
    composed by kind of request.

    asked: (added, removed) names as a parser read them, one a triplet; None takes the true ones.
    """
    asked = asked or [(t.add, t.remove) for t in triplets]
    scenes = {scene: i for i, scene in enumerate(dict.fromkeys(
        [t.target for t in triplets] + [t.query for t in triplets]))}
    embedded = encoder.encode_images(torch.from_numpy(np.stack([draw_scene(s) for s in scenes])).permute(0, 3, 1, 2))
    gallery = embedded[:len({t.target for t in triplets})]
    truth = torch.tensor([scenes[t.target] for t in triplets])
    query = torch.tensor([scenes[t.query] for t in triplets])
    added, removed = zip(*asked, strict=True)
    rows = {"composed": compose(embedded[query], added, removed, encoder.encode_texts),
            "query image alone": embedded[query],
            "text alone": compose(torch.zeros_like(embedded[query]), added, removed, encoder.encode_texts)}
    found = {name: nearest(v, gallery).cpu() for name, v in rows.items()}
    percent = {name: 100 * (index == truth).double().mean().item() for name, index in found.items()}
    percent["query image wins"] = 100 * (found["composed"] == query).double().mean().item()
    for kind in sorted({(len(t.add), len(t.remove)) for t in triplets}):
        of_kind = torch.tensor([(len(t.add), len(t.remove)) == kind for t in triplets])
        hits = (found["composed"] == truth)[of_kind]
        percent[f"composed, {kind[0]} added {kind[1]} removed (n {len(hits)})"] = 100 * hits.double().mean().item()
    return {name: round(value, 2) for name, value in percent.items()}


def save_encoder(folder: Path, encoder: Encoder, model_cfg: dict, card: dict) -> None:
    """Write the folder `load_encoder` reads; weights in half precision."""
    weights = {name: (w.half() if w.is_floating_point() else w).contiguous()
               for name, w in encoder.model.state_dict().items()}
    with new_folder(folder) as scratch:
        write_json(scratch / "config.json", {"model_cfg": model_cfg, "preprocess_cfg": asdict(encoder.preprocess)})
        write_json(scratch / "vocabulary.json", encoder.vocabulary.kept)
        write_json(scratch / "card.json", card)
        write_atomic(scratch / "model.safetensors", save(weights))
