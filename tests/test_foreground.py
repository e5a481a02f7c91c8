"""The background mask against a loop over pixels, at several sizes."""
import pytest
import torch

from anomaly.foreground import background, fitted_masks, hide_background, hides_background


def by_hand(image):
    """One (3, H, W) image, pixel by pixel."""
    _, height, width = image.shape
    tall, wide = height // 8, width // 8
    top, left = (height - 4 * tall) // 2, (width - 4 * wide) // 2
    colours = [image[:, top + r * tall:top + (r + 1) * tall, left + c * wide:left + (c + 1) * wide]
               .double().mean((1, 2)) for r in range(4) for c in range(4)]
    result = torch.zeros(height, width, dtype=torch.bool)
    for y in range(height):
        for x in range(width):
            far = sum(float((image[:, y, x].double() - c).norm()) > 90 for c in colours)
            away = ((y - (height - 1) / 2) ** 2 + (x - (width - 1) / 2) ** 2) ** 0.5 > 4 / 9 * height
            result[y, x] = far > 0.9 * 16 and away
    return result


@pytest.mark.parametrize("size", [(24, 24), (17, 31), (32, 20)])
def test_agrees_with_the_loop(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, *size), generator=generator, dtype=torch.uint8)
    images[1, :, size[0] // 4:-size[0] // 4] = 200
    found = background(images)
    assert torch.equal(found, torch.stack([by_hand(i) for i in images]))
    assert found.any() and not found.all()


def test_a_dark_object_before_a_white_ground():
    images = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    images[:, :, 12:52, 12:52] = 30
    hidden = background(images)
    assert hidden[0, 0, 0] and not hidden[0, 20, 20]


def test_a_plain_surface_has_no_background():
    assert not background(torch.full((2, 3, 16, 16), 90, dtype=torch.uint8)).any()


def test_hidden_pixels_take_the_minimum_of_all_maps():
    maps = torch.tensor([[[[0.5, 0.7]]], [[[0.2, 0.9]]]])
    hidden = torch.tensor([[[True, False]], [[False, False]]])
    hide_background(maps, hidden)
    torch.testing.assert_close(maps, torch.tensor([[[[0.2, 0.7]]], [[[0.2, 0.9]]]]))


def framed(n=6, side=20, rim=3):
    """Masks that hide the same frame in every image."""
    hidden = torch.ones(n, side, side, dtype=torch.bool)
    hidden[:, rim:-rim, rim:-rim] = False
    return hidden


def test_the_same_frame_in_every_image_is_background():
    assert hides_background(framed())


def test_the_rule_says_no_to_each_of_its_reasons():
    unlike = framed()
    unlike[2, 3:13, 3:5] = True  # a defect of strange colour at the rim of one object
    inner = torch.zeros(6, 20, 20, dtype=torch.bool)
    inner[:, 5:15, 5:15] = True  # alike, but a hole in the middle
    hardly_anything, all_but_a_spot = framed(side=100, rim=1), framed(side=20, rim=8)
    for hidden in (unlike, inner, hardly_anything, all_but_a_spot, torch.zeros_like(inner)):
        assert not hides_background(hidden)


def test_the_mask_stays_off_where_the_highest_scores_would_be_hidden():
    hidden = framed()
    maps = torch.rand(6, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    maps[1, 0, 8:12, 8:14] += 1  # 24 of 2400: the highest hundredth
    assert hides_background(hidden, maps)
    maps[1, 0, 0, 2:4] += 2  # two of them lie outside the object
    assert not hides_background(hidden, maps)


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (8, 6), (16, 12), (7, 9)])
def test_masks_of_ones_own_take_the_nearest_pixel(size):
    masks = torch.rand(3, 8, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    found = fitted_masks(masks, 3, size)
    wanted = [[[bool(mask[int((y + 0.5) * 8 / size[0]), int((x + 0.5) * 6 / size[1])]) for x in range(size[1])]
               for y in range(size[0])] for mask in masks]
    assert found.tolist() == wanted


def test_bad_masks_are_refused(refuses):
    with refuses(r"^masks: expected a bool tensor, True = background, found torch.float32$"):
        fitted_masks(torch.zeros(2, 4, 4), 2, (4, 4))
    with refuses(r"^masks: expected a bool tensor, True = background, found list$"):
        fitted_masks([[[True]]], 1, (4, 4))
    for shape in ((2, 4, 4), (3, 1, 4, 4), (3, 0, 4)):
        with refuses(r"^masks.shape: expected \(3, H, W\), found \("):
            fitted_masks(torch.zeros(shape, dtype=torch.bool), 3, (4, 4))
    whole = torch.zeros(3, 4, 4, dtype=torch.bool)
    whole[1] = True
    with refuses(r"^masks: expected something left of every image, found none of image 1$"):
        fitted_masks(whole, 3, (4, 4))
    with refuses(r"^hidden: expected \(N, H, W\) bool, not empty, found \(2, 4, 4\) torch.float32$"):
        hides_background(torch.zeros(2, 4, 4))
    with refuses(r"^maps.shape: expected \(6, 1, H, W\) as the mask, found \(6, 1, 4, 4\)$"):
        hides_background(framed(), torch.zeros(6, 1, 4, 4))


def test_bad_input_is_refused(refuses):
    with refuses(r"^images: expected \(N, 3, H, W\) uint8, found \(1, 3, 9, 9\) torch.float32$"):
        background(torch.zeros(1, 3, 9, 9))
    with refuses(r"^images.shape: expected at least 8 x 8 pixels, found \(7, 9\)$"):
        background(torch.zeros(1, 3, 7, 9, dtype=torch.uint8))
    with refuses(r"^maps.shape: expected \(1, 1, H, W\) as the mask, found \(2, 1, 4, 4\)$"):
        hide_background(torch.zeros(2, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool))
