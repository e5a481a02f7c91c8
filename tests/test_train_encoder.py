"""Training of the dual encoder: losses against loops, runs that repeat and go on."""
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from data.files import fingerprint
from data.pictograms import NAMES
from data.scenes import DEVELOPMENT, request_texts, retrieval_triplets
from retrieval import train_encoder
from retrieval.encoder import EMBEDDED, load_encoder
from retrieval.info_nce import both_ways
from retrieval.parser import Modification
from retrieval.prompts import PROMPT
from retrieval.train_encoder import (
    TrainingConfig,
    composition_loss,
    development_figures,
    draw_batch,
    measure,
    new_encoder,
    train,
)

QUICK = TrainingConfig(steps=3, families=2, family=(2, 2), checkpoint_every=1, width=16, text_width=32, text_layers=1)


@pytest.fixture(autouse=True)
def no_parser(monkeypatch, tmp_path):
    """These runs measure with the true parse only: the parser has tests of its own."""
    monkeypatch.setattr(train_encoder, "PARSER", tmp_path / "absent")


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def info_nce(one, other, scale):
    """-log softmax at the own row, one number at a time, mean of both directions."""
    n = len(one)
    logits = [[float(scale * cosine_similarity(a, b, dim=0)) for b in other] for a in one]
    rows = [np.log(sum(np.exp(logits[i]))) - logits[i][i] for i in range(n)]
    columns = [np.log(sum(np.exp(row[j]) for row in logits)) - logits[j][j] for j in range(n)]
    return (np.mean(rows) + np.mean(columns)) / 2


def test_both_ways_agrees_with_the_loop():
    one, other, scale = randn(5, 4, seed=0), randn(5, 4, seed=1), torch.tensor(3.0)
    assert both_ways(one, other, scale).item() == pytest.approx(info_nce(one, other, scale), rel=1e-5)


def test_composition_loss_is_the_mean_over_all_ordered_pairs_of_siblings():
    images, captions, scale = randn(3, 3, 4, seed=0), randn(3, 3, 4, seed=1), torch.tensor(2.0)
    gallery = images.reshape(9, 4)
    slow = []
    for shift in (1, 2):  # each image once the target: that of its `shift`-th sibling
        composed = torch.stack([images[f, (s - shift) % 3] + captions[f, s] - captions[f, (s - shift) % 3]
                                for f in range(3) for s in range(3)])
        slow.append(info_nce(composed, gallery, scale))
    assert composition_loss(images, captions, scale).item() == pytest.approx(np.mean(slow), rel=1e-5)


def test_composition_loss_vanishes_where_the_arithmetic_is_exact():
    captions = 10 * randn(4, 3, 32, seed=0)
    grounds = 10 * randn(4, 1, 32, seed=1)
    assert composition_loss(grounds + captions, captions, torch.tensor(100.0)) < 1e-3


def test_a_batch_holds_families_and_says_what_is_in_them():
    images, holds = draw_batch(QUICK, np.random.default_rng(0))
    assert images.shape == (2, 4, 3, 64, 64) and images.dtype == torch.uint8
    assert holds.shape == (2, 4, len(NAMES)) and set(holds.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(images[0, 0], images[0, 1])


def test_a_run_repeats_with_its_seed_and_leaves_the_global_generators_alone(tmp_path):
    before = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / name, seed=seed, cfg=QUICK, checks=0, dev_queries=20)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    assert torch.equal(torch.get_rng_state(), before)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    train(tmp_path / "whole", cfg=QUICK, checks=0, dev_queries=20)
    real, drawn = train_encoder._step, []

    def fail_at_third(*args):
        drawn.append(1)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train_encoder, "_step", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", cfg=QUICK, checks=0, dev_queries=20)
    assert not (tmp_path / "parts").exists()
    train(tmp_path / "parts", cfg=QUICK, checks=0, dev_queries=20)
    assert len(drawn) == 4  # two steps, the interrupted one, and that one again
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts", "whole"]


def test_what_was_saved_is_what_was_measured(tmp_path):
    lines = []
    card = train(tmp_path / "encoder", cfg=QUICK, checks=20, dev_queries=40, progress=lines.append)
    again = measure(load_encoder(tmp_path / "encoder", device="cpu"), retrieval_triplets(seed=0, queries=40))
    assert card["figures"]["true parse"] == again
    assert json.loads(json.dumps(card)) == json.loads((tmp_path / "encoder" / "card.json").read_text())
    assert len(lines) == 3 and all("validation" in line for line in lines)


