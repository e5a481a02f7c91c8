import json
from dataclasses import replace

import pytest
import torch

from data import zoo_building
from data.image_sets import ImageSet
from data.model_zoo import labelled_images, load_model, read_zoo
from data.preact_resnet import new_model
from data.victims import VictimConfig
from data.zoo_building import ZooConfig, build_zoo, draw_test_images

VICTIM = VictimConfig(widths=(2, 4, 4, 8), epochs=1, batch=16, crop=1)
CONFIG = ZooConfig(models=4, victim=VICTIM, ratio=0.2, floor_accuracy=0, floor_success=0)


def a_set(count, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 3, 3, "noise")


TRAIN, TEST = a_set(30, 0), a_set(24, 1)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoos") / "noise"
    build_zoo(folder, TRAIN, TEST, CONFIG)
    return folder


def test_half_is_clean_and_the_attacks_take_turns(zoo):
    found = read_zoo(zoo)
    assert found.problems == ()
    assert [m.ground_truth for m in found.models] == [1, 0, 1, 0]  # 0 = backdoored
    assert [m.record["attack"] for m in found.models] == [None, "badnets", None, "blended"]
    assert {m.record["target"] for m in found.models if m.record["attack"]} <= {0, 1, 2}
    assert [m.record["target"] for m in found.models][::2] == [None, None]
    assert [m.record["seed"] for m in found.models] == [0, 1, 2, 3]
    assert {(m.record["set"], tuple(m.record["widths"])) for m in found.models} == {("noise", (2, 4, 4, 8))}


def test_models_and_transform_give_the_recorded_accuracy(zoo):
    from torchvision.transforms.functional import to_pil_image

    for sample in read_zoo(zoo).models:
        x = torch.stack([sample.transformation(to_pil_image(image)) for image in TEST.images])
        right = (load_model(sample)(x).argmax(1) == TEST.labels).double().mean().item()
        assert right == pytest.approx(sample.record["ACC"])


def test_test_images_are_the_sets_own(zoo):
    from data.images import read_rgb, to_uint8

    sample = read_zoo(zoo).models[0]
    images = labelled_images(sample.images_folder, 3)
    assert sorted(label for _, label in images) == [0, 1, 2]
    for path, label in images:
        index = int(path.stem.split("_")[0])
        assert TEST.labels[index] == label
        # JPEG of pure noise, the hardest case: still close
        assert (to_uint8(read_rgb(path)).double() - TEST.images[index].double()).abs().mean() < 8


def test_the_drawn_share_is_one_percent_with_every_class():
    big = ImageSet(torch.zeros(1000, 3, 2, 2, dtype=torch.uint8), (torch.arange(1000) >= 997).long(), 2, "x")
    drawn = draw_test_images(big, generator=torch.Generator().manual_seed(0))
    assert len(drawn) == len(set(drawn.tolist())) == 10
    assert set(big.labels[drawn].tolist()) == {0, 1}
    small = draw_test_images(TEST, generator=torch.Generator().manual_seed(0))
    assert sorted(TEST.labels[small].tolist()) == [0, 1, 2]


def test_a_second_call_trains_nothing(zoo, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in zoo.rglob("*.pt")}
    monkeypatch.setattr(zoo_building, "train_victim", None)  # a call would fail
    records = build_zoo(zoo, TRAIN, TEST, CONFIG)
    assert records == json.loads((zoo / "zoo.json").read_text())["models"]
    assert {path: path.stat().st_mtime_ns for path in zoo.rglob("*.pt")} == before


def quick(images, labels, num_classes, config, *, seed):
    """In place of training: the freshly initialised network."""
    return new_model(num_classes, config.widths, 3, seed=seed).eval()


def test_an_interrupted_zoo_goes_on(tmp_path, monkeypatch):
    def broken(*args, **options):
        if options["seed"] == 2:
            raise KeyboardInterrupt
        return quick(*args, **options)

    monkeypatch.setattr(zoo_building, "train_victim", broken)
    with pytest.raises(KeyboardInterrupt):
        build_zoo(tmp_path / "zoo", TRAIN, TEST, CONFIG)
    assert [m.name for m in read_zoo(tmp_path / "zoo").models] == ["000", "001"]
    seen = []
    monkeypatch.setattr(zoo_building, "train_victim", lambda *a, **o: seen.append(o["seed"]) or quick(*a, **o))
    build_zoo(tmp_path / "zoo", TRAIN, TEST, CONFIG)
    assert seen == [2, 3]
    assert [m.name for m in read_zoo(tmp_path / "zoo").models] == ["000", "001", "002", "003"]


@pytest.mark.parametrize("config, train, named", [
    (replace(CONFIG, ratio=0.3), TRAIN, "ratio"),
    (replace(CONFIG, seed=1, victim=replace(VICTIM, epochs=2)), TRAIN, "seed, victim"),
    (CONFIG, a_set(30, 5), "images"),
])
def test_another_config_in_the_same_folder_is_refused(zoo, refuses, config, train, named):
    with refuses(rf"zoo\.json: expected the configuration it was begun with, found another {named}$"):
        build_zoo(zoo, train, TEST, config)


def test_a_folder_with_other_files_is_refused(tmp_path, refuses):
    (tmp_path / "thesis.txt").write_text("x")
    with refuses("expected a new or empty folder, found other files in it"):
        build_zoo(tmp_path, TRAIN, TEST, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_failed_victims_are_marked_and_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_building, "train_victim", quick)
    monkeypatch.setattr(zoo_building, "clean_accuracy", lambda *_: 0.99)
    monkeypatch.setattr(zoo_building, "attack_success", lambda *_: 0.5)
    lines = []
    records = build_zoo(tmp_path / "zoo", TRAIN, TEST, ZooConfig(models=2, victim=VICTIM), progress=lines.append)
    assert "failed" not in records["000"] and records["001"]["failed"] == "ASR 0.5000 below 0.95"
    assert [m.name for m in read_zoo(tmp_path / "zoo").models] == ["000"]
    assert [line[:4] for line in lines] == ["000:", "001:"]
    monkeypatch.setattr(zoo_building, "clean_accuracy", lambda *_: 0.9)
    records = build_zoo(tmp_path / "other", TRAIN, TEST, ZooConfig(models=2, victim=VICTIM))
    assert records["000"]["failed"] == "ACC 0.9000 below 0.95"


def test_equal_seeds_give_equal_models(zoo, tmp_path):
    build_zoo(tmp_path / "again", TRAIN, TEST, replace(CONFIG, models=2))
    for name in ("000", "001"):
        assert (zoo / name / "model.pt").read_bytes() == (tmp_path / "again" / name / "model.pt").read_bytes()


@pytest.mark.parametrize("wrong, message", [
    ({"models": 3}, "ZooConfig.models: expected an even number >= 2, found 3"),
    ({"attacks": ()}, "ZooConfig.attacks: expected at least one, found none"),
    ({"attacks": ("wanet",)}, "ZooConfig.attacks: expected some of badnets, blended, found wanet"),
    ({"floor_success": 95}, r"ZooConfig floors: expected in \[0, 1\], found 95"),
])
def test_a_wrong_config_is_named(refuses, wrong, message):
    with refuses(message):
        ZooConfig(**wrong)
