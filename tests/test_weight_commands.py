"""`weights tune` on a set in the organizers' layout."""
import json

import pytest

from data.retrieval_set import read_retrieval_set
from data.scenes import write_retrieval_split
from retrieval import tune_encoder
from submit.weight_commands import tune


@pytest.fixture
def data(tmp_path):
    write_retrieval_split(tmp_path / "data", seed=1, queries=20)
    return tmp_path / "data"


@pytest.fixture
def asked(monkeypatch):
    """What the command asks for; nothing is trained."""
    seen = {}

    def watched(out, rows, **settings):
        settings.pop("progress")("an epoch")
        seen.update(out=out, rows=rows, **settings)
        return {"epochs": [{"epoch": 0, "held-out top-1": 0.5}]}

    monkeypatch.setattr(tune_encoder, "tune", watched)
    return seen


def test_the_rows_of_the_set_are_tuned_on_and_the_epochs_printed(data, asked, tmp_path, capsys):
    left_out = tune(data, tmp_path / "out", source=None, cache=tmp_path / "cache", seed=3, device="cpu")
    assert left_out == 0 and asked["rows"].equals(read_retrieval_set(data).queries)
    assert (asked["out"], asked["cache"], asked["seed"]) == (tmp_path / "out", tmp_path / "cache", 3)
    shown = capsys.readouterr()
    assert shown.err == "an epoch\n"
    assert json.loads(shown.out[:shown.out.index("encoder: ")]) == [{"epoch": 0, "held-out top-1": 0.5}]
    assert shown.out.endswith(f"encoder: {tmp_path / 'out'}\n")


def test_a_row_without_its_image_is_named_and_left_out(data, asked, tmp_path, capsys):
    rows = read_retrieval_set(data).queries
    (data / "images" / rows["query_image"].iloc[0].rsplit("/", 1)[1]).unlink()
    left_out = tune(data, tmp_path / "out", source=None, cache=tmp_path / "cache", seed=0, device="cpu")
    assert left_out >= 1 and len(asked["rows"]) == len(rows) - left_out
    assert "queries.csv row" in capsys.readouterr().err


def test_a_folder_that_exists_is_refused(data, asked, tmp_path, refuses):
    with refuses("expected a folder that does not exist yet, found one that does"):
        tune(data, data, source=None, cache=tmp_path, seed=0, device="cpu")
    assert not asked
