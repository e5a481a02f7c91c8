"""Tuning of the head: batches, splits and losses against loops; the cached way against running the trunk."""
import copy
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, normalize

from retrieval.compose import ComposerConfig, compose
from retrieval.encoder import load_encoder
from retrieval.head_tuning import (
    HeadConfig,
    Pairs,
    changes,
    held_out_rows,
    pair_loss,
    top1,
    tune_head,
    unique_target_batches,
)
from retrieval.prompts import PROMPT
from retrieval.trunk_features import trunk_and_head


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def task():
    """Features of 30 images, a head, and 40 rows whose words say what a hidden head would see change."""
    features, hidden = randn(30, 7), randn(5, 7, seed=1)
    query, target = (torch.randint(30, (40,), generator=seeded(s)) for s in (2, 3))
    return features, randn(5, 7, seed=4), Pairs(query, target, (features[target] - features[query]) @ hidden.T)


def slow_epochs(weight, features, pairs, config, batches):
    """The recipe with torch's own layer, one row at a time; `batches` an epoch as given."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    optimiser = torch.optim.AdamW(layer.parameters(), lr=config.rate, weight_decay=config.weight_decay)
    losses = []
    for number, epoch in enumerate(batches):
        share = (1 + np.cos(np.pi * (number % config.restart) / config.restart)) / 2
        optimiser.param_groups[0]["lr"] = config.rate * share
        for rows in epoch:
            v = [layer(features[pairs.query[r]]) + pairs.change[r] for r in rows]
            d = [layer(features[pairs.target[r]]) for r in rows]
            cosines = torch.stack([torch.stack([cosine_similarity(a, b, dim=0) for b in d]) for a in v])
            scores = (cosines / config.temperature).exp()
            loss = -(scores.diag() / scores.sum(1)).log().mean() / 2 - (scores.diag() / scores.sum(0)).log().mean() / 2
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(layer.parameters(), config.clip)
            optimiser.step()
            losses.append(loss.item())
    return losses, layer.weight.detach()


def test_training_agrees_with_the_recipe_written_out(task):
    features, weight, pairs = task
    config = HeadConfig(epochs=7, batch=16, rate=0.01, clip=0.5)  # past the restart; the gradient is cut
    epochs = list(tune_head(weight, features.__getitem__, pairs, config, generator=seeded()))
    draws = seeded()
    batches = [unique_target_batches(pairs.target, 16, generator=draws) for _ in range(5)]
    losses, slow = slow_epochs(weight, features, pairs, replace(config, epochs=5), batches)
    np.testing.assert_allclose([v for e in epochs[:5] for v in e.losses], losses, atol=1e-4)
    torch.testing.assert_close(epochs[4].weight, slow, atol=1e-4, rtol=0)
    assert [e.number for e in epochs] == list(range(1, 8))


def test_rates_fall_by_a_cosine_and_start_again_after_five_epochs(task):
    features, weight, pairs = task
    epochs = tune_head(weight, features.__getitem__, pairs, HeadConfig(epochs=6), generator=seeded())
    np.testing.assert_allclose([e.rate * 1e4 for e in epochs], [1, 0.905, 0.655, 0.345, 0.095, 1], atol=5e-4)


def test_training_lowers_the_loss_raises_top1_and_leaves_the_start_alone(task):
    features, weight, pairs = task
    before, state = weight.clone(), torch.get_rng_state()
    epochs = list(tune_head(weight, features.__getitem__, pairs, HeadConfig(epochs=15, rate=0.05), generator=seeded()))
    assert np.mean(epochs[-1].losses) < np.mean(epochs[0].losses) / 2
    assert top1(epochs[-1].weight, features.__getitem__, pairs) > top1(weight, features.__getitem__, pairs) + 0.2
    assert torch.equal(weight, before) and torch.equal(torch.get_rng_state(), state)


def test_a_seed_repeats(task):
    features, weight, pairs = task
    config = HeadConfig(epochs=2, batch=8, rate=0.01)
    a, b, c = ([e.losses for e in tune_head(weight, features.__getitem__, pairs, config, generator=seeded(s))]
               for s in (0, 0, 1))
    assert a == b != c


def test_cached_features_and_running_the_trunk_give_the_same_curve():
    """On the embedded encoder: the loss of every step to 1e-4, and the trained layer in the model itself."""
    encoder = load_encoder(device="cpu")
    images = torch.randint(256, (12, 3, 64, 64), generator=seeded(), dtype=torch.uint8)
    trunk, layer = trunk_and_head(encoder.model)
    pixels = torch.cat(list(encoder.inputs(images)))
    table = trunk(pixels)
    pairs = Pairs(torch.arange(12), torch.arange(12).roll(1), randn(12, encoder.width) * 5)
    curves = [[loss for e in tune_head(layer.weight, look_up, pairs, HeadConfig(batch=6), generator=seeded())
               for loss in e.losses] for look_up in (table.__getitem__, lambda rows: trunk(pixels[rows]))]
    np.testing.assert_allclose(*curves, atol=1e-4)


def test_the_loss_is_that_of_the_whole_model():
    """Through open_clip's own `encode_image` and texts encoded one by one."""
    encoder = load_encoder(device="cpu")
    images = torch.randint(256, (4, 3, 64, 64), generator=seeded(), dtype=torch.uint8)
    trunk, layer = trunk_and_head(encoder.model)
    added, removed = [("red star",), ()], [("tree",), ("blue ball", "red star")]
    texts = {n: encoder.encode_texts([PROMPT.format(n)])[0] for n in ("red star", "tree", "blue ball")}
    whole = encoder.encode_images(images)
    v = torch.stack([whole[0] + texts["red star"] - texts["tree"], whole[1] - texts["blue ball"] - texts["red star"]])
    cosines = cosine_similarity(v[:, None], whole[2:][None], dim=-1) / 0.07
    slow = -(cosines.log_softmax(1).diag() + cosines.log_softmax(0).diag()).mean() / 2
    pairs = Pairs(torch.tensor([0, 1]), torch.tensor([2, 3]), changes(added, removed, encoder.encode_texts))
    table = torch.cat([trunk(block) for block in encoder.inputs(images)])
    assert pair_loss(layer.weight, table.__getitem__, pairs, 0.07).item() == pytest.approx(slow.item(), abs=1e-4)


