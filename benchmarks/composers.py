"""Ways of composing, chosen on VALIDATION, reported on DEVELOPMENT: `python -m benchmarks.composers [captions]`.

2,000 requests a part with scenes of their own. Random gallery: the targets. Hard gallery: each target beside its query
image and four scenes one object away (data.hard_gallery). Weights and sharpness come from a grid on VALIDATION;
text and image means and the bank of requests from TRAINING. Published arithmetic stays the default unless another way
has more hits in the hard gallery of VALIDATION, true parse, than chance explains: McNemar's exact test, its probability
times the number of settings tried, below 5 %. With `captions` the same for an encoder trained on captions alone.
"""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.caption_encoder import FOLDER, caption_encoder
from data.files import fingerprint, write_json
from data.hard_gallery import HardQuery, hard_gallery, hard_queries
from data.pictograms import NAMES
from data.scenes import DEVELOPMENT, TRAINING, VALIDATION, Part, draw_scene, request_texts
from retrieval.compose import (
    NO_STATISTICS,
    PUBLISHED,
    ComposerConfig,
    Statistics,
    compose,
    fit_statistics,
    gallery_vectors,
)
from retrieval.encoder import EMBEDDED, load_encoder
from retrieval.gallery import nearest
from retrieval.parser import parse
from retrieval.prompts import ENSEMBLE, TextCache
from retrieval.train_encoder import PARSER
from submit.intervals import share_interval
from submit.records import environment

QUERIES, SEED = 2000, 0
WEIGHTS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
SHARPNESS = (5.0, 10.0, 20.0, 50.0)
BLOCK = 512  # scenes drawn at a time


@dataclass(frozen=True)
class Split:
    """Embedded requests of one part. The hard gallery starts with the targets: target i answers request i."""
    gallery: Tensor                                            # (6 Q, D) raw
    query: Tensor                                              # (Q,) where the query image stands in it
    asked: list[HardQuery]
    texts: list[str]

    @property
    def images(self) -> Tensor:
        return self.gallery[self.query]

    @property
    def true(self) -> tuple[list, list]:
        return [a.triplet.add for a in self.asked], [a.triplet.remove for a in self.asked]

    def predicted(self) -> tuple[list, list]:
        read = parse(self.texts)
        return [change.add for change in read], [change.remove for change in read]


def embedded_split(embed: Callable[[Tensor], Tensor], part: Part, *, seed: int, queries: int) -> Split:
    """embed: (B, 3, SIDE, SIDE) uint8 -> (B, D) raw."""
    asked = hard_queries(part, seed=seed, queries=queries)
    scenes = hard_gallery(asked)
    place = {scene: i for i, scene in enumerate(scenes)}
    blocks = (np.stack([draw_scene(s) for s in scenes[i:i + BLOCK]]) for i in range(0, len(scenes), BLOCK))
    gallery = torch.cat([embed(torch.from_numpy(b).permute(0, 3, 1, 2)) for b in blocks])
    return Split(gallery, torch.tensor([place[a.triplet.query] for a in asked]), asked,
                 request_texts([a.triplet for a in asked], seed=seed))


@dataclass(frozen=True)
class Way:
    """A config with what it learned from TRAINING."""
    config: ComposerConfig
    statistics: Statistics = NO_STATISTICS

    def found(self, split: Split, parsed: tuple[list, list], encode_texts: TextCache, *, hard: bool) -> np.ndarray:
        """Index of the nearest image of the gallery for each request."""
        gallery = split.gallery if hard else split.gallery[:len(split.asked)]
        queries = compose(split.images, *parsed, encode_texts, self.config, self.statistics)
        return nearest(queries, gallery_vectors(gallery, self.config, self.statistics)).numpy()


def hits(found: np.ndarray) -> np.ndarray:
    return found == np.arange(len(found))


