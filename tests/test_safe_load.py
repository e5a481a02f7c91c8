import os
import pickle
import zipfile

import pytest
import torch
import torchvision.transforms as transforms
from torch import nn

from data.safe_load import load_state, load_untrusted

INTERPOLATION = transforms.InterpolationMode.BICUBIC


class Payload:
    """Creates `path` when unpickled by a reader that runs what it reads."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_the_payload_works_on_a_careless_reader(tmp_path):
    torch.save(Payload(tmp_path / "ran"), tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"num_classes": x}, lambda x: {"conv1.weight": [x]}])
def test_a_call_is_named_and_not_run(tmp_path, refuses, wrap):
    torch.save(wrap(Payload(tmp_path / "ran")), tmp_path / "model.pt")
    with refuses(r"model\.pt: expected only tensors and torchvision transforms, found posix\.system"):
        load_untrusted(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_bare_pickle_is_named_and_not_run(tmp_path, refuses, protocol):
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=protocol))
    with refuses(r"model\.pt: expected only tensors and torchvision transforms, found posix\.system"):
        load_untrusted(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


def test_metadata_with_every_kind_of_transform_comes_back(tmp_path):
    steps = [transforms.Resize((32, 32), INTERPOLATION), transforms.CenterCrop(32), transforms.Grayscale(3),
             transforms.Pad(2), transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
             transforms.ToTensor(), transforms.Normalize((0.5, 0.4, 0.3), [0.1, 0.2, 0.3])]
    metadata = {"num_classes": 10, "ground_truth": 0, "test_images_folder_address": "a/b",
                "transformation": transforms.Compose(steps)}
    torch.save(metadata, tmp_path / "metadata.pt")
    found = load_untrusted(tmp_path / "metadata.pt")
    assert str(found.pop("transformation")) == str(metadata.pop("transformation"))
    assert found == metadata


def test_the_list_is_not_left_open(tmp_path):
    torch.save(transforms.ToTensor(), tmp_path / "a.pt")
    before = set(torch.serialization.get_safe_globals())
    load_untrusted(tmp_path / "a.pt")
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("value, named", [
    (nn.Sequential(nn.Linear(2, 2)), "torch.nn.modules.container.Sequential"),
    (transforms.Lambda(print), "torchvision.transforms.transforms.Lambda"),
    (transforms.Compose([os.getcwd]), "posix.getcwd"),
])
def test_other_classes_are_named(tmp_path, refuses, value, named):
    torch.save(value, tmp_path / "model.pt")
    with refuses(f"found .*{named}"):
        load_untrusted(tmp_path / "model.pt")


def test_an_old_torch_is_refused(tmp_path, refuses, monkeypatch):
    torch.save({}, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu124")
    with refuses(r"^torch: expected >= 2\.6 to read files from strangers, found 2\.5\.1\+cu124$"):
        load_untrusted(tmp_path / "a.pt")


def test_missing_truncated_foreign_and_empty_files_are_named(tmp_path, refuses):
    path = tmp_path / "model.pt"
    with refuses(r"model\.pt: expected a file written by torch\.save, found no such file"):
        load_untrusted(path)
    torch.save({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"not a model at all"):
        path.write_bytes(content)
        with refuses(r"model\.pt: expected a whole file .*, found a truncated or other file"):
            load_untrusted(path)


def test_a_zip_of_something_else_is_named(tmp_path, refuses):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with refuses(r"model\.pt: expected a whole file written by torch\.save, found \w+"):
        load_untrusted(tmp_path / "model.pt")


def test_a_compressed_archive_is_refused(tmp_path, refuses):
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, \
            zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry.filename))
    with refuses(r"b\.pt: expected an uncompressed archive"):
        load_untrusted(tmp_path / "b.pt")


def test_a_false_shape_is_named(tmp_path, refuses):
    torch.save({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "model.pt")
    with refuses(r"model\.pt 'a': expected at most the 4 bytes stored, found shape \(1048576, 1048576\)"):
        load_state(tmp_path / "model.pt")


def test_a_storage_that_declares_more_than_it_has_is_named(tmp_path, refuses):
    torch.save({"a": torch.zeros(4)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for entry in old.infolist():  # only the bytes of the storage are cut away
            content = old.read(entry.filename)
            new.writestr(entry.filename, b"" if entry.filename.endswith("data/0") else content)
    with refuses(r"b\.pt"):
        load_state(tmp_path / "b.pt")


@pytest.mark.parametrize("state, message", [
    ([torch.zeros(1)], "expected a state dict with entries, found list of 1"),
    ({}, "expected a state dict with entries, found dict of 0"),
    ({"state_dict": {"a": torch.zeros(1)}}, "'state_dict': expected a tensor, found dict"),
    ({"a": torch.zeros(1), "b": 3}, "'b': expected a tensor, found int"),
    ({1: torch.zeros(1)}, "1: expected a name, found int"),
    ({"a": torch.tensor([0.0, float("nan")])}, "'a': expected finite numbers, found NaN or infinity"),
    ({"a": torch.zeros(2, device="meta")}, "'a': expected a dense tensor, found torch.strided on meta"),
    pytest.param({"a": torch.eye(2).to_sparse()}, "'a': expected a dense tensor, found torch.sparse_coo",
                 marks=pytest.mark.filterwarnings("ignore:Validating sparse tensor")),
])
def test_what_is_no_state_dict_is_named(tmp_path, refuses, state, message):
    torch.save(state, tmp_path / "model.pt")
    with refuses(message):
        load_state(tmp_path / "model.pt")


def test_a_state_dict_comes_back(tmp_path):
    state = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).state_dict()
    torch.save(state, tmp_path / "model.pt")
    found = load_state(tmp_path / "model.pt")
    assert list(found) == list(state)
    assert all(torch.equal(found[key], state[key]) for key in state)
