"""Head tuning on cached features: its time, its loss curve, and what it brings: `python -m benchmarks.head_tuning`.

Time: five epochs over the same batches, once with features computed once an image and written to a file, once with the
trunk run for both images of every row in every epoch; seconds of one core. Rows: 4,000 requests to 1,340 scenes, each
the target of about three. With every image in one row only, the best possible ratio would be 10 to 1.
Gain: 10,000 training requests; the rate and the epoch are chosen on the hard gallery of VALIDATION, and the head as it
was is among the choices; reported on DEVELOPMENT (benchmarks.composers). On the embedded encoder, which was trained to
compose, and on one trained on captions alone; the latter is trained first, about ten minutes on one thread, once.
`--full` is benchmarks.encoder_speed: the time of ViTamin-L-384 on random weights, meant for a GPU.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from benchmarks import encoder_speed
from benchmarks.caption_encoder import caption_encoder
from benchmarks.composers import Split, Way, cells, embedded_split, rates
from benchmarks.options import add_out, record_file
from data.files import write_json
from data.scenes import (
    DEVELOPMENT,
    FAMILY,
    TRAINING,
    VALIDATION,
    Triplet,
    choose_query,
    draw_scene,
    make_family,
)
from retrieval.compose import PUBLISHED
from retrieval.encoder import Encoder, load_encoder
from retrieval.head_tuning import HeadConfig, Pairs, changes, tune_head
from retrieval.prompts import TextCache
from retrieval.trunk_features import trunk_and_head, trunk_features
from submit.records import environment

TIMED_ROWS, TRAINING_ROWS, ROWS_A_TARGET = 4000, 10_000, 3
QUERIES, SEED = 2000, 0
RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # the first is the recipe's
CONFIG = HeadConfig()
FULL = (1024, 768)                # features and embedding of ViTamin-L-384


@dataclass(frozen=True)
class Rows:
    """Training requests, their distinct images (N, 3, SIDE, SIDE) uint8, and the numbers of these in each row."""
    triplets: list[Triplet]
    images: Tensor
    query: Tensor
    target: Tensor

    def pairs(self, encoder: Encoder) -> Pairs:
        texts = TextCache(encoder.encode_texts)
        return Pairs(self.query, self.target,
                     changes([t.add for t in self.triplets], [t.remove for t in self.triplets], texts))


def training_rows(count: int, *, seed: int) -> Rows:
    """Requests of TRAINING: every scene of its families is the target of ROWS_A_TARGET, and the query of about as many.
    """
    rng = np.random.default_rng([TRAINING.index, seed, 7])  # 7: a stream of its own
    triplets: list[Triplet] = []
    while len(triplets) < count:
        family = [scene for row in make_family(TRAINING, FAMILY, rng=rng) for scene in row]
        triplets += [choose_query(family, scene, rng=rng) for scene in family for _ in range(ROWS_A_TARGET)]
    return rows_of(triplets[:count])


def rows_of(triplets: list[Triplet]) -> Rows:
    place = {s: i for i, s in enumerate(dict.fromkeys(s for t in triplets for s in (t.query, t.target)))}
    images = torch.from_numpy(np.stack([draw_scene(s) for s in place])).permute(0, 3, 1, 2)
    return Rows(triplets, images, torch.tensor([place[t.query] for t in triplets]),
                torch.tensor([place[t.target] for t in triplets]))


def timed(encoder: Encoder) -> dict:
    """Five epochs with and without the cache: seconds of one core, and how far the loss curves lie apart."""
    rows = training_rows(TIMED_ROWS, seed=SEED + 1)
    pairs = rows.pairs(encoder)
    trunk, head = trunk_and_head(encoder.model)

    def run(look_up) -> list[float]:
        generator = torch.Generator().manual_seed(SEED)
        return [loss for epoch in tune_head(head.weight, look_up, pairs, CONFIG, generator=generator)
                for loss in epoch.losses]

    def through_the_trunk(numbers: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([trunk(block) for block in encoder.inputs(rows.images[numbers])])

    with TemporaryDirectory() as folder:
        start = time.process_time()
        features = trunk_features(encoder, rows.images, Path(folder), names=range(len(rows.images)))
        filled = time.process_time()
        cached = run(features.__getitem__)
        cached_end = time.process_time()
    uncached = run(through_the_trunk)
    end = time.process_time()
    slow, fast = end - cached_end, cached_end - start
    return {"rows": len(pairs), "images": len(rows.images), "epochs": CONFIG.epochs,
            "seconds, trunk every epoch": round(slow, 2), "seconds, cached": round(fast, 2),
            "of them filling the cache": round(filled - start, 2), "ratio": round(slow / fast, 1),
            "largest difference of a step's loss": float(np.abs(np.subtract(cached, uncached)).max()),
            "loss of the first and last step": [round(cached[0], 4), round(cached[-1], 4)]}


def timed_epoch(embedding: Tensor, features: Tensor) -> float:
    """Seconds of one core for an epoch over TRAINING_ROWS rows from the cache."""
    generator = torch.Generator().manual_seed(SEED)
    query, target = (torch.randint(len(features), (TRAINING_ROWS,), generator=generator) for _ in range(2))
    pairs = Pairs(query, target, torch.randn(TRAINING_ROWS, len(embedding), generator=generator))
    start = time.process_time()
    next(tune_head(embedding, features.__getitem__, pairs, CONFIG, generator=generator))
    return round(time.process_time() - start, 2)


def gain(encoder: Encoder) -> dict:
    """Top-1 in the hard gallery before and after tuning, the rate and epoch chosen on VALIDATION."""
    trunk, head = trunk_and_head(encoder.model)

    def embed(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([trunk(block) for block in encoder.inputs(images)])

    rows, texts = training_rows(TRAINING_ROWS, seed=SEED), TextCache(encoder.encode_texts)
    features, pairs = embed(rows.images), rows.pairs(encoder)
    validation, development = (embedded_split(embed, part, seed=SEED, queries=QUERIES)
                               for part in (VALIDATION, DEVELOPMENT))
    heads = {"as it was": head.weight}
    for rate in RATES:
        epochs = tune_head(head.weight, features.__getitem__, pairs, replace(CONFIG, rate=rate),
                           generator=torch.Generator().manual_seed(SEED))
        heads |= {f"rate {rate:g}, epoch {epoch.number}": epoch.weight for epoch in epochs}
    reached = {name: hard_rates(validation, weight, texts)["top1"] for name, weight in heads.items()}
    best = max(reached, key=reached.__getitem__)  # the first among equals: the head as it was
    shown = {"as it was": heads["as it was"], "recipe": heads[f"rate {CONFIG.rate:g}, epoch {CONFIG.epochs}"],
             "chosen": heads[best]}
    return {"training rows": len(pairs), "images": len(rows.images), "chosen on VALIDATION": best,
            "VALIDATION, hard, top1": {name: round(value, 2) for name, value in reached.items()},
            "DEVELOPMENT, hard": {name: hard_rates(development, weight, texts) for name, weight in shown.items()},
            "DEVELOPMENT, hard, chosen, by kind": cells(found(development, heads[best], texts), development)}


def found(split: Split, weight: Tensor, texts: TextCache) -> np.ndarray:
    embedded = replace(split, gallery=split.gallery @ weight.T)
    return Way(PUBLISHED).found(embedded, embedded.true, texts, hard=True)


def hard_rates(split: Split, weight: Tensor, texts: TextCache) -> dict:
    return rates(found(split, weight, texts), split)


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    if "--full" in given:
        return encoder_speed.main([part for part in given if part != "--full"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="benchmarks.encoder_speed, with its options")
    parser.add_argument("--time-only", action="store_true", help="no gain, which needs the encoder of captions")
    parser.add_argument("--device", default="cpu", help="cpu, whose seconds of one core are measured; with --full any")
    add_out(parser, "head_tuning")
    options = parser.parse_args(given)
    if options.device != "cpu":
        parser.error(f"--device: expected cpu, or --full, found {options.device}")
    torch.set_num_threads(1)
    embedded = load_encoder(device="cpu")
    record = {"command": "python -m benchmarks.head_tuning", "seed": SEED, **times(embedded)}
    if not options.time_only:
        record |= gains({"embedded encoder": embedded, "encoder of captions": caption_encoder()})
    write_json(record_file("head_tuning", torch.device("cpu"), options.out), record | {"environment": environment()})
    return 0


def times(embedded: Encoder) -> dict:
    """The record's part on time, printed."""
    found = {"time": timed(embedded)}
    for name, value in found["time"].items():
        print(f"{name:40s} {value}")
    draws = torch.Generator().manual_seed(SEED)
    width = trunk_and_head(embedded.model)[1].weight
    found["seconds of an epoch over 10,000 rows"] = {
        "embedded encoder": timed_epoch(width, torch.randn(4000, width.shape[1], generator=draws)),
        "ViTamin-L-384": timed_epoch(torch.randn(FULL[1], FULL[0], generator=draws) / 32,
                                     torch.randn(4000, FULL[0], generator=draws))}
    print(found["seconds of an epoch over 10,000 rows"])
    return found


def gains(encoders: Mapping[str, Encoder]) -> dict:
    """The record's part on what tuning brings, printed."""
    found = {}
    for name, encoder in encoders.items():
        found[name] = gain(encoder)
        print(f"{name}, hard gallery of DEVELOPMENT, true parse; chosen: {found[name]['chosen on VALIDATION']}")
        for head, rate in found[name]["DEVELOPMENT, hard"].items():
            print(f"  {head:12s} {rate['top1']:6.2f}  {rate['interval_95']}, "
                  f"the query image wins {rate['query image wins']:.2f}")
    return found


if __name__ == "__main__":
    sys.exit(main())
