"""The mean of parsers against a sum by hand; what does not fit together is named."""
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from retrieval.average_parsers import average
from retrieval.parser import load_parser
from retrieval.train_parser import ParserTrainingConfig, train
from submit.cli import main

TINY = ParserTrainingConfig(steps=3, steps_narrow=4, neurons=20, warm_up=1, batch=4, vocabulary=90, corpus=200,
                            width=16, layers=2, heads=2, positions=300, held_out=10)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A parser and two that were trained on it one after the other."""
    folder = tmp_path_factory.mktemp("parsers")
    train(folder / "one", seed=1, config=TINY)
    train(folder / "two", seed=2, start=folder / "one", config=TINY)
    train(folder / "three", seed=3, start=folder / "two", config=TINY)
    return [folder / name for name in ("one", "two", "three")]


def test_every_weight_is_the_mean_in_half_precision(trained, tmp_path):
    before = torch.get_rng_state()
    card = average(trained, tmp_path / "mean", held_out=10)
    assert torch.equal(torch.get_rng_state(), before)
    states = [load_file(folder / "model.safetensors") for folder in trained]
    for name, found in load_file(tmp_path / "mean" / "model.safetensors").items():
        by_hand = sum(state[name].astype(np.float64) for state in states) / 3
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, by_hand, rtol=1e-3, atol=1e-7)
    assert card["command"] == "python -m submit weights average one two three --out FOLDER"
    assert [one["parser"] for one in card["mean_of"]] == ["one", "two", "three"]
    assert card["mean_of"][1]["card"] == json.loads((trained[1] / "card.json").read_text())
    assert {split: found["n"] for split, found in card["figures"].items()} == {"val": 10, "test": 10}
    assert load_parser(tmp_path / "mean", torch.device("cpu")).parse([""])


def test_the_mean_of_one_parser_twice_is_that_parser(trained, tmp_path):
    average([trained[0]] * 2, tmp_path / "same", held_out=10)
    one, same = (load_file(folder / "model.safetensors") for folder in (trained[0], tmp_path / "same"))
    assert all(np.array_equal(one[name], same[name]) for name in one)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["weights", "average", *map(str, arguments)])
    return ended.value.code, *capsys.readouterr()


def test_what_cannot_be_averaged_ends_in_one_line(trained, tmp_path, capsys):
    train(tmp_path / "other", seed=1, config=ParserTrainingConfig(**{**vars(TINY), "neurons": 24}))
    for given, out, message in (
            (trained[:1], tmp_path / "mean", "parsers: expected at least two folders, found 1"),
            ([trained[0], tmp_path / "other"], tmp_path / "mean",
             f"{tmp_path / 'other' / 'config.json'}: expected the same as in {trained[0]}, found another"),
            ([trained[0], tmp_path / "nothing"], tmp_path / "mean",
             f"{tmp_path / 'nothing' / 'config.json'}: expected a file of a trained parser, found nothing"),
            (trained, trained[0], f"{trained[0]}: expected a folder that does not exist yet, found one that does")):
        status, out_text, err = run(capsys, *given, "--out", out)
        assert (status, out_text) == (2, "") and message in err and len(err.splitlines()) == 1
        assert not (tmp_path / "mean").exists()
