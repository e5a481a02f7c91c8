import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from data import zoo_building
from data.image_sets import ImageSet
from data.model_zoo import labelled_images, load_model, read_zoo
from data.preact_resnet import new_model
from data.victims import VictimConfig
from data.zoo_building import build_zoo, draw_test_images, one_by_one
from data.zoo_recipes import Recipe, SetPlan, jobs
from submit.engines import Engine, each

VICTIM = VictimConfig(widths=(2, 4, 4, 8), epochs=1, batch=16, crop=1)
PLAN = SetPlan("noise", clean=2, size=8, floor_accuracy=0, floor_success=0, victim=VICTIM)
RECIPE = Recipe((PLAN,), ("badnets", "blended"), (0.2,))
NAMES = ["noise-clean-0", "noise-badnets-0.2-0", "noise-clean-1", "noise-blended-0.2-0"]


def a_set(count, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 3, 3, "noise")


SIDE_BY_SIDE = partial(each, engine=Engine("local", 2))
TRAIN, TEST = a_set(30, 0), a_set(24, 1)


def build(folder, recipe=RECIPE, train=TRAIN, **options):
    return build_zoo(folder, jobs(recipe), {"noise": (train, TEST)}, **options)


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KIT_DEVICE", "cpu")
        yield


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoos") / "noise"
    build(folder)
    return folder


def test_the_records_say_what_was_trained(zoo):
    found = read_zoo(zoo)
    assert found.problems == () and [m.name for m in found.models] == sorted(NAMES)
    models = {m.name: m for m in found.models}
    assert [models[name].ground_truth for name in NAMES] == [1, 0, 1, 0]  # 0 = backdoored
    assert [models[name].record["attack"] for name in NAMES] == [None, "badnets", None, "blended"]
    assert [models[name].record["target"] is None for name in NAMES] == [True, False, True, False]
    assert len({models[name].record["seed"] for name in NAMES}) == 4
    assert {(m.record["set"], tuple(m.record["widths"])) for m in found.models} == {("noise", (2, 4, 4, 8))}
    assert list(json.loads((zoo / "zoo.json").read_text())["models"]) == NAMES


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
    records = build(zoo)
    assert records == json.loads((zoo / "zoo.json").read_text())["models"]
    assert {path: path.stat().st_mtime_ns for path in zoo.rglob("*.pt")} == before


def quick(images, labels, num_classes, config, *, seed):
    """In place of training: the freshly initialised network."""
    return new_model(num_classes, config.widths, 3, seed=seed).eval()


def test_an_interrupted_zoo_goes_on(tmp_path, monkeypatch):
    seeds = [job.seed for job in jobs(RECIPE)]

    def broken(*args, **options):
        if options["seed"] == seeds[2]:
            raise KeyboardInterrupt
        return quick(*args, **options)

    monkeypatch.setattr(zoo_building, "train_victim", broken)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "zoo")
    assert {m.name for m in read_zoo(tmp_path / "zoo").models} == set(NAMES[:2])
    seen = []
    monkeypatch.setattr(zoo_building, "train_victim", lambda *a, **o: seen.append(o["seed"]) or quick(*a, **o))
    build(tmp_path / "zoo")
    assert seen == seeds[2:]
    assert {m.name for m in read_zoo(tmp_path / "zoo").models} == set(NAMES)


def test_a_recipe_that_grew_adds_its_models(zoo, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(zoo, tmp_path / "zoo")
    seen = []
    monkeypatch.setattr(zoo_building, "train_victim", lambda *a, **o: seen.append(o["seed"]) or quick(*a, **o))
    records = build(tmp_path / "zoo", replace(RECIPE, repeats=2))
    assert set(records) == {*NAMES, "noise-badnets-0.2-1", "noise-blended-0.2-1"} and len(seen) == 2


@pytest.mark.parametrize("recipe, train", [
    (replace(RECIPE, sets=(replace(PLAN, victim=replace(VICTIM, epochs=2)),)), TRAIN),
    (replace(RECIPE, seed=1), TRAIN), (RECIPE, a_set(30, 5)),
])
def test_a_model_of_other_settings_is_refused(zoo, refuses, recipe, train):
    with refuses("noise-.*: expected a model of these settings and images, or nothing, found one of others"):
        build(zoo, recipe, train)


def test_a_folder_with_other_files_is_refused(tmp_path, refuses):
    (tmp_path / "thesis.txt").write_text("x")
    with refuses("expected a new folder or one of this recipe, found thesis.txt in it"):
        build(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_model_without_its_record_is_refused(tmp_path, refuses):
    (tmp_path / NAMES[0]).mkdir()
    with refuses(f"{NAMES[0]}: expected a model with its record.json, found something else"):
        build(tmp_path)


def test_failed_victims_are_marked_and_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_building, "train_victim", quick)
    monkeypatch.setattr(zoo_building, "clean_accuracy", lambda *_: 0.91)
    monkeypatch.setattr(zoo_building, "attack_success", lambda *_: 0.5)
    strict = replace(PLAN, floor_accuracy=0.9, floor_success=0.95, clean=1)
    seen = []
    records = build(tmp_path / "zoo", Recipe((strict,), ("badnets",)), progress=lambda name, _: seen.append(name))
    assert "failed" not in records["noise-clean-0"]
    assert records["noise-badnets-0.1-0"]["failed"] == "ASR 0.5000 below 0.95"
    assert [m.name for m in read_zoo(tmp_path / "zoo").models] == ["noise-clean-0"]
    assert seen == ["noise-clean-0", "noise-badnets-0.1-0"]
    monkeypatch.setattr(zoo_building, "clean_accuracy", lambda *_: 0.8)
    records = build(tmp_path / "other", Recipe((strict,), ("badnets",)))
    assert records["noise-clean-0"]["failed"] == "ACC 0.8000 below 0.9"


def test_weights_do_not_depend_on_the_number_of_workers(zoo, tmp_path):
    build(tmp_path / "again", replace(RECIPE, attacks=("badnets",)), in_turn=SIDE_BY_SIDE)
    for name in NAMES[:3]:
        assert (zoo / name / "model.pt").read_bytes() == (tmp_path / "again" / name / "model.pt").read_bytes()


@pytest.mark.parametrize("in_turn", [one_by_one, SIDE_BY_SIDE])
def test_a_model_that_cannot_be_trained_is_named_and_the_others_go_on(tmp_path, refuses, in_turn):
    recipe = replace(RECIPE, attacks=("badnets", "blended"), parameters={"badnets": {"size": 9}})  # of 8 pixels
    with refuses(r"zoo: expected every model trained, found noise-badnets-0.2-0: BadNetsConfig.size: expected at most"):
        build(tmp_path / "zoo", recipe, in_turn=in_turn)
    assert {m.name for m in read_zoo(tmp_path / "zoo").models} == set(NAMES) - {"noise-badnets-0.2-0"}
