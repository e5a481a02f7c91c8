"""Scenes: what the development split promises, computed from the scenes' own descriptions."""
import csv
import itertools
import time

import numpy as np
import pytest
import torch
from PIL import Image

from data import scenes
from data.pictograms import COLOURS, NAMES, SPRITE, sprite
from data.scenes import (
    CELL,
    DEVELOPMENT,
    FAMILY,
    SIDE,
    TRAINING,
    VALIDATION,
    draw_ground,
    draw_scene,
    held_out_pairs,
    make_family,
    retrieval_triplets,
    write_retrieval_split,
)


def differences(one, other):
    """Objects to change to get from one scene to the other; None if ground or layout differ."""
    if one.ground != other.ground:
        return None
    cells_one, cells_other = ({o.cell: o for o in s.objects} for s in (one, other))
    return sum(cells_one.get(cell) != cells_other.get(cell) for cell in cells_one.keys() | cells_other.keys())


def holds_held_out_pair(scene):
    numbers = [NAMES.index(name) for name in scene.names]
    return any(held_out_pairs()[a, b] for a, b in itertools.combinations(numbers, 2))


def families(part, count=60, contents=(4, 2), seed=5):
    rng = np.random.default_rng(seed)
    return [make_family(part, contents, rng=rng) for _ in range(count)]


def test_names_can_be_said_in_english():
    assert len(NAMES) == len(set(NAMES)) >= 60
    assert all(name.replace(" ", "").isalpha() and name == name.lower() for name in NAMES)


def test_nine_of_ten_nearest_distractors_differ_from_each_target_by_one_object():
    triplets = retrieval_triplets(seed=3, queries=107)  # not a multiple of the family
    database = set(t.target for t in triplets)
    for target in database:
        steps = sorted(d for d in (differences(target, other) for other in database if other != target)
                       if d is not None)
        assert steps[:9] == [1] * 9


def test_the_query_image_lies_in_the_database_too_and_is_never_the_answer():
    triplets = retrieval_triplets(seed=1, queries=60)
    assert {t.query for t in triplets} <= {t.target for t in triplets}
    assert all(t.query != t.target for t in triplets)


def test_the_named_objects_are_exactly_the_difference():
    for t in retrieval_triplets(seed=2, queries=80):
        assert (t.query.names - set(t.remove)) | set(t.add) == t.target.names
        assert set(t.remove) <= t.query.names and not set(t.add) & t.query.names
        assert differences(t.query, t.target) == max(len(t.add), len(t.remove))  # added stands where removed stood


def test_every_development_scene_holds_a_held_out_pair_and_no_training_scene_does():
    assert 0.15 < held_out_pairs().mean() < 0.25
    assert all(holds_held_out_pair(t.target) for t in retrieval_triplets(seed=0, queries=60))
    for part in (TRAINING, VALIDATION):
        assert not any(holds_held_out_pair(s) for family in families(part) for row in family for s in row)


def test_parts_share_no_drawing_and_no_ground():
    def used(part):
        found = [s for family in families(part) for row in family for s in row]
        return {o.look for s in found for o in s.objects}, {s.ground[1] for s in found}

    for one, other in itertools.combinations(map(used, (TRAINING, VALIDATION, DEVELOPMENT)), 2):
        assert not one[0] & other[0] and not one[1] & other[1]


def test_kinds_of_request_follow_the_contest():
    triplets = retrieval_triplets(seed=0, queries=1000)
    share = {kind: sum((len(t.add), len(t.remove)) == kind for t in triplets) / 1000 for kind in scenes.EDITS}
    assert sum(share.values()) == pytest.approx(1)
    assert 0.55 < share[1, 1] < 0.69 and min(share.values()) > 0.004
    assert 0.22 < share[1, 2] + share[2, 1] < 0.36
    assert 0.05 < share[1, 0] + share[0, 1] < 0.14


def test_two_to_five_objects_that_never_overlap():
    for t in retrieval_triplets(seed=4, queries=60):
        assert 2 <= len(t.target.objects) <= 5
        assert len({o.cell for o in t.target.objects}) == len(t.target.objects)
        assert all(s >= 0 and s + SPRITE <= CELL for o in t.target.objects for s in o.shift)


def test_query_and_target_differ_in_pixels_only_in_the_changed_cells():
    t = next(t for t in retrieval_triplets(seed=0, queries=40) if len(t.add) == len(t.remove) == 1)
    changed = {o.cell for o in set(t.query.objects) ^ set(t.target.objects)}
    same = (draw_scene(t.query) == draw_scene(t.target)).all(-1)
    for cell in range(9):
        top, left = cell // 3 * CELL, cell % 3 * CELL
        assert same[top:top + CELL, left:left + CELL].all() == (cell not in changed)


def test_drawings_show_their_colour_and_change_with_the_look():
    for name, colour in ((f"{c} ball", rgb) for c, rgb in COLOURS.items()):
        colours, cover = sprite(name, 7)
        middle = colours[SPRITE * 3 // 4, SPRITE // 2]  # below the highlight
        np.testing.assert_allclose(middle, np.clip(colour, 0, 255), atol=0.12 * 255)
        assert 0.3 < cover.mean() < 0.9
    assert not np.array_equal(sprite("red star", 1)[0], sprite("red star", 2)[0])


@pytest.mark.parametrize("pattern", DEVELOPMENT.patterns)
def test_grounds_are_muted(pattern):
    for seed in range(20):
        ground = draw_ground(pattern, seed)
        assert ground.shape == (SIDE, SIDE, 3) and ground.min() >= 35 and ground.max() <= 245
        assert np.ptp(ground.reshape(-1, 3), axis=0).max() < 50


def test_same_seed_same_split_other_seed_another(tmp_path):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_retrieval_split(tmp_path / name, seed=seed, queries=20)
    content = {name: {p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.*")} for name in "abc"}
    assert content["a"] == content["b"] != content["c"]
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


def test_the_split_has_the_organizers_layout_and_is_quickly_written(tmp_path):
    start = time.monotonic()
    write_retrieval_split(tmp_path / "split", seed=0)
    assert time.monotonic() - start < 20
    with (tmp_path / "split" / "queries.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["query_image", "query_text", "target_image"] and len(rows) == 300
    images = tmp_path / "split" / "images"
    assert {r[c] for r in rows for c in ("query_image", "target_image")} == {p.name for p in images.iterdir()}
    triplets = retrieval_triplets(seed=0, queries=300)
    for row, t in zip(rows[:20], triplets, strict=False):
        np.testing.assert_array_equal(np.asarray(Image.open(images / row["target_image"])), draw_scene(t.target))
        assert all(name in " ".join(row["query_text"].lower().split()) for name in (*t.add, *t.remove))


def test_an_interrupted_split_leaves_nothing(tmp_path, monkeypatch):
    def fail(scene):
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "draw_scene", fail)
    with pytest.raises(KeyboardInterrupt):
        write_retrieval_split(tmp_path / "split", seed=0, queries=20)
    assert list(tmp_path.iterdir()) == []


def test_too_few_queries_for_a_family_are_refused(refuses):
    with refuses(rf"queries: expected >= {FAMILY[0] * FAMILY[1]} \(one family of scenes\), found 5"):
        retrieval_triplets(seed=0, queries=5)


def test_an_existing_folder_is_not_overwritten(tmp_path, refuses):
    with refuses("expected a path where nothing lies yet"):
        write_retrieval_split(tmp_path, seed=0, queries=20)
