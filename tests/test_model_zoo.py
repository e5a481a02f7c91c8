import json

import pytest
import torch
import torchvision.transforms as transforms
from PIL import Image

from data.model_zoo import labelled_images, load_model, read_zoo
from data.preact_resnet import new_model

NARROW = (2, 2, 2, 2)


def write_sample(root, name, *, images="test_images", files=("0_1.jpg", "1_0.jpg"), place=None, state=None, **changed):
    """One sample as the organizers lay it out; `changed` entries of the metadata, None removes one."""
    folder = root / name
    (place or folder / "test_images").mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        Image.new("RGB", (8, 8)).save((place or folder / "test_images") / file)
    metadata = {"num_classes": 3, "test_images_folder_address": images, "ground_truth": 1,
                "transformation": transforms.Compose([transforms.ToTensor()])} | changed
    torch.save({k: v for k, v in metadata.items() if v is not None}, folder / "metadata.pt")
    torch.save(state or new_model(3, NARROW, 3, seed=0).state_dict(), folder / "model.pt")
    return folder


def test_samples_come_in_order_with_their_records(tmp_path):
    write_sample(tmp_path, "b", ground_truth=0)
    write_sample(tmp_path, "a")
    (tmp_path / "notes").mkdir()  # no sample
    (tmp_path / "zoo.json").write_text(json.dumps({"models": {"b": {"attack": "badnets"}}}))
    zoo = read_zoo(tmp_path)
    assert [m.name for m in zoo.models] == ["a", "b"] and zoo.problems == ()
    assert [m.ground_truth for m in zoo.models] == [1, 0]  # the contest's, unturned
    assert [m.record for m in zoo.models] == [None, {"attack": "badnets"}]
    assert zoo.models[0].images_folder == tmp_path / "a/test_images"
    assert isinstance(zoo.models[0].transformation, transforms.Compose)


def test_a_model_is_loaded_for_use(tmp_path):
    model = new_model(3, NARROW, 3, seed=0)
    write_sample(tmp_path, "a", state=model.state_dict())
    found = load_model(read_zoo(tmp_path).models[0])
    x = torch.rand(2, 3, 8, 8)
    assert not found.training and torch.equal(found(x), model.eval()(x))


@pytest.mark.parametrize("address, place", [
    ("test_images", "a/test_images"),              # relative to the sample
    ("a/test_images", "a/test_images"),            # relative to the root
    ("shared", "shared"),                          # one folder for all, in the root
    ("/elsewhere/data/a/pictures", "a/pictures"),  # another machine's: by its last name, in the sample
    ("/elsewhere/data/shared/", "shared"),         # likewise, in the root
    (r"C:\data\pictures", "a/pictures"),           # likewise, from Windows
])
def test_the_images_are_found(tmp_path, address, place):
    write_sample(tmp_path, "a", images=address, place=tmp_path / place)
    (model,) = read_zoo(tmp_path).models
    assert model.images_folder.resolve() == (tmp_path / place).resolve()


def test_an_absolute_address_in_the_zoo_is_taken_as_given(tmp_path):
    write_sample(tmp_path, "b")
    write_sample(tmp_path, "a", images=str(tmp_path / "b/test_images"))
    assert read_zoo(tmp_path).models[0].images_folder == tmp_path / "b/test_images"


@pytest.mark.parametrize("address", ["../outside", "/usr", "missing"])
def test_no_folder_outside_the_zoo_is_read(tmp_path, address):
    root = tmp_path / "zoo"
    write_sample(tmp_path / "outside", "x")
    write_sample(root, "a", images=address)
    (problem,) = read_zoo(root).problems
    assert f"expected an existing folder inside {root}, found {address}" in str(problem)


