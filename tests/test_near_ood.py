import math
from collections import Counter

import pytest
import torch

from backdoor_detection import near_ood as module
from backdoor_detection.near_ood import (
    ASPECT,
    BEND,
    CHANGES,
    ERASED,
    PARTS,
    PATCH,
    cut_paste,
    elastic,
    erase,
    grid_distortion,
    grid_mask,
    jigsaw,
    near_ood,
    quarter_turn,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(count, height, width):
    """Every pixel of an image tells its place: value = index / number of pixels."""
    return (torch.arange(height * width) / (height * width)).view(1, 1, height, width).repeat(count, 1, 1, 1)


def places(changed):
    """Whole (N, H, W) rows and columns from which the pixels of changed `numbered` images came."""
    index = (changed[:, 0] * changed[0].numel()).round().long()
    return index // changed.shape[3], index % changed.shape[3]


def box(mask):
    """(top, left, height, width) of the true pixels of (H, W), which must fill it."""
    rows, columns = mask.nonzero().unbind(1)
    top, left, height, width = rows.min(), columns.min(), rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
    assert mask.sum() == height * width
    return int(top), int(left), int(height), int(width)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [(6, 3, 16, 16), (3, 1, 9, 14), (2, 3, 2, 3), (2, 1, 1, 1)])
def test_a_change_keeps_shape_and_range_and_follows_the_generator(change, shape):
    images = torch.rand(shape, generator=seeded(1))
    kept, before = images.clone(), torch.get_rng_state()
    a, b, c = (change(images, generator=seeded(seed)) for seed in (0, 0, 1))
    assert a.shape == images.shape and a.dtype == torch.float32 and a.min() >= 0 and a.max() <= 1
    assert torch.equal(a, b) and torch.equal(images, kept) and torch.equal(torch.get_rng_state(), before)
    if shape[2] == 16:
        assert not torch.equal(a, c)
        assert all(not torch.equal(x, y) for x, y in zip(a, images, strict=True))


def test_a_quarter_turn_goes_either_way():
    images = torch.rand(20, 3, 8, 8, generator=seeded())
    found = Counter()
    for image, turned in zip(images, quarter_turn(images, generator=seeded()), strict=True):
        left = torch.stack([torch.stack([image[:, x, 7 - y] for x in range(8)], 1) for y in range(8)], 1)
        found["left"] += torch.equal(turned, left)
        found["right"] += torch.equal(turned, left.flip(1, 2))
    assert found["left"] + found["right"] == 20 and min(found.values()) > 3


def test_cut_paste_moves_one_rectangle():
    changed = cut_paste(numbered(50, 20, 30), generator=seeded())
    for rows, columns in zip(*places(changed), strict=True):
        shift = torch.stack([rows - torch.arange(20)[:, None], columns - torch.arange(30)])
        moved = (shift != 0).any(0)
        if moved.any():
            _, _, height, width = box(moved)
            assert len(shift[:, moved].unique(dim=1)[0]) == 1
            assert PATCH[0] * 0.7 < height * width / 600 < PATCH[1] * 1.3  # sides are rounded
            assert 0.7 / ASPECT < height / width < 1.3 * ASPECT
    assert len(changed.unique(dim=0)) > 45


def test_a_jigsaw_changes_the_places_of_whole_pieces():
    images = numbered(10, 9, 14)  # pieces of 2 x 3; a row and two columns are left over
    changed = jigsaw(images, generator=seeded())
    assert torch.equal(changed[:, :, 8:], images[:, :, 8:]) and torch.equal(changed[..., 12:], images[..., 12:])

    def pieces(image):
        return [image[0, y:y + 2, x:x + 3] for y in range(0, 8, 2) for x in range(0, 12, 3)]

    assert PARTS == 4
    for image, other in zip(images, changed, strict=True):
        order = [next(i for i, old in enumerate(pieces(image)) if torch.equal(old, new)) for new in pieces(other)]
        assert sorted(order) == list(range(16)) and order != sorted(order)