def fitted(config: ComposerConfig, training: Split, encode_texts: TextCache) -> Way:
    return Way(config, fit_statistics(config, training.images, NAMES, *training.true, encode_texts))


def candidates() -> dict[str, list[ComposerConfig]]:
    """Name of a way -> the settings among which VALIDATION chooses."""
    def weighed(start: ComposerConfig) -> list[ComposerConfig]:
        return [replace(start, add_weight=a, remove_weight=r) for a in WEIGHTS for r in WEIGHTS]

    def by_removal(start: ComposerConfig) -> list[ComposerConfig]:
        return [replace(start, remove_weight=r) for r in WEIGHTS if r <= 1.5]

    return {"published arithmetic": [PUBLISHED],
            "prompt ensemble": [replace(PUBLISHED, prompts=ENSEMBLE)],
            "weights a side": weighed(PUBLISHED),
            "unit lengths, weights a side": weighed(replace(PUBLISHED, unit=True)),
            "texts centred": [replace(PUBLISHED, centre_texts=True)],
            "texts and images centred": [replace(PUBLISHED, centre_texts=True, centre_images=True)],
            "images centred": [replace(PUBLISHED, centre_images=True)],
            "removal by projection": by_removal(replace(PUBLISHED, project=True)),
            "removal by projection, texts centred": by_removal(replace(PUBLISHED, project=True, centre_texts=True)),
            "hubs pushed back": [replace(PUBLISHED, hub_sharpness=s) for s in SHARPNESS],
            "unit lengths, all centred, weights": weighed(replace(PUBLISHED, unit=True, centre_texts=True,
                                                                  centre_images=True))}


def best_settings(training: Split, validation: Split, encode_texts: TextCache) -> dict[str, Way]:
    """Of each way the setting with most hits in the hard gallery of VALIDATION; among equals the nearest to one."""
    chosen = {}
    for name, configs in candidates().items():
        ways = [fitted(config, training, encode_texts) for config in configs]
        chosen[name] = max(ways, key=lambda way: (
            hits(way.found(validation, validation.true, encode_texts, hard=True)).sum(), -distance(way.config)))
    return chosen


def distance(config: ComposerConfig) -> float:
    return abs(np.log(config.add_weight)) + abs(np.log(config.remove_weight))


def chosen_way(correct: dict[str, np.ndarray], tried: int) -> str:
    """The way with most hits, if it is better than the published one by more than chance explains; else that one."""
    published = correct["published arithmetic"]
    best = max(correct, key=lambda name: correct[name].sum())
    won, lost = (correct[best] & ~published).sum(), (published & ~correct[best]).sum()
    chance = binom.sf(won - 1, won + lost, 0.5) * tried if won > lost else 1.0
    return best if chance < 0.05 else "published arithmetic"


def rates(found: np.ndarray, split: Split) -> dict:
    correct = hits(found)
    low, high = share_interval(correct, SEED)
    return {"top1": 100 * float(correct.mean()), "interval_95": [round(low, 2), round(high, 2)],
            "query image wins": 100 * float((found == split.query.numpy()).mean())}


def cells(found: np.ndarray, split: Split) -> dict[str, dict]:
    """Top-1 by (added, removed)."""
    kinds = np.array([(len(a.triplet.add), len(a.triplet.remove)) for a in split.asked])
    rows = {}
    for kind in sorted(map(tuple, np.unique(kinds, axis=0).tolist())):
        correct = hits(found)[(kinds == kind).all(1)]
        rows[f"{kind[0]} added, {kind[1]} removed"] = {
            "n": len(correct), "top1": round(100 * float(correct.mean()), 2),
            "interval_95": [round(v, 2) for v in share_interval(correct, SEED)]}
    return rows


def alone(split: Split, encode_texts: TextCache) -> dict[str, Tensor]:
    """Query vectors of the two halves of a request."""
    return {"query image alone": normalize(split.images, dim=-1),
            "text alone": compose(torch.zeros_like(split.images), *split.true, encode_texts)}