@pytest.mark.parametrize("changes, message", [
    ({"ground_truth": 2}, "ground_truth: expected 0 (backdoored) or 1 (clean), found 2"),
    ({"ground_truth": "0"}, "ground_truth: expected 0 (backdoored) or 1 (clean), found '0'"),
    ({"ground_truth": True}, "ground_truth: expected 0 (backdoored) or 1 (clean), found True"),
    ({"ground_truth": None}, "expected the key 'ground_truth'"),
    ({"transformation": None}, "expected the key 'transformation'"),
    ({"num_classes": 1}, "num_classes: expected a whole number >= 2, found 1"),
    ({"transformation": 3}, "transformation: expected a torchvision Compose, found int"),
    ({"files": ()}, "test_images: expected at least one image, found none"),
    ({"files": ("0_1.jpg", "7.jpg")}, "7.jpg: expected a name like 12_3.jpg (index, label), found 7.jpg"),
    ({"files": ("0_3.jpg",)}, "0_3.jpg: expected a label in [0, 3), found 3"),
    ({"images": ""}, "test_images_folder_address: expected a folder's path, found ''"),
])
def test_a_broken_sample_is_named_and_the_others_go_on(tmp_path, changes, message):
    write_sample(tmp_path, "a", **changes)
    write_sample(tmp_path, "b")
    zoo = read_zoo(tmp_path)
    assert [m.name for m in zoo.models] == ["b"]
    (problem,) = zoo.problems
    assert message in str(problem) and str(tmp_path / "a") in str(problem)


def test_missing_files_and_foreign_metadata_are_named(tmp_path):
    (write_sample(tmp_path, "a") / "model.pt").unlink()
    (write_sample(tmp_path, "b") / "metadata.pt").unlink()
    torch.save([1], write_sample(tmp_path, "c") / "metadata.pt")
    torch.save(print, write_sample(tmp_path, "d") / "metadata.pt")
    a, b, c, d = map(str, read_zoo(tmp_path).problems)
    assert a.endswith("a: expected a file model.pt, found none")
    assert b.endswith("b: expected a file metadata.pt, found none")
    assert c.endswith("c/metadata.pt: expected a dict, found list")
    assert d.endswith("d/metadata.pt: expected only tensors and torchvision transforms, found builtins.print")


def test_failed_victims_are_left_out_and_named(tmp_path):
    write_sample(tmp_path, "a")
    (tmp_path / "zoo.json").write_text(json.dumps({"models": {"a": {"failed": "ASR 0.5 below 0.95"}}}))
    zoo = read_zoo(tmp_path)
    assert zoo.models == ()
    assert str(zoo.problems[0]).endswith("expected a model above the floors of its zoo, found ASR 0.5 below 0.95")


@pytest.mark.parametrize("content", ["{", "[]", '{"models": [1]}', '{"models": {"a": 1}}'])
def test_a_broken_record_file_is_refused(tmp_path, refuses, content):
    write_sample(tmp_path, "a")
    (tmp_path / "zoo.json").write_text(content)
    with refuses(r"zoo\.json: expected"):
        read_zoo(tmp_path)


def test_a_root_without_samples_is_refused(tmp_path, refuses):
    with refuses("expected folders with model.pt and metadata.pt, found none"):
        read_zoo(tmp_path)
    with refuses("nowhere: expected a folder of samples, found no such folder"):
        read_zoo(tmp_path / "nowhere")


def test_a_wrong_class_count_and_another_architecture_are_named(tmp_path, refuses):
    write_sample(tmp_path, "a", num_classes=4)
    write_sample(tmp_path, "b", state={"fc.weight": torch.zeros(3, 3)})
    a, b = read_zoo(tmp_path).models
    with refuses(r"a/model\.pt: expected 4 classes as in metadata\.pt, found 3"):
        load_model(a)
    with refuses(r"b/model\.pt: expected the key 'conv1\.weight' of a PreActResNet18"):
        load_model(b)


def test_labels_are_read_off_the_names(tmp_path):
    write_sample(tmp_path, "a", files=("10_2.jpg", "9_0.jpg", "3_1.png"))
    found = labelled_images(tmp_path / "a/test_images", 3)
    assert [(path.name, label) for path, label in found] == [("10_2.jpg", 2), ("3_1.png", 1), ("9_0.jpg", 0)]
