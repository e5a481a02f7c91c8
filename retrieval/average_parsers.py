"""The mean of several trained parsers: reads unseen wording better than any of them, at the cost of one.

For parsers trained on one after the other, `weights train parser --start`: their weights lie close together, and the
mean of such is flatter (stochastic weight averaging, Izmailov et al., UAI 2018, arXiv:1803.05407).
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from data.errors import expect
from data.weight_files import read_json
from retrieval.parser import read_parser
from retrieval.train_parser import about, stored_figures, write_parser

COMMAND = "python -m submit weights average"
HELD_OUT = 2000  # sentences for each figure


def average(folders: Sequence[Path], out: Path, *, held_out: int = HELD_OUT) -> dict:
    """Write the mean of the parsers in `folders` to the new folder `out`, with a card that holds theirs; returns it.

    held_out: sentences for each figure. Raises InputError for fewer than two parsers and where configuration or
    tokenizer differ.
    """
    expect(len(folders) >= 2, "parsers", "at least two folders", len(folders))
    parsers = [read_parser(folder) for folder in folders]
    for folder in folders:
        for file in ("config.json", "tokenizer.json"):
            expect(read_json(folder / file) == read_json(folders[0] / file), folder / file,
                   f"the same as in {folders[0]}", "another")
    states, parser = [one.model.state_dict() for one in parsers], parsers[0]
    parser.model.load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]})
    names = [folder.name for folder in folders]
    card = {"command": f"{COMMAND} {' '.join(names)} --out FOLDER", "seed": 0,
            "figures": stored_figures(parser, held_out, seed=0), **about(parser),
            "mean_of": [{"parser": folder.name, "card": read_json(card) if (card := folder / "card.json").is_file()
                         else None} for folder in folders]}
    write_parser(out, parser, card)
    return card
