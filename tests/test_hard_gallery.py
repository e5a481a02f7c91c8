"""The hard gallery: what it promises, read off the scenes' own descriptions."""
import itertools
from collections import Counter

import numpy as np
import pytest

from data.hard_gallery import KINDS, hard_gallery, hard_queries
from data.pictograms import NAMES
from data.scenes import DEVELOPMENT, TRAINING, VALIDATION, draw_scene, held_out_pairs


def pairs_held_out(scene):
    numbers = [NAMES.index(name) for name in scene.names]
    return sum(held_out_pairs()[a, b] for a, b in itertools.combinations(numbers, 2))


def by_cell(scene):
    return {o.cell: o for o in scene.objects}


@pytest.fixture(scope="module")
def asked():
    return hard_queries(DEVELOPMENT, seed=3, queries=400)


def test_requests_lead_from_the_query_to_the_target_and_kept_objects_stay(asked):
    for t in (a.triplet for a in asked):
        assert set(t.query.names) - set(t.remove) | set(t.add) == t.target.names
        assert len(t.target.names) == len(t.target.objects) and len(t.query.names) == len(t.query.objects)
        kept = set(t.query.objects) & set(t.target.objects)
        assert {o.name for o in kept} == t.query.names & t.target.names and t.query.ground == t.target.ground


def test_added_objects_stand_where_removed_ones_stood(asked):
    for t in (a.triplet for a in asked):
        changed = by_cell(t.query).keys() ^ by_cell(t.target).keys()
        assert len(changed) == abs(len(t.add) - len(t.remove))
        for cell in by_cell(t.query).keys() & by_cell(t.target).keys():
            assert by_cell(t.query)[cell].shift == by_cell(t.target)[cell].shift


def test_four_neighbours_two_wrong_one_missing_one_too_many_on_the_same_ground(asked):
    for a in asked:
        target = by_cell(a.triplet.target)
        sizes = []
        for scene in a.neighbours:
            other = by_cell(scene)
            differing = [c for c in target.keys() | other.keys() if target.get(c) != other.get(c)]
            assert len(differing) == 1 and scene.ground == a.triplet.target.ground
            assert scene.names != a.triplet.target.names  # never the same objects in another drawing
            sizes.append(len(other) - len(target))
        assert sizes == [0, 0, -1, 1]
        assert len(set(a.scenes)) == 6


def test_the_gallery_holds_six_images_a_request_with_the_targets_first(asked):
    gallery = hard_gallery(asked)
    assert len(gallery) == len(set(gallery)) == 6 * len(asked)
    assert gallery[:len(asked)] == [a.triplet.target for a in asked]
    assert set(gallery) == {s for a in asked for s in a.scenes}


def test_held_out_pairs_stand_in_every_development_request_and_in_no_other_part(asked):
    assert all(pairs_held_out(s) for a in asked for s in (a.triplet.query, a.triplet.target))
    for part in (TRAINING, VALIDATION):
        assert not any(pairs_held_out(s) for a in hard_queries(part, seed=3, queries=60) for s in a.scenes)


def test_shares_of_the_kinds_are_as_named(asked):
    counts = Counter((len(a.triplet.add), len(a.triplet.remove)) for a in asked)
    assert counts[1, 1] / 400 == pytest.approx(0.57, abs=0.08) and counts.keys() <= KINDS.keys()
    assert sum(KINDS.values()) == pytest.approx(1.0)


def test_a_seed_repeats_and_parts_share_no_drawing_nor_ground(asked):
    assert hard_queries(DEVELOPMENT, seed=3, queries=400) == asked != hard_queries(DEVELOPMENT, seed=4, queries=400)
    looks, grounds = [], []
    for part in (TRAINING, VALIDATION, DEVELOPMENT):
        scenes = [s for a in hard_queries(part, seed=3, queries=60) for s in a.scenes]
        looks.append({o.look for s in scenes for o in s.objects})
        grounds.append({s.ground for s in scenes})
    assert all(not a & b for sets in (looks, grounds) for a, b in itertools.combinations(sets, 2))


def test_neighbours_look_different(asked):
    for a in asked[:10]:
        pictures = [draw_scene(s) for s in a.scenes]
        assert all(np.abs(p.astype(int) - q).max() > 20 for p, q in itertools.combinations(pictures, 2))


def test_no_request_is_refused(refuses):
    with refuses("queries: expected >= 1, found 0"):
        hard_queries(DEVELOPMENT, seed=0, queries=0)
