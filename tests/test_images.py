import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import find_unreadable, list_images, read_rgb, to_uint8

RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "RGB"])
def test_every_common_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image = Image.fromarray(RGB).convert(mode)
    image.save(path)
    assert read_rgb(path).mode == "RGB"
    np.testing.assert_array_equal(np.asarray(read_rgb(path)), np.asarray(image.convert("RGB")))


def test_palette_with_transparency_gives_no_warning(tmp_path):
    image = Image.fromarray(RGB).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes([0, 128, 255]))
    assert read_rgb(tmp_path / "a.png").size == (6, 4)


def test_sixteen_bit_keeps_the_upper_byte(tmp_path):
    levels = (np.arange(24, dtype=np.uint16).reshape(4, 6) * 2700)
    Image.fromarray(levels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / "a.png"))[..., 0], levels >> 8)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to see it upright
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / "a.png")), np.rot90(RGB, -1))
    np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / "a.png", upright=False)), RGB)


def test_unreadable_files_are_named(tmp_path, refuses):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:2000])
    (tmp_path / "text.png").write_text("not an image")
    Image.fromarray(RGB).save(tmp_path / "good.png")
    with refuses(r"cut\.png: expected a readable image, found .*truncated"):
        read_rgb(tmp_path / "cut.png")
    with refuses(r"text\.png: expected a readable image, found cannot identify image file$"):
        read_rgb(tmp_path / "text.png")
    with refuses(r"none\.png: expected an image, found no such file"):
        read_rgb(tmp_path / "none.png")
    found = find_unreadable(tmp_path.iterdir())
    assert sorted(p.name for p in found) == ["cut.png", "text.png"]


def test_any_failure_of_a_decoder_is_one_line(tmp_path, refuses, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", lambda _: (_ for _ in ()).throw(struct.error("unpack requires 2 bytes")))
    with refuses(r"a\.png: expected a readable image, found unpack requires 2 bytes"):
        read_rgb(tmp_path / "a.png")


def test_an_image_that_unpacks_to_gigabytes_is_refused(tmp_path, refuses, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # as if 4 x 6 pixels were a bomb
    Image.fromarray(RGB).save(tmp_path / "a.png")
    with refuses(r"a\.png: expected a readable image, found .*decompression bomb"):
        read_rgb(tmp_path / "a.png")


def test_uint8_tensor_and_listing(tmp_path):
    assert torch.equal(to_uint8(Image.fromarray(RGB)), torch.from_numpy(RGB).permute(2, 0, 1))
    for name in ("b.PNG", "a.jpg", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in list_images(tmp_path)] == ["a.jpg", "b.PNG"]
