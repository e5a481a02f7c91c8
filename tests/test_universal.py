import math

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from backdoor_detection.changed_images import ChangedImages
from backdoor_detection.universal import STRIDE, Change, UniversalConfig, _spread, universal_reach

STD = torch.tensor([0.25, 0.5])
LABELS = torch.tensor([0, 1, 2, 0, 3, 1])


def a_network(classes=4, seed=0):
    """Smooth and curved, so that gradients turn on the way."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(125, classes)).eval()


@pytest.fixture(autouse=True)
def global_state():
    with torch.random.fork_rng(devices=[]):
        yield


def some_pixels(seed=1):
    return torch.randn(len(LABELS), 2, 5, 5, generator=torch.Generator().manual_seed(seed))


EVERYWHERE = Change(0, 0, 0.1)
THREE = (Change(0, 0, 0.05), Change(1, 0, 0.1), Change(3, 2, 0.3))


def reach(network=None, pixels=None, labels=LABELS, classes=4, late=lambda: False, **config):
    config = UniversalConfig(**{"steps": 4, "changes": (EVERYWHERE,), **config})
    images = ChangedImages(network or a_network(classes), some_pixels() if pixels is None else pixels, labels, STD,
                           classes, config.block)
    return universal_reach(images, config, late=late)


def by_loops(network, pixels, labels, classes, steps, change=EVERYWHERE):
    """(steps + 1, K) median margins after each step: class by class, image by image, pixel values in [0, 1]."""
    scale = STD.view(-1, 1, 1)
    rows = torch.zeros(steps + 1, classes)
    size = (len(STD), change.rows or 5, change.columns or 5)
    bound = change.radius * math.sqrt(math.prod(size))
    for k in range(classes):
        others = [i for i in range(len(pixels)) if labels[i] != k]
        picture = torch.zeros(size)
        for step in range(steps + 1):
            picture = picture.detach().requires_grad_(True)
            added = interpolate(picture[None], (5, 5), mode="bicubic")[0]
            margins = []
            for i in others:
                logits = network(((pixels[i] * scale + added) / scale)[None])[0]
                margins.append(logits[k] - max(logits[j] for j in range(classes) if j != k))
            rows[step, k] = sorted(m.item() for m in margins)[len(margins) // 2]
            if len(margins) % 2 == 0:
                rows[step, k] = (rows[step, k] + sorted(m.item() for m in margins)[len(margins) // 2 - 1]) / 2
            (gradient,) = torch.autograd.grad(sum(margins) / len(margins), picture)
            picture = picture.detach() + gradient / gradient.norm() * bound * (1 if step == 0 else STRIDE / steps)
            if picture.norm() > bound:
                picture = picture / picture.norm() * bound
    return rows


@pytest.mark.parametrize(("classes", "steps", "change"), [
    (2, 1, EVERYWHERE), (4, 4, EVERYWHERE), (3, 6, Change(0, 0, 0.5)), (4, 4, Change(3, 3, 0.3)),
    (4, 3, Change(1, 0, 0.3)), (4, 3, Change(0, 1, 0.3))])
def test_agrees_with_loops_over_classes_and_images(classes, steps, change):
    labels = LABELS.remainder(classes)
    found = reach(labels=labels, classes=classes, steps=steps, changes=(change,))
    expected = by_loops(a_network(classes), some_pixels(), labels, classes, steps, change)
    torch.testing.assert_close(found.margins, expected[-1], rtol=1e-4, atol=1e-5)
    assert (expected[-1] > expected[0] + 0.01).all()  # they do climb
    assert (found.kept, found.steps, found.steps_asked) == (tuple(range(classes)), steps, steps)


@pytest.mark.parametrize("block", [1, 700, 1 << 22])  # one class, two classes, all
def test_the_block_size_is_for_memory_only(block):
    torch.testing.assert_close(reach(block=block).margins, reach(block=900).margins, rtol=1e-5, atol=1e-6)


def test_blocks_hold_as_many_images_as_allowed():
    network, sizes = a_network(), []
    reach(network=lambda x: sizes.append(len(x)) or network(x), block=2 * some_pixels().numel() + 1, steps=1)
    assert sizes == [12, 12, 12, 12]  # two classes of six images, twice, before and after the step


def test_equal_inputs_give_equal_results():
    a, b = reach(), reach()
    assert torch.equal(a.margins, b.margins) and a.kept == b.kept
    assert not torch.equal(a.margins, reach(pixels=some_pixels(2)).margins)


def test_an_image_does_not_count_for_its_own_class():
    pixels = some_pixels()
    pixels[LABELS == 1] += 1
    before, after = reach().margins, reach(pixels=pixels).margins
    assert before[1] == pytest.approx(after[1].item(), abs=1e-6)
    assert ((before - after).abs()[[0, 2, 3]] > 1e-3).all()


def test_a_class_that_all_images_belong_to_is_not_followed():
    found = reach(labels=torch.full((6,), 2))
    assert found.kept == (0, 1, 3) and found.margins[2] == 0
    expected = by_loops(a_network(), some_pixels(), torch.full((6,), 9), 4, 4)[-1]  # all images count
    torch.testing.assert_close(found.margins[[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("radius", [0.05, 0.4])
def test_the_bound_holds_in_pixel_values(radius):
    pixels, network, largest = some_pixels(), a_network(), []

    def watched(x):
        moved = (x.view(4, 6, 2, 5, 5) - pixels).detach() * STD.view(-1, 1, 1)
        torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), rtol=0, atol=1e-6)  # shared by all images
        largest.append(moved.square().mean((2, 3, 4)).sqrt().max().item())
        return network(x)

    reach(watched, pixels, changes=(Change(0, 0, radius),))
    assert largest[0] == 0 and largest[1:] == pytest.approx([radius] * 4, rel=1e-4)


@pytest.mark.parametrize("change, equal", [(Change(1, 0, 0.1), 2), (Change(0, 1, 0.1), 3), (Change(1, 1, 0.1), 2)])
def test_a_row_or_a_column_of_points_is_a_pattern_of_stripes(change, equal):
    pixels, seen = some_pixels(), []
    reach(lambda x: seen.append((x.view(4, 6, 2, 5, 5) - pixels).detach()[0, 0]) or a_network()(x), pixels,
          changes=(change,), steps=1)
    assert seen[1].std(equal - 1).max() < 1e-5 and (seen[1] * STD.view(-1, 1, 1)).square().mean().sqrt() > 0.09
    if change.rows == change.columns:
        assert seen[1].std((1, 2)).max() < 1e-5


def test_never_more_points_than_pixels():
    assert Change(8, 3, 0.1).points(5, 32) == (5, 3) and Change(0, 1, 0.1).points(5, 32) == (5, 1)
    torch.testing.assert_close(reach(changes=(Change(9, 9, 0.1),)).margins, reach().margins)


def test_changes_follow_each_other_and_each_is_a_stage():
    found = reach(steps=2, changes=THREE)
    rows = torch.stack([by_loops(a_network(), some_pixels(), LABELS, 4, 2, change)[-1] for change in THREE])
    torch.testing.assert_close(found.stages, rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.margins, rows.mean(0), rtol=1e-4, atol=1e-5)
    assert (found.steps, found.steps_asked) == (6, 6)


@pytest.mark.parametrize("sweeps, steps, stages", [(1, 0, 1), (2, 1, 1), (3, 2, 1), (4, 3, 1), (5, 4, 2), (6, 5, 2),
                                                   (7, 6, 3)])
def test_only_changes_done_in_time_count(sweeps, steps, stages):
    """One sweep that all changes begin with, then two steps a change; of the first change what there is counts."""
    calls = iter(range(100))
    found = reach(steps=2, changes=THREE, block=1, late=lambda: next(calls) >= 4 * sweeps)
    rows = [by_loops(a_network(), some_pixels(), LABELS, 4, 2, change) for change in THREE]
    expected = rows[0][[sweeps - 1]] if sweeps < 3 else torch.stack([row[-1] for row in rows[:stages]])
    torch.testing.assert_close(found.stages, expected, rtol=1e-4, atol=1e-5)
    assert found.steps == steps


def test_all_changes_begin_with_one_sweep():
    """Nothing is added yet: the slopes there are the same for all, and are found once."""
    network, seen = a_network(), []
    reach(lambda x: seen.append((x.view(4, 6, 2, 5, 5) - some_pixels()).abs().max().item()) or network(x),
          changes=THREE, steps=3)
    assert [added > 0 for added in seen] == [False] + [True] * 9


def test_half_of_the_images_decide():
    """Bug: the mean of the margins rose with a few images that were close to a class anyhow."""
    class Sum(nn.Module):
        def forward(self, x):
            return x.flatten(1).sum(1, keepdim=True) * torch.tensor([1.0, 0.0, 0.0])

    pixels = torch.zeros(5, 2, 5, 5)
    pixels[0] = 100.0
    labels = torch.full((5,), 1)
    alone = reach(Sum(), pixels[1:], labels[1:], 3).margins[0]
    torch.testing.assert_close(reach(Sum(), pixels, labels, 3).margins[0], alone)


def test_screening_keeps_the_furthest_and_an_even_spread():
    """Of 13 classes 6 are followed: by one image in three, under the first change, 2 of them the furthest."""
    labels = torch.arange(6)
    first = reach(pixels=some_pixels()[::3], labels=labels[::3], classes=13, kept=13).margins
    whole = reach(labels=labels, classes=13, kept=13, changes=THREE)
    found = reach(labels=labels, classes=13, kept=6, changes=(EVERYWHERE, *THREE[1:]))
    order = first.argsort(descending=True).tolist()
    spread = [order[round(12 * share / 5)] for share in (1, 2, 3, 4)]
    assert found.null == tuple(sorted(spread)) and set(found.kept) >= {*order[:2], *spread} and len(found.kept) == 6
    torch.testing.assert_close(found.stages[1:, list(found.kept)], whole.stages[1:, list(found.kept)],
                               rtol=1e-5, atol=1e-6)
    dropped = [k for k in range(13) if k not in found.kept]
    torch.testing.assert_close(found.stages[:, dropped], first[dropped].expand(3, -1), rtol=1e-5, atol=1e-6)
    assert whole.kept == whole.null == tuple(range(13)) and found.steps == 12


@pytest.mark.parametrize(("classes", "kept"), [(6, 5), (21, 20), (43, 20), (100, 5), (200, 20)])
def test_screening_keeps_the_number_asked_for(classes, kept):
    found = reach(classes=classes, steps=2, kept=kept)
    assert len(set(found.kept)) == kept and list(found.kept) == sorted(found.kept)
    assert set(found.null) <= set(found.kept) and len(found.null) == kept - kept // 3
    assert found.margins[list(found.kept)].isfinite().all() and found.margins.shape == (classes,)


def test_screening_takes_all_images_where_few_are_of_one_class():
    """Bug: no image of another class is left for that class, and its margin would be no number."""
    labels = torch.tensor([2, 0, 1, 2, 0, 1])  # every third is of class 2
    found = reach(labels=labels, classes=13, kept=5)
    assert found.margins.isfinite().all()
    alone = reach(labels=labels, classes=13, kept=13)
    dropped = [k for k in range(13) if k not in found.kept]
    torch.testing.assert_close(found.margins[dropped], alone.margins[dropped], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sweeps", [0, 1, 2, 3, 4])
def test_a_screening_cut_off_keeps_all(sweeps):
    """13 classes, a block each: three sweeps of screening, then three of the change for 5 classes."""
    labels, calls = torch.arange(6), iter(range(1000))
    asked = 13 * sweeps if sweeps <= 3 else 3 * 13 + 5
    found = reach(labels=labels, classes=13, kept=5, steps=2, block=1, late=lambda: next(calls) >= asked)
    assert len(found.kept) == (13 if sweeps < 3 else 5) and found.steps == 0
    rows = by_loops(a_network(13), some_pixels()[::3], labels[::3], 13, 2)
    expected = torch.cat([torch.zeros(1, 13), rows])[min(sweeps, 3)]
    shown = [k for k in range(13) if k not in found.kept or sweeps < 4]  # then the change has begun anew
    torch.testing.assert_close(found.margins[shown], expected[shown], rtol=1e-4, atol=1e-5)


def test_a_spread_of_ranks_has_the_moments_of_the_whole():
    """Else the furthest classes would widen the null, and hide the one that stands out."""
    values = torch.randn(200, generator=torch.Generator().manual_seed(0))
    kept, spread = _spread(values, 20)
    assert abs(values[spread].mean() - values.mean()) < 0.1 and 0.8 < values[spread].std() / values.std() < 1.1
    assert set(values.argsort(descending=True)[:6].tolist()) <= set(kept.tolist())


@pytest.mark.parametrize("calls", range(0, 13))
def test_late_cuts_between_blocks_and_the_cut_sweep_does_not_count(calls):
    """Four classes, a block each: four calls a sweep, three sweeps of two steps."""
    asked = []

    def late():
        asked.append(None)
        return len(asked) > calls

    found = reach(steps=2, block=1, late=late)
    expected = torch.cat([torch.zeros(1, 4), by_loops(a_network(), some_pixels(), LABELS, 4, 2)])
    torch.testing.assert_close(found.margins, expected[calls // 4], rtol=1e-4, atol=1e-5)
    assert found.steps == max(0, calls // 4 - 1) and found.steps_asked == 2 and found.kept == (0, 1, 2, 3)
    assert len(asked) == min(calls + 1, 12)  # nothing goes on after


def test_late_at_once_asks_nothing_of_the_network():
    def untouched(x):
        raise AssertionError("the network was used")

    found = reach(untouched, late=lambda: True)
    assert found.margins.tolist() == [0, 0, 0, 0] and found.steps == 0 and found.kept == (0, 1, 2, 3)


def test_a_margin_that_is_no_number_stays_none():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.where(x[:, 0, 0, :1] > x[:, 0, 0, :1].min(), x.flatten(1)[:, :3], math.nan)

    assert reach(Broken(), classes=3, block=1).margins.isnan().all()  # one image of six


def test_a_network_without_slope_stays_where_it_is():
    found = reach(lambda x: (x * 0).flatten(1)[:, :4])
    assert found.margins.tolist() == [0, 0, 0, 0]


def test_wrong_numbers_are_named(refuses):
    with refuses("UniversalConfig.images: expected > 0, found 0"):
        UniversalConfig(images=0)
    with refuses("UniversalConfig.steps: expected > 0, found -1"):
        UniversalConfig(steps=-1)
    with refuses(r"UniversalConfig.changes: expected at least one, found \(\)"):
        UniversalConfig(changes=())
    with refuses("UniversalConfig.kept: expected >= 5 classes, found 4"):
        UniversalConfig(kept=4)
    with refuses("Change.radius: expected > 0, found 0.0"):
        Change(0, 0, 0.0)
    with refuses(r"Change rows, columns: expected >= 0 points, found \(-1, 0\)"):
        Change(-1, 0, 0.1)
