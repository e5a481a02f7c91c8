"""Score files as the organizers read them; every fault named with its file; nothing half-written."""
import json
import time
from pathlib import Path

import numpy as np
import pytest

from anomaly.score_files import read_scores, score_file, write_scores
from data.anomaly_tree import AnomalyImage, Category

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


def test_writing_is_faster_than_plain_json(tmp_path):
    _, maps = scores()

    def seconds(work):
        return min(_timed(work) for _ in range(3))

    ours = seconds(lambda: write_scores(tmp_path, "pill", IMAGES, np.zeros(2), maps))
    plain = seconds(lambda: [json.dumps(np.round(m, 4).tolist()) for m in maps])
    assert ours < plain


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
