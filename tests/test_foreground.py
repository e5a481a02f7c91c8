"""The background mask against a loop over pixels, at several sizes."""
import pytest
import torch

from anomaly.foreground import background, without_background


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
    torch.testing.assert_close(without_background(maps, hidden), torch.tensor([[[[0.2, 0.7]]], [[[0.2, 0.9]]]]))


def test_bad_input_is_refused(refuses):
    with refuses(r"^images: expected \(N, 3, H, W\) uint8, found \(1, 3, 9, 9\) torch.float32$"):
        background(torch.zeros(1, 3, 9, 9))
    with refuses(r"^images.shape: expected at least 8 x 8 pixels, found \(7, 9\)$"):
        background(torch.zeros(1, 3, 7, 9, dtype=torch.uint8))
    with refuses(r"^maps.shape: expected \(1, 1, H, W\) as the mask, found \(2, 1, 4, 4\)$"):
        without_background(torch.zeros(2, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool))
