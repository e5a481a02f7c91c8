"""A composer beside its encoder: files there and back, and refused ones."""
import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

from data.images import read_rgb
from data.scenes import write_retrieval_split
from retrieval import nets, predict
from retrieval.compose import PUBLISHED, ComposerConfig, Statistics, compose, gallery_vectors
from retrieval.composer import Composer, load_composer, save_composer
from retrieval.encoder import load_encoder
from retrieval.parser import Modification
from retrieval.predict import encode_database, encode_queries
from retrieval.prompts import TextCache

FULL = ComposerConfig(prompts=("a {}.", "one {}."), unit=True, add_weight=0.7, remove_weight=1.2, centre_texts=True,
                      centre_images=True, project=True, hub_sharpness=9.0)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texts(prompts):
    return torch.stack([randn(6, seed=len(p)) for p in prompts])


ENCODER = SimpleNamespace(encode_texts=texts, width=6, device=torch.device("cpu"))


@pytest.fixture
def known():
    return Statistics(randn(6, seed=1), randn(6, seed=2), normalize(randn(4, 6, seed=3), dim=-1))


def test_what_is_saved_composes_as_before(tmp_path, known):
    save_composer(tmp_path, FULL, known)
    found = load_composer(tmp_path, ENCODER)
    assert found.config == FULL
    images, added, removed = randn(3, 6), [("cat",), (), ("boat", "mug")], [(), ("cat",), ("hat",)]
    assert torch.equal(found.queries(images, added, removed), compose(images, added, removed, texts, FULL, known))
    assert torch.equal(found.gallery(images), gallery_vectors(images, FULL, known))


def test_a_folder_without_files_composes_as_published(tmp_path):
    found = load_composer(tmp_path, ENCODER)
    assert found.config == PUBLISHED
    torch.testing.assert_close(found.gallery(randn(3, 6)), normalize(randn(3, 6), dim=-1))


def test_published_needs_no_statistics_file(tmp_path):
    save_composer(tmp_path, PUBLISHED)
    assert [p.name for p in tmp_path.iterdir()] == ["composer.json"]
    assert load_composer(tmp_path, ENCODER).config == PUBLISHED


def test_texts_are_encoded_once_across_calls():
    asked = []
    composer = Composer(TextCache(lambda prompts: asked.extend(prompts) or texts(prompts)))
    for _ in range(2):
        composer.queries(randn(2, 6), [("cat",), ("cat",)], [(), ("boat",)])
    assert asked == ["a photo of a cat.", "a photo of a boat."]


def test_nothing_is_overwritten(tmp_path, refuses):
    save_composer(tmp_path, PUBLISHED)
    with refuses("composer.json: expected a path where nothing lies yet"):
        save_composer(tmp_path, FULL)


@pytest.mark.parametrize(("content", "message"), [
    ("[1]", "composer.json: expected a JSON object of settings, found list"),
    ("{", "composer.json: expected JSON, found"),
    ('{"addweight": 1}', "composer.json: expected settings out of prompts, unit, .*, found addweight"),
    ('{"add_weight": "2"}', "composer.json 'add_weight': expected a number, found '2'"),
    ('{"add_weight": true}', "composer.json 'add_weight': expected a number, found True"),
    ('{"unit": 1}', "composer.json 'unit': expected true or false, found 1"),
    ('{"prompts": "a {}."}', "composer.json 'prompts': expected a list of texts, found 'a {}.'"),
    ('{"hub_sharpness": "high"}', "composer.json 'hub_sharpness': expected a number or null, found 'high'"),
    ('{"add_weight": -1}', "ComposerConfig.add_weight: expected a finite number >= 0, found -1"),
])
def test_wrong_settings_are_named(tmp_path, refuses, content, message):
    (tmp_path / "composer.json").write_text(content)
    with refuses(message):
        load_composer(tmp_path, ENCODER)


@pytest.mark.parametrize(("tensors", "message"), [
    ({"mean": torch.zeros(6)}, "expected tensors out of text_mean, image_mean, bank, found mean"),
    ({"bank": torch.zeros(6)}, r"bank: expected finite float32 of 2 axes, found \(6,\) torch.float32"),
    ({"text_mean": torch.full((6,), torch.inf)}, "text_mean: expected finite float32 of 1 axes"),
    ({"text_mean": torch.zeros(6, dtype=torch.float64)}, "text_mean: expected finite float32 of 1 axes"),
    ({"text_mean": torch.zeros(5)}, "text_mean: expected width 6, as the encoder has, found 5"),
])
def test_wrong_statistics_are_named(tmp_path, refuses, tensors, message):
    save_file(tensors, tmp_path / "composer.safetensors")
    (tmp_path / "composer.json").write_text(json.dumps(asdict(PUBLISHED)))
    with refuses(f"composer.safetensors.* ?{message}"):
        load_composer(tmp_path, ENCODER)


def test_the_organizers_functions_compose_as_the_composer_says(tmp_path, monkeypatch):
    """Two independent calls, each side its own arrays; the judge's cosine then orders by cosine plus bias."""
    write_retrieval_split(tmp_path / "data", seed=2, queries=20)
    rows = pd.read_csv(tmp_path / "data" / "queries.csv")
    for column in ("query_image", "target_image"):
        rows[column] = [str(tmp_path / "data" / "images" / name) for name in rows[column]]
    encoder = load_encoder(device="cpu")
    config = ComposerConfig(hub_sharpness=5.0, add_weight=0.8)
    bank = Statistics(bank=normalize(randn(7, encoder.width, seed=4), dim=-1))
    monkeypatch.setenv("KIT_DEVICE", "cpu")
    monkeypatch.setattr(nets, "parse", lambda texts: [Modification(add=("blue fish",), remove=())] * len(texts))
    monkeypatch.setattr(predict, "_composer", lambda device: Composer(TextCache(encoder.encode_texts), config, bank))
    scores = encode_queries(rows) @ encode_database(rows).T
    queries, targets = ([read_rgb(path) for path in rows[c]] for c in ("query_image", "target_image"))
    slow = normalize(encoder.encode_images(queries) + 0.8 * encoder.encode_texts(["a photo of a blue fish."]), dim=-1)
    images = normalize(encoder.encode_images(targets), dim=-1)
    bias = -((5.0 * images @ bank.bank.T).exp().mean(1).log() / 5.0)
    np.testing.assert_allclose(scores, (slow @ images.T + bias) / 2, atol=1e-5)