def measured(ways: dict[str, Way], split: Split, encode_texts: TextCache) -> dict:
    """Every way on one part: random and hard gallery, true and predicted parse; its cells in the hard gallery."""
    parses = {"true parse": split.true, "predicted parse": split.predicted()}
    rows = {}
    for name, vectors in alone(split, encode_texts).items():
        gallery = normalize(split.gallery, dim=-1)
        rows[name] = {"true parse, hard": rates(nearest(vectors, gallery).numpy(), split),
                      "true parse, random": rates(nearest(vectors, gallery[:len(split.asked)]).numpy(), split)}
    for name, way in ways.items():
        found = {(p, hard): way.found(split, parsed, encode_texts, hard=hard)
                 for p, parsed in parses.items() for hard in (True, False)}
        rows[name] = {f"{p}, {'hard' if hard else 'random'}": rates(f, split) for (p, hard), f in found.items()}
        rows[name]["cells, true parse, hard"] = cells(found["true parse", True], split)
    return rows


def show(title: str, rows: dict) -> None:
    columns = ("true parse, hard", "true parse, random", "predicted parse, hard", "predicted parse, random")
    print(f"\n{title}: top-1 in percent [95 %]; the last column: the query image wins in the hard gallery, true parse")
    print(" " * 38 + "".join(f"{c:>25s}" for c in columns))
    for name, row in rows.items():
        line = "".join(f"{_with_interval(row[c]) if c in row else '-':>25s}" for c in columns)
        print(f"{name:38s}{line}{row[columns[0]]['query image wins']:9.2f}")


def _with_interval(rate: dict) -> str:
    return f"{rate['top1']:.2f} [{rate['interval_95'][0]:.1f}, {rate['interval_95'][1]:.1f}]"


def show_cells(rows: dict, names: Iterable[str]) -> None:
    print("\nDEVELOPMENT by objects added + and removed -, hard gallery, true parse (number of requests)")
    for name in names:
        kinds = rows[name]["cells, true parse, hard"]
        line = (f"{kind.replace(' added, ', '+').replace(' removed', '-')} {rate['top1']:.1f} ({rate['n']})"
                for kind, rate in kinds.items())
        print(f"{name:38s}  " + "  ".join(line))


def main(captions: bool) -> None:
    torch.set_num_threads(1)
    encoder = caption_encoder() if captions else load_encoder(device="cpu")
    encode_texts = TextCache(encoder.encode_texts)
    training, validation, development = (embedded_split(encoder.encode_images, part, seed=SEED, queries=QUERIES)
                                         for part in (TRAINING, VALIDATION, DEVELOPMENT))
    ways = best_settings(training, validation, encode_texts)
    correct = {name: hits(way.found(validation, validation.true, encode_texts, hard=True))
               for name, way in ways.items()}
    default = chosen_way(correct, tried=sum(map(len, candidates().values())))
    tables = {}
    for part, split in (("VALIDATION", validation), ("DEVELOPMENT", development)):
        tables[part] = measured(ways, split, encode_texts)
        show(part, tables[part])
    show_cells(tables["DEVELOPMENT"], dict.fromkeys(["published arithmetic", default]))
    print(f"\ndefault by VALIDATION: {default}")
    name = "composers_captions" if captions else "composers"
    write_json(Path(__file__).parent / "records" / f"{name}.json", {
        "command": f"python -m benchmarks.composers{' captions' if captions else ''}", "seed": SEED,
        "requests a part": QUERIES, "hard gallery": len(development.gallery),
        "encoder": fingerprint((FOLDER if captions else EMBEDDED) / "model.safetensors"),
        "parser": fingerprint(PARSER), "default": default,
        "settings": {name: asdict(way.config) for name, way in ways.items()}, "tables": tables,
        "environment": environment()})


if __name__ == "__main__":
    main(sys.argv[1:] == ["captions"])
