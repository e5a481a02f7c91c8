"""Score files as the organizers read them; every fault named with its file; nothing half-written."""
import json
import time
from pathlib import Path

import numpy as np
import pytest

from anomaly.score_files import MAP_START, ROW, STEPS, read_scores, score_file, write_scores
from data.anomaly_tree import AnomalyImage, Category
from data.errors import InputError

IMAGES = (AnomalyImage(Path("in/pill/test/bent/b.1.png"), "bent", None), AnomalyImage(Path("x/a.jpg"), "good", None))
CATEGORY = Category("pill", IMAGES, True)


def scores(seed=0):
    rng = np.random.default_rng(seed)
    maps = rng.random((2, 1, 224, 224))
    maps[0, 0, 0, :3] = 0, 1, 0.00005
    return rng.random(2), maps


def as_the_organizers_read(path):
    """One file through json and numpy alone."""
    return {key: np.array(v["__ndarray__"], dtype=v["dtype"]).reshape(v["shape"])
            for key, v in json.loads(path.read_text()).items()}


def test_the_organizers_read_what_was_written(tmp_path):
    image_scores, maps = scores()
    write_scores(tmp_path, "pill", IMAGES, image_scores, maps)
    for name, score, pixels in zip(("bent/b.1", "good/a"), image_scores, maps, strict=True):
        found = as_the_organizers_read(tmp_path / "pill/test" / f"{name}_scores.json")
        assert found.keys() == {"img_level_score", "pix_level_score"}
        assert found["img_level_score"].shape == () and found["pix_level_score"].dtype == np.float64
        assert found["img_level_score"] == np.round(score, 4)
        assert np.array_equal(found["pix_level_score"], np.round(pixels, 4))


def test_reading_gives_back_all_images_in_order(tmp_path):
    image_scores, maps = scores()
    write_scores(tmp_path, "pill", IMAGES, image_scores, maps.astype(np.float32))
    found, found_maps = read_scores(tmp_path, CATEGORY)
    assert np.array_equal(found, np.round(image_scores, 4)) and found_maps.shape == (2, 1, 224, 224)
    assert np.abs(found_maps - maps).max() <= 0.501e-4
    write_scores(tmp_path, "pill", IMAGES, found, found_maps)  # replaces; four decimals stay as they are
    again, again_maps = read_scores(tmp_path, CATEGORY)
    assert np.array_equal(again, found) and np.array_equal(again_maps, found_maps)


def test_all_levels_come_out_as_json_reads_them(tmp_path):
    levels = np.resize(np.arange(STEPS + 1), (2, 1, 224, 224))
    write_scores(tmp_path, "pill", IMAGES, np.array([0, 1]), levels / STEPS)
    expected = np.array([float(f"{level / STEPS:.4f}") for level in levels.flat]).reshape(levels.shape)
    found, found_maps = read_scores(tmp_path, CATEGORY)
    assert found.tolist() == [0, 1] and np.array_equal(found_maps, expected)
    stored = [as_the_organizers_read(score_file(tmp_path, "pill", image))["pix_level_score"] for image in IMAGES]
    assert np.array_equal(stored, expected)


def test_files_of_another_writer_are_read_alike(tmp_path):
    image_scores, maps = scores()
    write_scores(tmp_path, "pill", IMAGES, image_scores, maps)
    ours = read_scores(tmp_path, CATEGORY)
    for image, layout in zip(IMAGES, ({"indent": 1}, {"separators": (",", ":")}), strict=True):
        path = score_file(tmp_path, "pill", image)
        path.write_text(json.dumps(json.loads(path.read_text()), **layout))
    again = read_scores(tmp_path, CATEGORY)
    assert np.array_equal(again[0], ours[0]) and np.array_equal(again[1], ours[1])


def test_our_own_files_are_read_without_a_parser(tmp_path, monkeypatch):
    image_scores, maps = scores()
    write_scores(tmp_path, "pill", IMAGES, image_scores, maps)
    monkeypatch.setattr(json, "loads", None)
    assert np.array_equal(read_scores(tmp_path, CATEGORY)[1], np.round(maps, 4))


def as_json_alone_reads(path):
    """The values of a file, None where it is no JSON or out of range."""
    try:
        arrays = as_the_organizers_read(path)
    except ValueError:
        return None
    values = np.append(arrays["img_level_score"], arrays["pix_level_score"])
    return values if values.min() >= 0 and values.max() <= 1 else None


@pytest.mark.parametrize("place", [MAP_START + 3 * ROW + 5 * 8 + at for at in range(1, 9)]
                         + [MAP_START + 4 * ROW - back for back in (1, 2, 3)] + [MAP_START + 4 * ROW, 35, 36, 37, -1])
