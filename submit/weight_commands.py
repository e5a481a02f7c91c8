"""`weights train`: the scripts that made the embedded weights. `weights tune`: a head fitted to a training set."""
from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

from data.errors import expect

TRAINERS = {"parser": "retrieval.train_parser", "encoder": "retrieval.train_encoder",
            "backbone": "anomaly.train_backbone"}


def train(name: str, out: Path, *, seed: int, start: Path | None = None) -> None:
    """Train `name` into the new folder `out`, progress on stderr, figures on stdout.

    start: pretrained encoder, for the parser only.
    """
    expect(not out.exists(), out, "a folder that does not exist yet", "one that does")
    expect(start is None or name == "parser", "--start", "the parser", name)
    more = {} if start is None else {"start": start}
    card = import_module(TRAINERS[name]).train(out, seed=seed, progress=lambda line: print(line, file=sys.stderr),
                                               **more)
    print(json.dumps(card["figures"], indent=1))
    print(f"weights: {out}")


def tune(data: Path, out: Path, *, source: Path | None, cache: Path, seed: int, device: str) -> int:
    """Tune the head of the encoder in `source` on the retrieval set `data`; the new encoder is `out`.

    Returns the number of rows left out; each is a line on stderr. Features are kept in `cache`.
    """
    from data.retrieval_set import read_retrieval_set
    from retrieval import tune_encoder

    expect(not out.exists(), out, "a folder that does not exist yet", "one that does")
    found = read_retrieval_set(data)
    for problem in found.problems:
        print(problem, file=sys.stderr)
    card = tune_encoder.tune(out, found.queries, source=source, cache=cache, seed=seed, device=device,
                             progress=lambda line: print(line, file=sys.stderr))
    print(json.dumps(card["epochs"], indent=1))
    print(f"encoder: {out}")
    return len(found.problems)
