"""An encoder tuned on a set in the organizers' layout: what is written, and that nothing else is touched."""
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from data.scenes import retrieval_triplets, write_retrieval_split
from retrieval import tune_encoder
from retrieval.compose import ComposerConfig
from retrieval.composer import load_composer, save_composer
from retrieval.encoder import EMBEDDED, load_encoder
from retrieval.head_tuning import HeadConfig
from retrieval.parser import Modification
from retrieval.train_encoder import measure
from retrieval.tune_encoder import training_pairs, tune


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "split"
    write_retrieval_split(folder, seed=8, queries=80)
    return folder


@pytest.fixture
def rows(folder, monkeypatch):
    frame = pd.read_csv(folder / "queries.csv")
    true = {text: Modification(add=t.add, remove=t.remove) for text, t in
            zip(frame["query_text"], retrieval_triplets(seed=8, queries=80), strict=True)}
    monkeypatch.setattr(tune_encoder, "parse", lambda texts: [true[text] for text in texts])
    for column in ("query_image", "target_image"):
        frame[column] = [str(folder / "images" / name) for name in frame[column]]
    return frame


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """The embedded encoder with noise on its head, so that there is something to tune."""
    folder = tmp_path_factory.mktemp("source") / "encoder"
    encoder = load_encoder(device="cpu")
    weight = encoder.model.visual.head.proj.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.std() * 3
    tune_encoder.save_tuned(folder, EMBEDDED, encoder, weight + noise, {"what": "noise"})
    return folder


def test_only_the_head_changes_and_the_best_epoch_is_kept(rows, spoiled, tmp_path):
    lines = []
    card = tune(tmp_path / "tuned", rows, source=spoiled, cache=tmp_path / "cache", seed=0, device="cpu",
                config=HeadConfig(epochs=4, rate=0.02), progress=lines.append)
    before, after = (load_file(f / "model.safetensors") for f in (spoiled, tmp_path / "tuned"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["visual.head.proj.weight"]
    assert {name: w.dtype for name, w in before.items()} == {name: w.dtype for name, w in after.items()}
    reached = [e["held-out top-1"] for e in card["epochs"]]
    assert len(reached) == 5 and max(reached) > reached[0] and len(lines) == 5
    fresh = retrieval_triplets(seed=9, queries=60)
    found = [measure(load_encoder(f, device="cpu"), fresh)["composed"] for f in (spoiled, tmp_path / "tuned")]
    assert found[1] > found[0]


def test_where_no_epoch_is_better_the_head_stays(rows, tmp_path):
    card = tune(tmp_path / "tuned", rows, cache=tmp_path / "cache", seed=0, device="cpu",
                config=HeadConfig(epochs=1, rate=1.0))  # a rate that ruins it
    before, after = (load_file(f / "model.safetensors") for f in (EMBEDDED, tmp_path / "tuned"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert card["held out"] > 0 and card["epochs"][1]["held-out top-1"] < card["epochs"][0]["held-out top-1"]


def test_a_second_run_repeats_the_first_from_the_cache(rows, spoiled, tmp_path):
    cards = [tune(tmp_path / name, rows, source=spoiled, cache=tmp_path / "cache", seed=3, device="cpu",
                  config=HeadConfig(epochs=2, rate=0.02)) for name in "ab"]
    assert cards[0] == cards[1]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


def test_the_way_to_compose_of_the_source_is_tuned_for_and_stays(rows, spoiled, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(spoiled, source)
    config = ComposerConfig(unit=True, add_weight=0.5, remove_weight=0.5)
    save_composer(source, config)
    tune(tmp_path / "tuned", rows, source=source, cache=tmp_path / "cache", seed=0, device="cpu",
         config=HeadConfig(epochs=1, rate=0.02))
    encoder = load_encoder(tmp_path / "tuned", device="cpu")
    assert load_composer(tmp_path / "tuned", encoder).config == config
    pairs = training_pairs(encoder, rows, tmp_path / "cache", config)[1]
    assert pairs.unit and pairs.change.norm(dim=1).max() < 2  # texts at unit length, halved


def test_pairs_are_the_rows_of_the_table(rows, tmp_path):
    encoder = load_encoder(device="cpu")
    features, pairs = training_pairs(encoder, rows, tmp_path)
    assert len(pairs) == 80 and len(features) == len(set(rows["query_image"]) | set(rows["target_image"]))
    triplets = retrieval_triplets(seed=8, queries=80)
    plain = torch.stack([encoder.encode_images([tune_encoder.read_row(("", rows[c][i]))])[0]
                         for i in (0, 37) for c in ("query_image", "target_image")])
    head = encoder.model.visual.head
    found = torch.stack([head(features[n[i]]) for i in (0, 37) for n in (pairs.query, pairs.target)])
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=0)
    words = sum(encoder.encode_texts([f"a photo of a {n}."])[0] for n in triplets[5].add) - sum(
        encoder.encode_texts([f"a photo of a {n}."])[0] for n in triplets[5].remove)
    torch.testing.assert_close(pairs.change[5], words, atol=1e-4, rtol=0)


def test_a_folder_that_exists_is_refused_before_any_work(rows, tmp_path, refuses):
    with refuses("expected a path where nothing lies yet, found an existing file or folder"):
        tune(tmp_path, rows, cache=tmp_path / "cache", seed=0, device="cpu")
    assert not (tmp_path / "cache").exists()