@pytest.mark.parametrize(("n", "kinds", "size"), [(100, 100, 16), (100, 7, 16), (50, 1, 16), (257, 90, 256), (1, 1, 4)])
def test_batches_hold_every_row_once_and_no_target_twice(n, kinds, size):
    targets = torch.randint(kinds, (n,), generator=seeded())
    batches = unique_target_batches(targets, size, generator=seeded(1))
    assert sorted(torch.cat(batches).tolist()) == list(range(n))
    assert all(len(rows) <= size and len(targets[rows].unique()) == len(rows) for rows in batches)
    most = max(Counter(targets.tolist()).values())
    assert len(batches) == max(most, -(-n // size))  # fewer would break one of the two rules
    sizes = [len(rows) for rows in batches]
    assert max(sizes) - min(sizes) <= 1


def test_no_target_comes_twice_where_few_targets_are_left():
    """A round robin over queues that is cut into batches repeats a target across passes; this must not."""
    targets = torch.tensor([0] * 9 + [1] * 9 + [2, 3, 4])
    for seed in range(20):
        for rows in unique_target_batches(targets, 4, generator=seeded(seed)):
            assert len(targets[rows].unique()) == len(rows)


def test_batches_differ_from_epoch_to_epoch_and_mix_the_targets():
    targets = torch.arange(200) // 2
    draws = seeded()
    first, second = (unique_target_batches(targets, 20, generator=draws) for _ in range(2))
    assert {tuple(sorted(b.tolist())) for b in first} != {tuple(sorted(b.tolist())) for b in second}
    assert max(len(set((targets[b] // 10).tolist())) for b in first) > 5
    assert unique_target_batches(torch.zeros(0, dtype=torch.long), 4, generator=draws) == []


def linked(query, target, rows):
    """Groups of rows that share an image, directly or through others, by merging sets until nothing changes."""
    groups = [({int(query[r]), int(target[r])}, {r}) for r in rows]
    merged = True
    while merged:
        merged = False
        for a, b in itertools.combinations(groups, 2):
            if a[0] & b[0]:
                groups = [g for g in groups if g is not a and g is not b] + [(a[0] | b[0], a[1] | b[1])]
                merged = True
                break
    return [g[1] for g in groups]


@pytest.mark.parametrize("seed", range(5))
def test_no_image_stands_on_both_sides_and_groups_stay_whole(seed):
    query, target = (torch.randint(40, (30,), generator=seeded(s)) for s in (seed, seed + 50))
    held = held_out_rows(query, target, 0.3, generator=seeded(seed))
    images = [set(torch.cat([query[side], target[side]]).tolist()) for side in (held, ~held)]
    assert not images[0] & images[1] and 0 < held.sum() <= max(9, min(map(len, linked(query, target, range(30)))))
    for group in linked(query, target, range(30)):
        assert len({bool(held[r]) for r in group}) == 1


def test_the_share_is_met_where_groups_are_small():
    scenes = torch.arange(100).repeat_interleave(3) * 10
    held = held_out_rows(scenes, scenes + torch.arange(300) % 3 + 1, 0.1, generator=seeded())
    assert held.sum() == 30
    other = held_out_rows(scenes, scenes + torch.arange(300) % 3 + 1, 0.1, generator=seeded(1))
    assert not torch.equal(held, other)


def test_rows_that_all_hang_together_cannot_be_split(refuses):
    with refuses("pairs: expected rows in two groups or more that share no image, found one group"):
        held_out_rows(torch.zeros(4, dtype=torch.long), torch.arange(4), 0.5, generator=seeded())
    with refuses("pairs: expected at least one row, found none"):
        held_out_rows(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), 0.5, generator=seeded())
    with refuses(r"share: expected in \(0, 1\), found 1"):
        held_out_rows(torch.arange(4), torch.arange(4), 1, generator=seeded())


def test_changes_are_sums_of_texts_and_each_is_encoded_once():
    rows = {PROMPT.format(n): randn(4, seed=i) for i, n in enumerate(("cat", "boat", "mug"))}
    asked = []

    def encode(prompts):
        asked.append(list(prompts))
        return torch.stack([rows[p] for p in prompts])

    found = changes([("cat", "mug"), ()], [("boat",), ("cat",)], encode)
    cat, boat, mug = rows.values()
    torch.testing.assert_close(found, torch.stack([cat + mug - boat, -cat]))
    assert len(asked) == 1 and sorted(asked[0]) == sorted(rows)


def test_changes_may_be_weighed_at_unit_length():
    rows = {PROMPT.format(n): randn(4, seed=i) * (i + 2) for i, n in enumerate(("cat", "boat", "mug"))}
    config = ComposerConfig(unit=True, add_weight=0.5, remove_weight=2.0)
    added, removed = [("cat", "mug"), ()], [("boat",), ("cat",)]

    def encode(prompts):
        return torch.stack([rows[p] for p in prompts])

    found = changes(added, removed, encode, config)
    cat, boat, mug = (row / row.norm() for row in rows.values())
    torch.testing.assert_close(found, torch.stack([0.5 * (cat + mug) - 2 * boat, -2 * cat]))
    images = randn(2, 4, seed=9)  # added to images at unit length they compose as `compose` does
    torch.testing.assert_close(normalize(normalize(images, dim=-1) + found, dim=-1),
                               compose(images, added, removed, encode, config))


@pytest.mark.parametrize("settings", [{"centre_texts": True}, {"project": True}, {"hub_sharpness": 5.0}])
def test_a_way_of_composing_that_depends_on_the_head_is_refused(refuses, settings):
    with refuses("composer: expected prompts, unit and weights alone"):
        changes([("cat",)], [()], lambda prompts: randn(1, 4), ComposerConfig(**settings))


def test_unit_lengths_are_trained_and_counted_as_they_will_be_used(task):
    features, weight, pairs = task
    pairs = replace(pairs, change=pairs.change / 5, unit=True)
    images = features @ weight.T
    composed = images[pairs.query] / images[pairs.query].norm(dim=1, keepdim=True) + pairs.change
    cosines = cosine_similarity(composed[:, None], images[pairs.target][None], dim=-1) / 0.07
    slow = -(cosines.log_softmax(1).diag() + cosines.log_softmax(0).diag()).mean() / 2
    assert pair_loss(weight, features.__getitem__, pairs, 0.07).item() == pytest.approx(slow.item(), rel=1e-4)
    gallery = pairs.target.unique()
    best = gallery[cosine_similarity(composed[:, None], images[gallery][None], dim=-1).argmax(1)]
    assert top1(weight, features.__getitem__, pairs) == pytest.approx((best == pairs.target).double().mean().item())
    assert pairs[:3].unit


def test_top1_counts_targets_among_all_targets(task):
    features, weight, pairs = task
    gallery = sorted(set(pairs.target.tolist()))
    hits = 0
    for q, t, change in zip(pairs.query, pairs.target, pairs.change, strict=True):
        v = features[q] @ weight.T + change
        best = max(gallery, key=lambda g, v=v: cosine_similarity(v, features[g] @ weight.T, dim=0).item())
        hits += best == int(t)
    assert top1(weight, features.__getitem__, pairs) == pytest.approx(hits / 40)


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("epochs", 0, ">= 1"), ("batch", 0, ">= 1"), ("restart", 0, ">= 1"), ("rate", 0.0, "> 0"),
    ("temperature", -1.0, "> 0"), ("clip", 0.0, "> 0"), ("weight_decay", -0.1, ">= 0")])
def test_senseless_settings_are_refused(refuses, name, value, expected):
    with refuses(f"HeadConfig.{name}: expected {expected}, found {value}"):
        HeadConfig(**{name: value})


def test_one_row_has_nothing_to_be_told_from(refuses, task):
    features, weight, pairs = task
    with refuses("pairs: expected at least two rows, found 1"):
        next(tune_head(weight, features.__getitem__, pairs[:1], HeadConfig(), generator=seeded()))


def test_the_encoder_is_left_as_it_was():
    encoder = load_encoder(device="cpu")
    before = copy.deepcopy(encoder.model.state_dict())
    pairs = Pairs(torch.arange(4), torch.arange(4).roll(1), randn(4, encoder.width))
    list(tune_head(trunk_and_head(encoder.model)[1].weight, randn(4, 160).__getitem__, pairs, HeadConfig(),
                   generator=seeded()))
    assert all(torch.equal(w, before[name]) for name, w in encoder.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in encoder.model.parameters())
