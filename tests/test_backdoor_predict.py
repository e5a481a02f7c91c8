"""The organizers' function and the verdict behind it; `test_detection.py` tests the detector itself."""
import copy

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
from PIL import Image

from backdoor_detection import detection, predict
from backdoor_detection.detection import SEED, Detection, DetectorConfig, judge
from backdoor_detection.predict import backdoor_model_detector
from data.model_zoo import BACKDOORED, CLEAN, load_model, read_zoo
from data.preact_resnet import new_model
from submit.dev_splits import dev_split

TO_TENSOR = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("KIT_DEVICE", "cpu")


@pytest.fixture
def images(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{i}_{i % 6}.png")
    return tmp_path


def a_model(strong=None):
    """With `strong` that class wins by far whatever the image is: the plainest thing a margin can show."""
    model = new_model(10, (2, 4, 4, 8), 3, seed=0).eval()
    if strong is not None:
        model.linear.bias.data[strong] += 5
    return model


@pytest.mark.parametrize("backdoored", [True, False])
def test_the_organizers_function_says_1_for_backdoored(images, monkeypatch, backdoored):
    monkeypatch.setattr(predict, "judge", lambda *_: Detection(backdoored, 0.5, torch.zeros(4), 0))
    assert backdoor_model_detector(a_model(), 10, str(images), TO_TENSOR) is int(backdoored)


def test_the_organizers_function_from_end_to_end(images):
    assert backdoor_model_detector(a_model(strong=7), 10, str(images), TO_TENSOR) == 1
    assert backdoor_model_detector(a_model(), 10, str(images), TO_TENSOR) == 0


def test_the_verdict_has_fixed_numbers_and_a_fixed_draw(images, monkeypatch):
    seen = []

    def watched(*args, generator):
        seen.append((args, generator.initial_seed()))
        return Detection(True, 0.0, torch.zeros(10), 0)

    monkeypatch.setattr(detection, "detect", watched)
    model = a_model()
    judge(model, 10, images, TO_TENSOR)
    (given, *rest), seed = seen[0]
    assert rest == [10, images, TO_TENSOR, DetectorConfig()] and seed == SEED
    assert given is not model and next(given.parameters()).device.type == "cpu"


def test_the_verdict_leaves_the_model_where_it_is(images, monkeypatch):
    """The chosen device stands for another one: `meta` holds no values, so only a moved copy would show it."""
    model, seen = a_model().train(), []
    state = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(detection, "chosen_device", lambda: torch.device("meta"))
    monkeypatch.setattr(detection, "detect", lambda given, *_, **__: seen.append(next(given.parameters()).device.type))
    judge(model, 10, images, TO_TENSOR)
    assert seen == ["meta"] and model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_equal_calls_give_equal_verdicts(images):
    a, b = (judge(a_model(), 10, images, TO_TENSOR) for _ in range(2))
    assert torch.equal(a.margins, b.margins) and a.p_value == b.p_value


def test_the_built_in_zoo_is_whole():
    folder = dev_split("backdoor", 0)
    zoo = read_zoo(folder)
    assert zoo.problems == () and {m.ground_truth for m in zoo.models} == {BACKDOORED, CLEAN}
    assert all(m.record["ACC"] > 1.5 / m.num_classes for m in zoo.models)  # it has learned
    assert all((m.record["ASR"] is None) == (m.ground_truth == CLEAN) for m in zoo.models)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 15 * 2**20
    assert all(load_model(m).linear.out_features == m.num_classes for m in zoo.models)
