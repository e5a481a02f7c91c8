import copy
import random

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
from PIL import Image

from data.preact_resnet import new_model
from defense import repair as shipping
from defense.activeness_tuning import TuningConfig
from defense.folder_images import read_labelled
from defense.predict import repair_model
from defense.repair import repair
from defense.tsbd import TSBDConfig
from defense.unlearning import UnlearningConfig

TO_TENSOR = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
QUICK = TSBDConfig(neurons=0.3, unlearning=UnlearningConfig(rate=1e-2, epochs=2),
                   tuning=TuningConfig(epochs=2, steps=0))


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "test_images"
    folder.mkdir()
    pixels = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(pixels.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i + 7}_{i % 3}.png")
    return folder


def a_model():
    return new_model(3, (2, 2, 4, 4), 3, seed=0).eval()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_files_become_tensors_in_the_order_of_their_names(images):
    found, labels = read_labelled(images, TO_TENSOR, 3, generator=drawn())
    names = ["10_0.png", "11_1.png", "12_2.png", "7_0.png", "8_1.png", "9_2.png"]
    assert torch.equal(found, torch.stack([TO_TENSOR(Image.open(images / name)) for name in names]))
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_random_transform_is_seeded_and_leaves_the_global_generators(images):
    jitter = transforms.Compose([transforms.RandomCrop(8, padding=4), transforms.ToTensor()])
    before, python = torch.get_rng_state(), random.getstate()
    one, again, other = (read_labelled(images, jitter, 3, generator=drawn(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == python


def test_bad_folders_and_transforms_are_named(images, tmp_path, refuses):
    def refused(pattern, transformation=TO_TENSOR, folder=images, classes=3):
        with refuses(pattern):
            read_labelled(folder, transformation, classes, generator=drawn())

    refused(r"none: expected a folder of clean images, found no such folder", folder=tmp_path / "none")
    refused(r"11_1.png: expected a label in \[0, 1\), found 1", classes=1)
    refused(r"10_0.png: expected a transform that takes this image, found RuntimeError: no",
            lambda image: (_ for _ in ()).throw(RuntimeError("no")))
    refused(r"10_0.png: expected a transform that gives a \(C, H, W\) tensor of floating point, found Image",
            lambda image: image)
    refused(r"of floating point, found \(3, 8, 8\) torch.uint8", transforms.PILToTensor())
    refused(r"10_0.png: expected a transform that gives finite numbers, found NaN or infinity",
            lambda image: TO_TENSOR(image) / 0)
    Image.new("RGB", (9, 8)).save(images / "8_1.png")
    refused(r"8_1.png: expected the shape \(3, 8, 8\) of 10_0.png, found \(3, 8, 9\)")
    (images / "9_2.png").write_bytes(b"no image")
    refused(r"9_2.png")
    Image.new("RGB", (8, 8)).save(images / "picture.png")
    refused(r"picture.png: expected a name like 12_3.jpg \(index, label\), found picture.png")


def test_a_model_is_repaired_with_the_shipped_settings(images, monkeypatch):
    monkeypatch.setenv("KIT_DEVICE", "cpu")
    assert shipping.shipped_config().tuning.batch == shipping.shipped_config().unlearning.batch == shipping.BATCH
    monkeypatch.setattr(shipping, "shipped_config", lambda: QUICK)
    model = a_model()
    before = copy.deepcopy(model)
    repaired = repair_model(model, 3, str(images), TO_TENSOR)
    assert same(model, before) and not same(repaired, before) and not repaired.training
    assert same(repaired, repair_model(model, 3, images, TO_TENSOR))
    assert all(p.requires_grad for p in repaired.parameters())


def test_the_limit_is_kept_from_the_call_on(images):
    class Clock:
        seconds = 0.0

        def __call__(self):
            self.seconds += 1.0
            return self.seconds

    clock = Clock()
    slow = TSBDConfig(unlearning=UnlearningConfig(rate=1e-9), tuning=TuningConfig(epochs=10**6))

    def late(image):
        clock.seconds += 2  # reading takes 12 s
        return TO_TENSOR(image)

    found = repair(a_model(), 3, images, late, slow, generator=drawn(), clock=clock)
    assert not found.complete and not found.failed and 50 < clock.seconds <= 60 and found.seconds <= 60


def test_bad_numbers_are_named(images, refuses):
    with refuses(r"num_classes: expected 3, as the model has outputs, found 4"):
        repair(a_model(), 4, images, TO_TENSOR, QUICK, generator=drawn())
    with refuses(r"limit_s: expected > 0 seconds, found 0"):
        repair(a_model(), 3, images, TO_TENSOR, QUICK, generator=drawn(), limit_s=0)
