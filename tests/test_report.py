import copy
import random
import shutil

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
from PIL import Image
from torch import nn

from backdoor_detection.margins import ReportConfig
from backdoor_detection.outlier import outlier_p_value
from backdoor_detection.report import detect
from data.preact_resnet import new_model

NARROW = (2, 4, 4, 8)
QUICK = ReportConfig(images=3, steps=4, warm_up=1, size=16)
TO_TENSOR = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "test_images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}_{i % 4}.png")
    return folder


def judged(model, folder, transformation=TO_TENSOR, config=QUICK, seed=0, classes=4):
    return detect(model, classes, folder, transformation, config,
                  generator=torch.Generator().manual_seed(seed))


def a_model(classes=4, channels=3):
    return new_model(classes, NARROW, channels, seed=0).eval()


def with_a_strong_class(model, target):
    """One class wins by far whatever the features are: the plainest thing a margin can show."""
    model = copy.deepcopy(model)
    model.linear.bias.data[target] += 5
    return model


def test_a_class_that_stands_out_is_found(images):
    found = judged(with_a_strong_class(a_model(10), 7), images, classes=10)
    plain = judged(a_model(10), images, classes=10)
    assert (found.backdoored, found.suspect) == (True, 7) and not plain.backdoored
    assert found.p_value < 0.001 < 0.08 < plain.p_value
    assert found.margins.shape == (10,) and found.p_value == outlier_p_value(found.margins)


def test_equal_seeds_give_equal_margins_and_other_seeds_others(images):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    a, b, c = (judged(a_model(), images, seed=seed).margins for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_a_random_transform_follows_the_generator(images):
    crop = transforms.Compose([transforms.RandomCrop(8, padding=4), *TO_TENSOR.transforms])
    before = torch.get_rng_state()
    a, b = (judged(a_model(), images, crop).margins for _ in range(2))
    assert torch.equal(a, b) and torch.equal(torch.get_rng_state(), before)


def test_the_listing_order_of_the_disk_does_not_matter(images, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in sorted(images.iterdir(), reverse=True):
        shutil.copy(path, other)
    assert torch.equal(judged(a_model(), images).margins, judged(a_model(), other).margins)


def test_the_callers_model_and_transform_stay(images):
    model = a_model().train()
    resize = transforms.Compose([transforms.Resize((32, 32)), *TO_TENSOR.transforms])
    state, shown = copy.deepcopy(model.state_dict()), str(resize)
    judged(model, images, resize)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert str(resize) == shown


def test_one_image_and_greyscale_images_do(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "0_1.png")
    assert judged(a_model(), tmp_path).margins.isfinite().all()
    grey = transforms.Compose([transforms.Grayscale(), transforms.ToTensor()])
    assert judged(a_model(channels=1), tmp_path, grey).margins.isfinite().all()
    assert judged(a_model(channels=1), tmp_path).margins.isfinite().all()
    assert judged(a_model(), tmp_path, grey).margins.isfinite().all()


def test_wrong_input_is_named(images, tmp_path, refuses):
    with refuses("num_classes: expected 4, as the model puts out, found 10"):
        judged(a_model(), images, classes=10)
    with refuses("num_classes: expected >= 2, found 1"):
        judged(a_model(), images, classes=1)
    with refuses("nowhere: expected a folder of clean images, found no such folder"):
        judged(a_model(), tmp_path / "nowhere")
    with refuses("expected at least one image, found none"):
        judged(a_model(), tmp_path)
    with refuses("model: expected a PreActResNet18 with 'conv1', found Linear"):
        judged(nn.Linear(2, 4), images)
    with refuses(r"expected a transform that gives a \(C, H, W\) tensor, found Image"):
        judged(a_model(), images, transforms.Compose([]))
    with refuses(r"expected 2 channels, as the model takes, found 3"):
        judged(a_model(channels=2), images)


def test_unequal_images_do_and_unreadable_ones_are_named(images, refuses):
    Image.new("RGB", (6, 8)).save(images / "9_0.png")
    assert judged(a_model(), images, config=ReportConfig(images=6, steps=2, warm_up=1)).margins.isfinite().all()
    (images / "9_0.png").write_bytes(b"no image")
    with refuses(r"9_0\.png: expected a readable image"):
        judged(a_model(), images, config=ReportConfig(images=6, steps=2, warm_up=1))


def test_the_reports_numbers():
    config = ReportConfig()
    assert (config.images, config.steps, config.size, config.alarm) == (30, 100, 128, 0.08)
