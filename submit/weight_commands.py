"""`weights train`: the scripts that made the embedded weights."""
from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

from data.errors import expect

TRAINERS = {"parser": "retrieval.train_parser", "encoder": "retrieval.train_encoder",
            "backbone": "anomaly.train_backbone"}


def train(name: str, out: Path, *, seed: int) -> None:
    """Train `name` into the new folder `out`, progress on stderr, figures on stdout."""
    expect(not out.exists(), out, "a folder that does not exist yet", "one that does")
    card = import_module(TRAINERS[name]).train(out, seed=seed, progress=lambda line: print(line, file=sys.stderr))
    print(json.dumps(card["figures"], indent=1))
    print(f"weights: {out}")
