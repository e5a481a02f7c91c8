"""The organizers' two functions, with a stand-in parser and encoder where the real ones would only hide a mistake."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from data.images import read_rgb
from data.scenes import retrieval_triplets, write_retrieval_split
from retrieval import predict
from retrieval.compose import PROMPT
from retrieval.encoder import load_encoder
from retrieval.parser import Modification
from retrieval.predict import encode_database, encode_queries


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "split"
    write_retrieval_split(folder, seed=8, queries=40)
    return folder


@pytest.fixture
def rows(folder):
    frame = pd.read_csv(folder / "queries.csv")
    for column in ("query_image", "target_image"):
        frame[column] = [str(folder / "images" / name) for name in frame[column]]
    return frame


@pytest.fixture(autouse=True)
def true_parser(monkeypatch):
    """A parser that knows the true answers of the split and a few texts of these tests; it remembers its calls."""
    known = {"swap star for fish": Modification(add=("blue fish",), remove=("red star",))}
    calls = []

    def parse(texts):
        calls.append(list(texts))
        return [known.get(text, Modification(add=("green mug",), remove=())) for text in texts]

    monkeypatch.setenv("KIT_DEVICE", "cpu")
    monkeypatch.setattr(predict, "parse", parse)
    return SimpleNamespace(known=known, calls=calls)


def test_the_split_is_solved_with_the_true_parse(rows, true_parser):
    for text, t in zip(rows["query_text"], retrieval_triplets(seed=8, queries=40), strict=True):
        true_parser.known[text] = Modification(add=t.add, remove=t.remove)
    database = rows[["target_image"]].drop_duplicates().reset_index(drop=True)
    queries, gallery = encode_queries(rows[["query_image", "query_text"]]), encode_database(database)
    found = database["target_image"].to_numpy()[(queries @ gallery.T).argmax(1)]
    assert (found == rows["target_image"]).mean() >= 0.9


def test_rows_are_float32_of_unit_length(rows):
    for found in (encode_queries(rows), encode_database(rows)):
        assert isinstance(found, np.ndarray) and found.dtype == np.float32
        assert found.shape == (40, load_encoder(device="cpu").width)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_queries_agree_with_the_arithmetic_row_by_row(rows):
    rows = rows.head(5).assign(query_text="swap star for fish")
    encoder = load_encoder(device="cpu")
    plus, minus = (encoder.encode_texts([PROMPT.format(n)])[0] for n in ("blue fish", "red star"))
    slow = [encoder.encode_images([read_rgb(p)])[0] + plus - minus for p in rows["query_image"]]
    np.testing.assert_allclose(encode_queries(rows), np.stack([v / v.norm() for v in slow]), atol=1e-5)


def test_one_batch_or_many_and_any_order(rows):
    whole_q, whole_g = encode_queries(rows), encode_database(rows)
    for i in (0, 17, 39):
        np.testing.assert_allclose(encode_queries(rows.iloc[i:i + 1]), whole_q[i:i + 1], atol=1e-5)
        np.testing.assert_allclose(encode_database(rows.iloc[i:i + 1]), whole_g[i:i + 1], atol=1e-5)
    turned = rows.iloc[::-1]
    np.testing.assert_allclose(encode_queries(turned), whole_q[::-1], atol=1e-5)
    np.testing.assert_allclose(encode_database(turned), whole_g[::-1], atol=1e-5)


def test_a_repeated_path_is_read_once(rows, monkeypatch):
    read = []
    monkeypatch.setattr(predict, "read_rgb", lambda path: read.append(path) or read_rgb(path))
    doubled = pd.concat([rows, rows])
    found = encode_database(doubled)
    assert sorted(read) == sorted(set(rows["target_image"]))
    np.testing.assert_array_equal(found[:40], found[40:])


@pytest.mark.parametrize("text", ["", "  \n", None, float("nan")])
def test_an_empty_text_asks_for_the_query_image_itself(rows, text, true_parser):
    frame = pd.DataFrame({"query_image": rows["query_image"][:2], "query_text": ["swap star for fish", text]})
    as_database = encode_database(frame.rename(columns={"query_image": "target_image"}))
    np.testing.assert_allclose(encode_queries(frame)[1], as_database[1], atol=1e-6)
    assert true_parser.calls == [["swap star for fish"]]


def test_no_rows_give_no_vectors_of_the_right_width(rows):
    width = encode_database(rows.head(1)).shape[1]
    assert encode_queries(rows.head(0)).shape == encode_database(rows.head(0)).shape == (0, width)


def test_no_text_at_all_needs_no_parser(rows, true_parser):
    encode_queries(rows.assign(query_text=""))
    assert true_parser.calls == []


def test_other_kinds_of_image_files_are_read(tmp_path):
    Image.new("L", (300, 200), 90).save(tmp_path / "gray.jpg")
    Image.new("RGBA", (20, 50), (1, 2, 3, 4)).save(tmp_path / "alpha.png")
    found = encode_database(pd.DataFrame({"target_image": [tmp_path / "gray.jpg", tmp_path / "alpha.png"]}))
    assert np.isfinite(found).all()


def test_an_image_that_cannot_be_read_is_named_with_its_row(rows, tmp_path, refuses):
    (tmp_path / "broken.png").write_bytes(b"no image")
    for bad, why in ((tmp_path / "broken.png", "expected a readable image"),
                     (tmp_path / "absent.png", "expected an image, found no such file")):
        frame = rows.set_index(pd.RangeIndex(2, 42))
        frame.loc[7, ["query_image", "target_image"]] = str(bad)
        with refuses(rf"row 7 'query_image' {bad}: {why}"):
            encode_queries(frame)
        with refuses(rf"row 7 'target_image' {bad}: {why}"):
            encode_database(frame)


def test_an_empty_cell_is_named_with_its_row(rows, refuses):
    rows.loc[3, "target_image"] = None
    with refuses(r"row 3 'target_image' (None|nan): expected the path of an image"):
        encode_database(rows)


def test_missing_columns_are_named(rows, refuses):
    with refuses("columns: expected query_image, query_text, found query_image, target_image"):
        encode_queries(rows[["query_image", "target_image"]])
    with refuses("columns: expected target_image, found query_text"):
        encode_database(rows[["query_text"]])


def test_the_callers_table_and_the_global_generator_stay_as_they_were(rows):
    table, state = rows.copy(), torch.get_rng_state()
    encode_queries(rows)
    encode_database(rows)
    pd.testing.assert_frame_equal(rows, table)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_is_loaded_once(rows, monkeypatch):
    encode_database(rows.head(1))
    monkeypatch.setattr(predict, "load_encoder", None)  # a second load would fail
    encode_queries(rows.head(1))