def test_training_lowers_the_loss(tmp_path):
    lines = []
    train(tmp_path / "encoder", cfg=replace(QUICK, steps=12, families=4), checks=0, dev_queries=20,
          progress=lines.append)
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert losses[-1] < losses[0]


def test_without_the_composition_loss_only_captions_are_learned(tmp_path, monkeypatch):
    monkeypatch.setattr(train_encoder, "composition_loss", None)  # a call would fail
    card = train(tmp_path / "captions", cfg=replace(QUICK, composition_weight=0.0, caption_weight=1.0), checks=0,
                 dev_queries=20)
    assert card["config"]["composition_weight"] == 0.0


def test_measure_agrees_with_a_plain_loop_on_the_text_only_and_composed_rows():
    encoder, _ = new_encoder(QUICK, seed=0)
    triplets = retrieval_triplets(DEVELOPMENT, seed=0, queries=20)
    targets = list(dict.fromkeys(t.target for t in triplets))
    picture = {s: encoder.encode_images(torch.from_numpy(train_encoder.draw_scene(s)).permute(2, 0, 1)[None])[0]
               for s in targets}
    hits = {"composed": 0, "query image alone": 0, "text alone": 0}
    for t in triplets:
        words = torch.zeros(QUICK.width)
        for name, sign in (*((n, 1) for n in t.add), *((n, -1) for n in t.remove)):
            words = words + sign * encoder.encode_texts([PROMPT.format(name)])[0]
        for row, v in (("composed", picture[t.query] + words), ("query image alone", picture[t.query]),
                       ("text alone", words)):
            best = max(targets, key=lambda s, v=v: cosine_similarity(v, picture[s], dim=0).item())
            hits[row] += best == t.target
    found = measure(encoder, triplets)
    kinds = Counter((len(t.add), len(t.remove)) for t in triplets)
    by_kind = [n * found[f"composed, {add} added {remove} removed (n {n})"] for (add, remove), n in kinds.items()]
    assert sum(by_kind) / 20 == pytest.approx(found["composed"], abs=0.01)
    assert {row: found[row] for row in hits} == {row: 5.0 * count for row, count in hits.items()}


def test_a_folder_that_exists_and_senseless_settings_are_refused(tmp_path, refuses):
    with refuses("expected a path where nothing lies yet"):
        train(tmp_path, cfg=QUICK)
    with refuses("TrainingConfig.steps: expected >= 1, found 0"):
        TrainingConfig(steps=0)
    with refuses("TrainingConfig.families: expected >= 1, found 0"):
        TrainingConfig(families=0)
    with refuses(r"TrainingConfig.family: expected at least two scenes, found \(1, 1\)"):
        TrainingConfig(family=(1, 1))
    for weights in ({"composition_weight": 0.0, "caption_weight": 0.0}, {"caption_weight": -1.0}):
        with refuses("TrainingConfig.composition_weight, caption_weight: expected both >= 0, one above, found"):
            TrainingConfig(**weights)


def test_the_embedded_encoder_composes_names_and_scenes_it_never_saw_together():
    """The card's claim, on a seed of its own and fewer queries: far above either half of the query alone."""
    found = measure(load_encoder(EMBEDDED, device="cpu"), retrieval_triplets(DEVELOPMENT, seed=11, queries=100))
    assert found["composed"] >= 93 and found["query image alone"] <= 10 and found["text alone"] <= 30


def test_development_figures_read_the_requests_with_the_parser(tmp_path, monkeypatch):
    texts = []

    def parse_nothing(asked):
        texts.extend(asked)
        return [Modification() for _ in asked]

    monkeypatch.setattr(train_encoder, "parse", parse_nothing)
    monkeypatch.setattr(train_encoder, "PARSER", tmp_path / "weights")
    (tmp_path / "weights").write_text("some")
    found = development_figures(new_encoder(QUICK, seed=0)[0], queries=20, seed=4)
    assert texts == request_texts(retrieval_triplets(seed=4, queries=20), seed=4)
    key = f"predicted parse, parser {fingerprint(tmp_path / 'weights')}"
    assert found[key]["composed"] == found["true parse"]["query image alone"]  # nothing read, the query image stays