def test_one_changed_byte_is_never_overlooked(tmp_path, place):
    image_scores, maps = scores()
    category = Category("pill", IMAGES[:1], True)
    write_scores(tmp_path, "pill", category.images, image_scores[:1], maps[:1])
    path = score_file(tmp_path, "pill", IMAGES[0])
    original = path.read_bytes()
    for byte in (b"7", b":", b" "):  # ":" follows "9": as a digit it would be ten
        changed = bytearray(original)
        changed[place:(place + 1) or None] = byte
        path.write_bytes(changed)
        expected = as_json_alone_reads(path)
        if expected is None:
            with pytest.raises(InputError, match=r"b\.1_scores\.json"):
                read_scores(tmp_path, category)
        else:
            found, found_maps = read_scores(tmp_path, category)
            assert np.array_equal(np.append(found, found_maps), expected)


@pytest.mark.parametrize("spoil, message", [(lambda b: b[:-1], "expected JSON, found "),
                                            (lambda b: b + b"}", "expected JSON, found Extra data"),
                                            (lambda b: b"\xff" + b[1:], "expected JSON, found 'utf-8' codec")])
def test_cut_and_lengthened_files_are_named(tmp_path, refuses, spoil, message):
    write_scores(tmp_path, "pill", IMAGES, *scores())
    path = score_file(tmp_path, "pill", IMAGES[1])
    path.write_bytes(spoil(path.read_bytes()))
    with refuses(f"good/a_scores.json: {message}"):
        read_scores(tmp_path, CATEGORY)


def test_writing_is_faster_than_value_by_value(tmp_path):
    _, maps = scores()

    def seconds(work):
        return min(_timed(work) for _ in range(3))

    ours = seconds(lambda: write_scores(tmp_path, "pill", IMAGES, np.zeros(2), maps))
    plain = seconds(lambda: [json.dumps([[round(float(v), 4) for v in row] for row in m[0]]) for m in maps])
    assert 4 * ours < plain  # some 70 times on a quiet machine


def _timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@pytest.mark.parametrize("bad, message", [(np.nan, "finite numbers, found NaN or infinity"),
                                          (1.01, r"numbers in \[0, 1\], found .* to 1.01"),
                                          (-0.1, r"numbers in \[0, 1\], found -0.1 to ")])
def test_scores_out_of_range_are_refused_before_anything_is_written(tmp_path, refuses, bad, message):
    image_scores, maps = scores()
    maps[1, 0, 5, 5] = bad
    with refuses(r"good/a_scores.json pix_level_score: expected " + message):
        write_scores(tmp_path, "pill", IMAGES, image_scores, maps)
    maps = scores()[1]
    image_scores[0] = bad
    with refuses(r"bent/b.1_scores.json img_level_score: expected "):
        write_scores(tmp_path, "pill", IMAGES, image_scores, maps)
    assert list(tmp_path.iterdir()) == []


def test_wrong_shapes_and_colliding_names_are_refused(tmp_path, refuses):
    image_scores, maps = scores()
    with refuses(r"^pill image scores: expected shape \(2,\), found \(1,\)$"):
        write_scores(tmp_path, "pill", IMAGES, image_scores[:1], maps)
    with refuses(r"^pill maps: expected shape \(2, 1, 224, 224\), found \(2, 224, 224\)$"):
        write_scores(tmp_path, "pill", IMAGES, image_scores, maps[:, 0])
    with refuses(r"^pill images: expected another stem for each of a kind, found two alike$"):
        write_scores(tmp_path, "pill", IMAGES[:1] * 2, image_scores, maps)


@pytest.fixture
def written(tmp_path):
    write_scores(tmp_path, "pill", IMAGES, *scores())
    return tmp_path


def test_missing_and_malformed_files_are_named(written, refuses):
    path = score_file(written, "pill", IMAGES[1])
    path.write_text("{")
    with refuses(r"good/a_scores.json: expected JSON, found "):
        read_scores(written, CATEGORY)
    path.write_text("[]")
    with refuses(r"good/a_scores.json: expected a JSON object, found list$"):
        read_scores(written, CATEGORY)
    path.unlink()
    with refuses(r"good/a_scores.json: expected a score file, found No such file or directory$"):
        read_scores(written, CATEGORY)


def stored(value, dtype="float64", shape=()):
    return {"__ndarray__": value, "dtype": dtype, "shape": list(shape)}


@pytest.mark.parametrize("key, value, message", [
    ("img_level_score", None, ": expected an object with __ndarray__, dtype and shape, found none"),
    ("img_level_score", 0.5, ": expected an object with __ndarray__, dtype and shape, found 0.5"),
    ("img_level_score", stored(0.5, dtype="float32"), " dtype: expected float64, found float32"),
    ("img_level_score", stored([0.5], shape=(1,)), r" shape: expected \[\], found \[1\]"),
    ("img_level_score", stored("x"), r": expected numbers of shape \[\], found could not convert"),
    ("img_level_score", stored(2), r": expected numbers in \[0, 1\], found 2 to 2"),
    ("img_level_score", stored(float("nan")), ": expected finite numbers, found NaN or infinity"),
    ("pix_level_score", stored([[[0.5]]], shape=(1, 224, 224)),
     r": expected numbers of shape \[1, 224, 224\], found cannot reshape"),
])
def test_wrong_contents_are_named(written, refuses, key, value, message):
    path = score_file(written, "pill", IMAGES[1])
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with refuses(f"good/a_scores.json {key}{message}"):
        read_scores(written, CATEGORY)
