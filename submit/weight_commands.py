"""`weights train`, `average`: the scripts that made the embedded weights. `tune`: a head fitted to a training set.
`list`, `fetch`, `freeze`, `verify`: weights of the hub, and the folder that needs no network.
"""
from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.table import Table

from data.errors import expect
from data.files import write_json
from submit.dev_splits import ROOT
from submit.submission import plain
from submit.tables import console, print_record
from submit.weights_fetching import fetch, fetched
from submit.weights_registry import Weight, chosen, how_to_get, read_registry

TRAINERS = {"parser": "retrieval.train_parser", "encoder": "retrieval.train_encoder",
            "backbone": "anomaly.train_backbone"}


def train(name: str, out: Path, *, seed: int, start: Path | None = None, photos: Path | None = None,
          steps: int | None = None, device: str = "cpu") -> None:
    """Train `name` into the new folder `out`, progress on stderr, figures on stdout.

    start: pretrained encoder, for the parser only. photos: a folder of images, for the backbone only. steps: in place
    of the number of the embedded weights; its schedule is stretched. An interrupted call goes on from its checkpoint
    beside `out`, also on another device.
    """
    expect(not out.exists(), out, "a folder that does not exist yet", "one that does")
    expect(start is None or name == "parser", "--start", "the parser", name)
    expect(photos is None or name == "backbone", "--photos", "the backbone", name)
    trainer = import_module(TRAINERS[name])
    more: dict[str, Any] = {} if start is None else {"start": start}
    asked = ""
    if photos is not None:
        more["photos"] = photos
        asked = " --photos FOLDER"
    if steps is not None:
        more |= _longer(name, trainer, steps, staged=start is not None)
        asked += f" --steps {steps}"
    if device != "cpu":
        import torch  # takes more than a second, which `list` need not wait for

        more["device"] = torch.device(device)
        asked += f" --device {device}"
    card = trainer.train(out, seed=seed, progress=lambda line: print(line, file=sys.stderr), **more)
    if asked:
        card = card | {"command": card["command"] + asked}
        write_json(out / "card.json", card)
    print(json.dumps(card["figures"], indent=1))
    print(f"weights: {out}")


def average_parsers(folders: list[Path], out: Path) -> None:
    """The mean of trained parsers in the new folder `out`, figures on stdout."""
    from retrieval.average_parsers import average

    expect(not out.exists(), out, "a folder that does not exist yet", "one that does")
    print(json.dumps(average(folders, out)["figures"], indent=1))
    print(f"weights: {out}")


def _longer(name: str, trainer: ModuleType, steps: int, *, staged: bool) -> dict[str, Any]:
    """The trainer's config with so many steps; a parser that is trained in two stages keeps their shares."""
    expect(steps >= 1, "--steps", ">= 1", steps)
    if name != "parser":
        return {"cfg" if name == "encoder" else "config": replace(trainer.TrainingConfig(), steps=steps)}
    config = trainer.ParserTrainingConfig()
    first = round(steps * config.steps / (config.steps + config.steps_narrow)) if staged else steps
    return {"config": replace(config, steps=first, **({"steps_narrow": steps - first} if staged else {}))}


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


def list_weights(cache: Path, *, as_json: bool) -> None:
    """Every entry of the registry, and whether it is here."""
    rows = [{"name": weight.name, "use": weight.use, "licence": weight.licence, "bytes": _size(weight),
             "state": _state(weight, cache), "from": weight.source, "preprocessing": dict(weight.preprocessing)}
            for weight in read_registry().values()]
    if as_json:
        print_record({"cache": str(cache), "weights": rows})
        return
    table = Table(show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column("MB", justify="right", no_wrap=True)
    for name in ("licence", "state", "use, from"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row["name"], f"{row['bytes'] / 1e6:.1f}", row["licence"], row["state"],
                      f"{row['use']}\n{row['from']}")
    console().print(table)


def _size(weight: Weight) -> int:
    files = (ROOT / weight.folder).glob("*") if weight.embedded else ()
    return weight.bytes or sum(path.stat().st_size for path in files)


def _state(weight: Weight, cache: Path) -> str:
    if weight.embedded:
        return "embedded"
    record = fetched(weight, cache)
    return f"fetched, {record['commit'][:12]}" if record else "not fetched"


def fetch_weights(names: list[str], cache: Path) -> None:
    """Get the named weights, one after the other; progress on stderr."""
    for weight in chosen(names, read_registry()):
        record = fetch(weight, cache, say=lambda line: print(line, file=sys.stderr))
        print(f"{weight.name}: {cache / weight.name}, {weight.repo} commit {record['commit']}")


def freeze_weights(names: list[str], cache: Path, out: Path) -> None:
    """Lay the named weights out in the new folder `out`; without names, all that were fetched."""
    from submit.weights_freezing import freeze

    registry = read_registry()
    weights = chosen(names, registry) if names else [w for w in registry.values() if fetched(w, cache)]
    expect(weights, cache, "fetched weights", f"none; {how_to_get('NAME')}")
    record = freeze(weights, cache, out)
    for name, entry in record["weights"].items():
        print(f"{name}: {out / entry['folder']}, preprocessing {entry['fingerprint']}, commit {entry['commit']}")
    print(f"frozen: {out} (on the machine without network: --weights {out})")


def verify_weights(folder: Path, *, load: bool) -> int:
    """Check a frozen folder, a line an entry or fault; returns the number of faults."""
    from submit.weights_freezing import verify

    faults = 0
    for name, found in verify(folder, read_registry(), load=load).items():
        faults += len(found)
        for line in found:
            print(plain(f"broken  {name}: {line}"))
        if not found:
            print(plain(f"ok      {name}: files, checksums and preprocessing{' and loading' if load else ''}"))
    return faults
