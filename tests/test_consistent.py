"""A defect that a third of the images share: found, left to the others to judge, against loops; and nothing else."""
import math

import pytest
import torch

from anomaly import consistent
from anomaly.consistent import communities, shared_defects
from anomaly.mutual_scoring import nearest_distances

KEEP, IMAGES, SHARING, PATCHES = 0.3, 21, 7, 30


def given(seed=0, sharing=SHARING):
    """Features (N, L, D): each place has its look, each image its own noise; the first images share patches 3 and 4."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, PATCHES, 16, generator=generator) + 0.3 * torch.randn(IMAGES, PATCHES, 16,
                                                                                    generator=generator)
    defect = 2 * torch.randn(2, 16, generator=generator)
    features[:sharing, 3:5] = defect + 0.1 * torch.randn(sharing, 2, 16, generator=generator)
    return nearest_distances(features)


def scores(distances, left_out=None):
    kept = max(1, int(KEEP * (len(distances) - 1)))
    if left_out is not None:
        distances = distances.masked_fill(left_out, math.inf)
    return distances.topk(kept, 1, largest=False).values.mean(1)


def test_a_shared_defect_is_invisible_until_its_siblings_are_left_out():
    distances = given()
    plain, found = scores(distances), scores(distances, shared_defects(distances))
    defects = torch.zeros(IMAGES, PATCHES, dtype=torch.bool)
    defects[:SHARING, 3:5] = True
    assert plain[defects].max() < plain[~defects].min()  # taken for the most normal of all
    assert found[defects].min() > 2 * found[~defects].max()
    torch.testing.assert_close(found[~defects].mean(), plain[~defects].mean(), rtol=0.02, atol=0)
    kept = int(KEEP * (IMAGES - 1))
    assert [group.nonzero().flatten().tolist() for group in communities(distances, kept)] == [list(range(SHARING))]


@pytest.mark.parametrize("seed", range(5))
def test_without_a_shared_defect_nothing_changes(seed):
    assert not shared_defects(given(seed, sharing=0)).any()
    assert not shared_defects(given(seed, sharing=1)).any()


def by_hand(distances):
    """The same in loops over images, patches and pairs of patches, for one community at most."""
    count, _, length = distances.shape
    kept, last = int(KEEP * (count - 1)), (count - 1) // 2
    values = distances.double().tolist()
    rows = {(i, m): sorted(values[i][j][m] for j in range(count) if j != i)
            for i in range(count) for m in range(length)}
    steps = {at: [math.log(row[q] / row[q - 1]) * q for q in range(2, last + 1)] for at, row in rows.items()}
    usual = sum(map(sum, steps.values())) / (len(rows) * (last - 1))
    plain = sorted(sum(row[:kept]) / kept for row in rows.values())
    rare = plain[math.ceil(consistent.RARE * len(plain)) - 1]
    near = {}
    for (i, m), row in rows.items():
        sharp = [(step, q) for q, step in enumerate(steps[i, m], 2) if step / q >= consistent.JUMP]
        step, q = max(sharp, default=(0, 0))
        if step > consistent.GROWTH * usual and row[q] > rare:
            near[i, m] = {i} | {j for j in range(count) if j != i and values[i][j][m] <= row[q - 1]}
    group = grown(near)
    members = {i for i, _ in group}
    result = torch.zeros(distances.shape, dtype=torch.bool)
    if len(members) < consistent.LEAST:
        return result
    owed = {}
    for at, row in rows.items():
        others = sorted(values[at[0]][j][at[1]] for j in range(count) if j not in members and j != at[0])
        owed[at] = sum(others[:kept]) / sum(row[:kept])
    limit = sorted(v for (i, _), v in owed.items() if i not in members)
    limit = limit[math.ceil(consistent.OWED * len(limit)) - 1]
    for (i, m), value in owed.items():
        if i in members and value > limit:
            result[i, [j for j in members if j != i], m] = True
    return result


def grown(near):
    """The largest set of patches that hang together."""
    best, left = set(), set(near)
    while left:
        group, edge = set(), {min(left)}
        while edge:
            group |= edge
            edge = {b for b in left - group for a in edge | group
                    if a[0] != b[0] and a[0] in near[b] and b[0] in near[a]
                    and len(near[a] & near[b]) >= consistent.ALIKE * len(near[a] | near[b])}
        left -= group
        best = max(best, group, key=len)
    return best


@pytest.mark.parametrize("sharing", [0, 4, 7])
def test_agrees_with_the_loops(sharing):
    distances = given(3, sharing)
    found = shared_defects(distances, KEEP)
    assert torch.equal(found, by_hand(distances))
    assert bool(found.any()) == (sharing > 0)


def test_enough_judges_are_left_and_no_image_is_left_out_for_itself():
    for sharing in (3, 6, 9, 10):
        left_out = shared_defects(given(1, sharing))
        assert not left_out.diagonal(dim1=0, dim2=1).any()
        assert torch.isfinite(scores(given(1, sharing), left_out)).all()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_small_sets_and_equal_images_are_left_alone(count):
    chance = torch.randn(count, 4, 3, generator=torch.Generator().manual_seed(0))
    for patches in (torch.ones(count, 4, 3), chance):
        assert not shared_defects(nearest_distances(patches)).any()


def test_the_order_of_the_images_does_not_matter():
    distances, order = given(), torch.randperm(IMAGES, generator=torch.Generator().manual_seed(1))
    found = shared_defects(distances[order][:, order])
    assert torch.equal(found, shared_defects(distances)[order][:, order])


def test_bad_input_is_refused(refuses):
    with refuses(r"^distances.shape: expected \(N, N, L\), found \(2, 3, 4\)$"):
        shared_defects(torch.zeros(2, 3, 4))
    with refuses(r"^keep: expected a share in \(0, 1\], found 0$"):
        shared_defects(torch.zeros(2, 2, 4), 0)