def test_elastic_distortion_is_smooth_and_as_strong_as_said():
    side = 64
    ramp = ((torch.arange(side) + 0.5) / side).expand(300, 1, side, side)  # value = place, as a share of the side
    shift = (elastic(ramp, generator=seeded()) - ramp)[..., side // 4:-side // 4]  # free of mirrored borders
    assert 0.5 * BEND < shift.std() < 1.1 * BEND and shift.mean().abs() < 0.01
    assert max(shift.diff(dim=axis).abs().max() for axis in (2, 3)) < 0.6 * BEND  # white noise: about 6


@pytest.mark.parametrize("axis", [2, 3])
def test_grid_distortion_stretches_whole_strips(axis):
    side = 100
    ramp = ((torch.arange(side) + 0.5) / side).expand(20, 1, side, side)
    ramp = ramp if axis == 3 else ramp.mT
    changed = grid_distortion(ramp.contiguous(), generator=seeded())
    torch.testing.assert_close(changed, changed.narrow(5 - axis, 0, 1).expand_as(changed))  # the other axis is even
    slopes = changed.select(5 - axis, 0)[:, 0, 2:-2].diff(dim=1) * side
    assert slopes.min() > 0  # order stays
    inside = slopes[:, [8, 28, 48, 68, 88]]  # the strips: 20 pixels each
    for k in range(5):  # away from the image's border, where half a pixel is flat
        strip = slopes[:, 20 * k + 3:20 * k + 13]
        torch.testing.assert_close(strip, inside[:, k:k + 1].expand_as(strip), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(inside.mean(1), torch.ones(20), rtol=1e-3, atol=1e-3)  # together the whole side
    assert inside.max() / inside.min() > 3


def test_an_erased_rectangle_is_noise_and_the_rest_stays():
    images = torch.full((60, 3, 20, 30), 0.5)
    for image in erase(images, generator=seeded()):
        noisy = (image != 0.5).any(0)
        _, _, height, width = box(noisy)
        assert ERASED[0] * 0.8 < height * width / 600 < ERASED[1] * 1.2
        assert image[:, noisy].std() == pytest.approx(1 / math.sqrt(12), abs=0.05)


def test_a_grid_mask_blackens_a_regular_part():
    images = torch.full((30, 2, 24, 40), 0.5)
    for image in grid_mask(images, generator=seeded()):
        black = image == 0
        assert torch.equal(image, images[0].masked_fill(black, 0)) and torch.equal(black[0], black[1])
        rows, columns = black[0].any(1), black[0].any(0)
        assert torch.equal(black[0], rows[:, None] & columns)
        periods = [p for p in range(6, 13) if torch.equal(columns[p:], columns[:-p])]
        assert periods and torch.equal(rows[periods[0]:], rows[:-periods[0]])
        assert columns[:periods[0]].sum() == periods[0] // 2


def marked(monkeypatch):
    """Change i adds 2 ** i, so that the sum tells which changes an image went through."""
    monkeypatch.setattr(module, "CHANGES", tuple(
        lambda images, *, generator, i=i: images + 2**i for i in range(len(CHANGES))))


@pytest.mark.parametrize("harsh", [1, 2, len(CHANGES)])
def test_each_image_goes_through_that_many_distinct_changes(monkeypatch, harsh):
    marked(monkeypatch)
    sums = near_ood(torch.zeros(5, 1, 2, 2), 400, harsh, generator=seeded())[:, 0, 0, 0].long().tolist()
    assert {total.bit_count() for total in sums} == {harsh}
    shares = [sum(total >> i & 1 for total in sums) / 400 for i in range(len(CHANGES))]
    assert all(abs(share - harsh / len(CHANGES)) < 0.1 for share in shares)


def test_images_are_used_equally_often(monkeypatch):
    marked(monkeypatch)
    images = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1, 1)
    used = near_ood(images, 7, 1, generator=seeded()).flatten() % 1
    assert sorted(Counter((used * 10).round().tolist()).values()) == [2, 2, 3]
    few = near_ood(images, 2, 1, generator=seeded()).flatten() % 1
    assert len(few.unique()) == 2


def test_equal_seeds_give_equal_images_and_one_image_does():
    images = torch.rand(1, 3, 16, 16, generator=seeded(1))
    kept = images.clone()
    a, b, c = (near_ood(images, 40, 2, generator=seeded(seed)) for seed in (0, 0, 1))
    assert a.shape == (40, 3, 16, 16) and torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(images, kept) and len(a.unique(dim=0)) == 40


def test_wrong_input_is_named(refuses):
    images = torch.zeros(1, 3, 4, 4)
    with refuses(r"images: expected \(N, C, H, W\), at least one, found \(0, 3, 4, 4\)"):
        near_ood(images[:0], 1, 1, generator=seeded())
    with refuses("count: expected > 0 images, found 0"):
        near_ood(images, 0, 1, generator=seeded())
    with refuses(r"harsh: expected in \[1, 7\] changes an image, found 8"):
        near_ood(images, 1, 8, generator=seeded())
