"""An encoder with a head tuned on a training set of the retrieval task: images, requests in words, targets.

Features of the trunk are cached; the epoch that is best on held-out scenes is kept, and the head as it was is one of
those it is compared with.
"""
from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from data.errors import expect
from data.files import new_folder, write_json
from data.weight_files import read_weights
from retrieval.compose import PUBLISHED, ComposerConfig
from retrieval.composer import SETTINGS, read_settings
from retrieval.encoder import CONFIGS, EMBEDDED, WEIGHTS, Encoder, load_encoder, one_of
from retrieval.head_tuning import HeadConfig, Pairs, changes, held_out_rows, top1, tune_head
from retrieval.parser import parse
from retrieval.trunk_features import file_names, first_of_equals, read_row, trunk_and_head, trunk_features

HELD_OUT = 0.1  # share of the rows, the reference solution's


def tune(folder: Path, rows: pd.DataFrame, *, source: Path | None = None, cache: Path, seed: int,
         device: torch.device | str, config: HeadConfig | None = None,
         progress: Callable[[str], None] = lambda line: None) -> dict:
    """Write the new folder `folder`, an encoder as `load_encoder` reads it; returns the card that lies beside it.

    rows: `query_image`, `target_image` (paths ready to open) and `query_text`. source: folder of the encoder to start
    from, and of its way to compose (`composer.json`: prompts, unit lengths and weights); None: the embedded one. cache:
    folder for features, which another run on the same files uses again.
    """
    folder, source, config = Path(folder), EMBEDDED if source is None else Path(source), config or HeadConfig()
    expect(not folder.exists(), folder, "a path where nothing lies yet", "an existing file or folder")
    encoder = load_encoder(source, device=device)
    started = time.monotonic()
    features, pairs = training_pairs(encoder, rows, cache, read_settings(source / SETTINGS))
    progress(f"{len(features)} images, {len(pairs)} rows, {time.monotonic() - started:.0f} s")
    generator = torch.Generator().manual_seed(seed)
    held = held_out_rows(pairs.query, pairs.target, HELD_OUT, generator=generator)
    weight, epochs = best_head(trunk_and_head(encoder.model)[1].weight, features, pairs, held, config,
                               generator=generator, progress=progress)
    card = {"seed": seed, "rows": len(pairs), "held out": int(held.sum()), "images": len(features),
            "config": asdict(config), "epochs": epochs, "versions": {"torch": torch.__version__}}
    save_tuned(folder, source, encoder, weight, card)
    return card


def training_pairs(encoder: Encoder, rows: pd.DataFrame, cache: Path, composer: ComposerConfig = PUBLISHED
                   ) -> tuple[Tensor, Pairs]:
    """Features (N, F) of the distinct images, and the rows in their numbers; equal images have one number."""
    both = pd.concat([rows["query_image"], rows["target_image"]])
    number, paths = pd.factorize(both)
    places = [f"row {row}" for row in both.index[~both.duplicated()]]
    features = trunk_features(encoder, list(zip(places, paths, strict=True)), cache, names=file_names(paths),
                              opened=read_row)
    number = first_of_equals(features)[torch.from_numpy(number)]
    read = parse(rows["query_text"].tolist())
    change = changes([r.add for r in read], [r.remove for r in read], encoder.encode_texts, composer)
    return features, Pairs(number[:len(rows)], number[len(rows):], change, composer.unit)


def best_head(start: Tensor, features: Tensor, pairs: Pairs, held: Tensor, config: HeadConfig, *,
              generator: torch.Generator, progress: Callable[[str], None]) -> tuple[Tensor, list[dict]]:
    """The head of the epoch with the highest top-1 among the targets of the held-out rows; the first among equals."""
    def look_up(numbers: Tensor) -> Tensor:
        return features[numbers].to(start.device)

    best, records = start, [{"epoch": 0, "held-out top-1": top1(start, look_up, pairs[held])}]
    for epoch in tune_head(start, look_up, pairs[~held], config, generator=generator):
        record = {"epoch": epoch.number, "loss": sum(epoch.losses) / len(epoch.losses),
                  "held-out top-1": top1(epoch.weight, look_up, pairs[held])}
        if record["held-out top-1"] > max(r["held-out top-1"] for r in records):
            best = epoch.weight
        records.append(record)
        progress(f"epoch {epoch.number}, loss {record['loss']:.4f}, held-out top-1 {record['held-out top-1']:.4f}")
    return best, records


def save_tuned(folder: Path, source: Path, encoder: Encoder, weight: Tensor, card: dict) -> None:
    """The files of `source` in a new folder, with another head (D, F) in the float type of the old."""
    head = trunk_and_head(encoder.model)[1].weight
    name = next(name for name, parameter in encoder.model.named_parameters() if parameter is head)
    weights = read_weights(one_of(source, WEIGHTS))
    weights[name] = weight.detach().cpu().to(weights[name].dtype).contiguous()
    with new_folder(folder) as scratch:
        shutil.copy(one_of(source, CONFIGS), scratch)
        for extra in ("vocabulary.json", SETTINGS):
            if (source / extra).exists():
                shutil.copy(source / extra, scratch)
        write_json(scratch / "card.json", card)
        save_file(weights, scratch / one_of(source, WEIGHTS).name)
