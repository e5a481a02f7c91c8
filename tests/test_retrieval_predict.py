"""The organizers' two functions, with a stand-in parser and encoder where the real ones would only hide a mistake."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data.images import read_rgb
from data.scenes import retrieval_triplets, write_retrieval_split
from retrieval import nets, predict
from retrieval.compose import PROMPT
from retrieval.encoder import EMBEDDED, build_model, load_encoder
from retrieval.parser import LABELS, Modification, parse
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
    monkeypatch.setattr(nets, "parse", parse)
    monkeypatch.delenv(nets.WEIGHTS, raising=False)
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


# --- texts

def test_a_text_that_is_too_long_is_named_by_its_row(rows, monkeypatch):
    monkeypatch.setattr(nets, "parse", parse)  # the real one
    frame = rows.head(3).set_index(pd.Index([20, 21, 22]))
    frame["query_text"] = ["add a lamp", "", "add a lamp " + "and then a lamp " * 200]
    with pytest.warns(UserWarning, match=r"^text in row 22: \d+ sub-words, only the first \d+ are read$"):
        found = encode_queries(frame)
    np.testing.assert_allclose(found[0], encode_queries(frame.iloc[:1])[0], atol=1e-5)


def test_requests_keep_the_order_of_their_rows(true_parser):
    true_parser.known |= {"a": Modification(add=("cup",)), "b": Modification(remove=("pan",))}
    texts = pd.Series(["b", None, "a", "  ", "b"], index=[3, 3, 1, 0, 9])  # labels may repeat
    empty = Modification()
    assert nets.read_requests(texts) == [true_parser.known["b"], empty, true_parser.known["a"], empty,
                                         true_parser.known["b"]]
    assert nets.read_requests(texts.head(0)) == []


# --- images

def solid(size, *boxes):
    """White, with boxes (colour, left, top, right, bottom)."""
    image = Image.new("RGB", size, "white")
    for colour, *box in boxes:
        image.paste(colour, tuple(box))
    return image


def test_an_image_on_its_side_is_read_upright(tmp_path):
    upright = solid((40, 60), ("red", 0, 0, 40, 15), ("blue", 0, 30, 20, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png")
    paths = [tmp_path / f"{name}.png" for name in ("side", "upright", "turned")]
    found = encode_database(pd.DataFrame({"target_image": paths}))
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 0.01


def encoder_folder(folder, resize_mode):
    """A tiny encoder with random weights that sees 32 x 32 pixels; named as the hub names its files."""
    config = {"embed_dim": 12, "custom_text": True,
              "vision_cfg": {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32},
              "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}}
    preprocess = {"size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "resize_mode": resize_mode,
                  "fill_color": 255}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(config)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file({name: w.contiguous() for name, w in model.state_dict().items()},
              folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.parametrize("resize_mode", ["shortest", "longest"])
def test_an_image_that_is_not_square_is_cropped_or_padded_as_the_encoder_says(tmp_path, monkeypatch, resize_mode):
    ends = (("red", 0, 0, 16, 32), ("blue", 80, 0, 96, 32))  # of an image three times as wide as high
    solid((96, 32), ("black", 40, 8, 56, 24), *ends).save(tmp_path / "wide.png")
    solid((96, 32), ("black", 40, 8, 56, 24)).save(tmp_path / "bare.png")
    solid((32, 32), ("black", 8, 8, 24, 24)).save(tmp_path / "cropped.png")
    encoder_folder(tmp_path / "nets" / "encoder", resize_mode)
    monkeypatch.setenv(nets.WEIGHTS, str(tmp_path / "nets"))
    paths = [tmp_path / f"{name}.png" for name in ("wide", "bare", "cropped")]
    found = encode_database(pd.DataFrame({"target_image": paths}))
    seen = [np.abs(found[0] - other).max() < 1e-6 for other in found[1:]]
    assert seen == ([True, True] if resize_mode == "shortest" else [False, False])


# --- other weights

@pytest.fixture
def other_nets(tmp_path, monkeypatch):
    """A folder with another encoder, and a parser that finds nothing in any text."""
    encoder_folder(tmp_path / "nets" / "encoder", "longest")
    embedded = EMBEDDED.with_name("parser")
    shutil.copytree(embedded, tmp_path / "nets" / "parser")
    weights = load_file(embedded / "model.safetensors")
    weights["classifier.bias"] = torch.tensor([100.0] + [0.0] * (len(LABELS) - 1)).to(weights["classifier.bias"])
    save_file(weights, tmp_path / "nets" / "parser" / "model.safetensors")
    monkeypatch.setenv(nets.WEIGHTS, str(tmp_path / "nets"))
    return tmp_path / "nets"


def test_weights_of_a_folder_take_the_place_of_the_embedded_ones(rows, other_nets, true_parser):
    found = encode_queries(rows.head(4))
    encoder = load_encoder(other_nets / "encoder", device="cpu")
    wanted = torch.nn.functional.normalize(encoder.encode_images([read_rgb(p) for p in rows["query_image"][:4]]))
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-6)  # nothing found in the texts: the query images
    assert true_parser.calls == []  # not the embedded one
    assert nets.read_requests(pd.Series(["add a red star"])) == [Modification()]


@pytest.mark.parametrize("left_out", ["encoder", "parser"])
def test_a_part_that_the_folder_lacks_is_the_embedded_one(rows, other_nets, true_parser, left_out):
    shutil.rmtree(other_nets / left_out)
    embedded = load_encoder(device="cpu").width
    assert encode_queries(rows.head(2)).shape == (2, embedded if left_out == "encoder" else 12)
    assert len(true_parser.calls) == (left_out == "parser")


def test_the_embedded_weights_are_back_when_no_folder_is_named(rows, other_nets, monkeypatch):
    assert encode_database(rows.head(1)).shape == (1, 12)
    monkeypatch.setenv(nets.WEIGHTS, "")
    assert encode_database(rows.head(1)).shape == (1, load_encoder(device="cpu").width)


@pytest.mark.parametrize("name", ["absent", ""])
def test_a_folder_without_either_part_is_refused(rows, tmp_path, monkeypatch, refuses, name):
    monkeypatch.setenv(nets.WEIGHTS, str(tmp_path / name))
    with refuses(f"{tmp_path / name}: expected a folder encoder/ or parser/ in it, found neither"):
        encode_database(rows)


def test_an_incomplete_part_is_named(rows, other_nets, refuses):
    (other_nets / "encoder" / "open_clip_model.safetensors").unlink()
    with refuses(f"{other_nets}/encoder: expected a file model.safetensors or open_clip_model.safetensors"):
        encode_database(rows)
    (other_nets / "parser" / "tokenizer.json").unlink()
    with refuses(f"{other_nets}/parser/tokenizer.json: expected a file of a trained parser, found nothing"):
        nets.read_requests(rows["query_text"])
