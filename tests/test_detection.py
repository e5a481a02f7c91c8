import copy
import random
import shutil
import time

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
from PIL import Image
from torch import nn

from backdoor_detection import detection
from backdoor_detection.detection import TRIES, DetectorConfig, Plan, detect, standing_out, standing_out_freely
from backdoor_detection.outlier import deleted_residual_p_value, fisher_p_value, outlier_p_value
from backdoor_detection.universal import Change, Reach, UniversalConfig
from data.preact_resnet import new_model

TO_TENSOR = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
DEADLINE = 55.0
EVERYWHERE = Change(0, 0, 0.1)


def write_images(folder, count=12, size=(8, 8), labels=lambda i: i % 4, name="{i}_{label}.png"):
    folder.mkdir(exist_ok=True)
    drawn = np.random.default_rng(0)
    for i in range(count):
        pixels = drawn.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name.format(i=i, label=labels(i)))
    return folder


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "test_images")


class Linear(nn.Module):
    """Logits linear in the pixels, rows of equal length but one: a small universal shift reaches that class."""

    def __init__(self, classes, strong=None, size=8):
        super().__init__()
        rows = torch.randn(classes, 3 * size * size, generator=torch.Generator().manual_seed(classes))
        rows = rows / rows.norm(dim=1, keepdim=True)
        if strong is not None:
            rows[strong] *= 60
        self.rows = nn.Parameter(rows)

    def forward(self, x):
        return x.flatten(1) @ self.rows.T


def judged(model, folder, classes=4, transformation=TO_TENSOR, seed=0, clock=time.perf_counter, **config):
    config = DetectorConfig(**{"reach": UniversalConfig(steps=5, changes=(EVERYWHERE,)), **config})
    return detect(model, classes, folder, transformation, config, generator=torch.Generator().manual_seed(seed),
                  clock=clock)


def a_model(classes=4, channels=3):
    return new_model(classes, (2, 4, 4, 8), channels, seed=0).eval()


@pytest.mark.parametrize("classes", [3, 10, 43])
def test_a_class_that_one_small_shift_reaches_is_found(images, classes):
    target = classes - 2
    found = judged(Linear(classes, target), images, classes)
    plain = judged(Linear(classes), images, classes)
    assert (found.backdoored, found.suspect) == (True, target) and found.p_value < 0.05
    assert not plain.backdoored and plain.p_value > 0.05
    assert found.margins.shape == (classes,) and found.margins.argmax() == target
    assert len(found.kept) == min(classes, 20) and target in found.kept
    if classes <= 20:
        assert found.p_value == pytest.approx(deleted_residual_p_value(found.margins, classes), rel=1e-6)
    assert (found.images, found.side, found.steps, found.steps_asked) == (12, 8, 5, 5)


def test_a_preact_resnet_with_a_strong_class_is_found(images):
    model = a_model(10)
    assert not judged(model, images, 10).backdoored
    model.linear.bias.data[7] += 5
    found = judged(model, images, 10)
    assert found.backdoored and found.suspect == 7 and found.p_value < 0.001


def test_free_features_add_their_say_where_a_network_can_be_cut(images):
    model = a_model(10)
    model.linear.bias.data[7] += 1
    found = judged(model, images, 10)
    assert len(found.p_values) == 2 and found.p_value == pytest.approx(fisher_p_value(found.p_values))
    assert found.p_values[0] == deleted_residual_p_value(found.margins, 10)
    plain = judged(Linear(10), images, 10)
    assert len(plain.p_values) == 1 and plain.p_value == pytest.approx(plain.p_values[0])
    cut = [judged(model, images, 10, clock=leap_after(calls)) for calls in range(15, 32)]
    seen = [(f.steps, len(f.p_values)) for f in cut]
    assert seen == sorted(seen) and {(5, 1), (5, 2)} < set(seen) and seen[0][0] < 5  # all or nothing of the features
    assert all(f.p_value == pytest.approx(f.p_values[0]) for f in cut if len(f.p_values) == 1)


def leap_after(calls):
    """A clock that stands, and after some calls is beyond every deadline."""
    asked = []
    return lambda: 1000.0 + (DEADLINE * 2 if asked.append(None) or len(asked) > calls else 0.0)


def test_free_features_are_judged_by_the_reports_null():
    stages = torch.tensor([[1.0, 2, 3, 4, 9]])
    found = Reach(stages, (0, 1, 2, 3), (0, 2, 3), 3, 3)  # class 4 was not followed
    p_value, suspect = standing_out_freely(torch.tensor([0.0, 9.0, 1.0, 2.0]), found)
    assert suspect == 1 and p_value == outlier_p_value(torch.tensor([9.0, 0.0, 1.0, 2.0]), 5)
    assert standing_out_freely(torch.tensor([0.0, float("nan"), 1.0, 2.0]), found)[0] == 1.0
    two = Reach(stages, (0, 1), (0, 1), 3, 3)
    assert standing_out_freely(torch.tensor([0.0, 9.0]), two) == (1.0, 1)


def test_two_classes_are_never_told_apart(images):
    found = judged(Linear(2, 1), images, 2)
    assert (found.backdoored, found.p_value, found.kept) == (False, 1.0, (0, 1)) and found.margins.isfinite().all()


def test_images_of_one_class_alone_do_not_make_it_stand_out(tmp_path):
    """Bug: with no image of another class its margin was 0, far above margins that all are negative."""
    folder = write_images(tmp_path, labels=lambda i: 3)
    model = a_model(10)
    model.linear.bias.data[5] += 50  # all others lie far below 0
    found = judged(model, folder, 10)
    assert 3 not in found.kept and len(found.kept) == 9 and found.suspect == 5
    found = judged(Linear(3), write_images(tmp_path / "two", 1, labels=lambda i: 1), 3)
    assert found.kept == (0, 2) and found.p_value == 1.0  # fewer than three classes were followed


def test_a_margin_that_is_no_number_raises_no_alarm(images):
    model = Linear(4, 1)
    model.rows.data[2, 0] = float("nan")
    assert judged(model, images).p_value == 1.0 and not judged(model, images).backdoored


@pytest.mark.parametrize("name", ["picture-{i}.png", "{i}_99{label}.png"])
def test_without_usable_names_the_network_labels_the_images(tmp_path, name):
    """Unlabelled images, and labels that the network does not have."""
    model = a_model(4)
    unnamed = write_images(tmp_path / "unnamed", name=name)
    pixels = torch.stack([TO_TENSOR(Image.open(path)) for path in sorted(unnamed.iterdir())])
    seen = model(pixels).argmax(1).tolist()
    paths = sorted(unnamed.iterdir())
    named = tmp_path / "named"
    named.mkdir()
    for i, path in enumerate(paths):
        shutil.copy(path, named / f"{i:02d}_{seen[i]}.png")
    a, b = judged(model, unnamed), judged(model, named)
    torch.testing.assert_close(a.margins, b.margins)
    assert a.kept == b.kept


def test_images_are_drawn_alike_from_all_labels(tmp_path):
    folder = write_images(tmp_path, 60, labels=lambda i: 0 if i < 50 else i % 4)
    assert judged(Linear(4), folder).images == UniversalConfig().images
    a, b, c = (judged(Linear(4), folder, seed=seed).margins for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_global_random_states_stay(images):
    crop = transforms.Compose([transforms.RandomCrop(8, padding=4), *TO_TENSOR.transforms])
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    a, b, c = (judged(a_model(), images, transformation=crop, seed=seed).margins for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)  # a random transform follows the generator
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_the_callers_model_and_transform_stay(images):
    model = a_model().train()
    resize = transforms.Compose([transforms.Resize((16, 16)), *TO_TENSOR.transforms])
    state, shown = copy.deepcopy(model.state_dict()), str(resize)
    assert judged(model, images, transformation=resize).side == 16
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert str(resize) == shown


def test_the_bound_is_measured_in_pixel_values(images):
    """The normalisation changes neither what is reached nor the verdict where the network undoes it."""
    class Undone(Linear):
        def forward(self, x):
            return super().forward((x * 0.1 + 0.3) * 2 - 1)

    other = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.3,) * 3, (0.1,) * 3)])
    a, b = judged(Linear(4), images), judged(Undone(4), images, transformation=other)
    torch.testing.assert_close(a.margins, b.margins, rtol=1e-3, atol=1e-4)


def test_one_image_and_greyscale_images_do(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "0_1.png")
    grey = transforms.Compose([transforms.Grayscale(), transforms.ToTensor()])
    for channels, transformation in [(3, TO_TENSOR), (3, grey), (1, TO_TENSOR), (1, grey)]:
        found = judged(a_model(channels=channels), tmp_path, transformation=transformation)
        assert found.margins.isfinite().all() and found.images == 1 and found.kept == (0, 2, 3)


def test_unequal_images_do_and_unreadable_ones_are_named(images, refuses):
    Image.new("RGB", (6, 8)).save(images / "90_0.png")
    assert judged(a_model(), images).margins.isfinite().all()
    (images / "90_0.png").write_bytes(b"no image")
    with refuses(r"90_0\.png: expected a readable image"):
        judged(a_model(), images)


def test_wrong_input_is_named(images, tmp_path, refuses):
    with refuses("num_classes: expected 4, as the model puts out, found 10"):
        judged(a_model(), images, 10)
    for classes in (3, 5):  # a network without a layer `linear` shows its classes when it is run
        with refuses(f"num_classes: expected 4, as the model puts out, found {classes}"):
            judged(Linear(4), images, classes)
    with refuses("num_classes: expected >= 2, found 1"):
        judged(Linear(4), images, 1)
    with refuses("nowhere: expected a folder of clean images, found no such folder"):
        judged(a_model(), tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with refuses("empty: expected at least one image, found none"):
        judged(a_model(), tmp_path / "empty")
    with refuses(r"expected a transform that gives a \(C, H, W\) tensor, found Image"):
        judged(a_model(), images, transformation=transforms.Compose([]))
    with refuses("expected 2 channels, as the model takes, found 3"):
        judged(a_model(channels=2), images)
    with refuses(r"DetectorConfig.alarm: expected in \(0, 1\), found 1"):
        DetectorConfig(alarm=1)
    with refuses("DetectorConfig.deadline_s: expected > 0 seconds, found 0"):
        DetectorConfig(deadline_s=0)


class Clock:
    """Moves only when told to; a copied network keeps it."""

    def __init__(self):
        self.now, self.starts = 1000.0, []

    def __call__(self):
        return self.now

    def __deepcopy__(self, memo):
        return self


class Timed(Linear):
    """Takes `seconds` an image of 32 pixels a side, `slower` times that where they are several."""

    def __init__(self, clock, seconds, slower=1.0, classes=10):
        super().__init__(classes, size=4)
        self.clock, self.seconds, self.slower = clock, seconds, slower

    def forward(self, x):
        self.clock.starts.append(self.clock.now - 1000)
        share = x.shape[-1] ** 2 / 32 ** 2
        self.clock.now += len(x) * share * self.seconds * (1 if len(x) == 1 else self.slower)
        return super().forward(nn.functional.adaptive_avg_pool2d(x, 4))


@pytest.fixture(scope="module")
def large_images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("large"), 6, (64, 64))


REACH = UniversalConfig(images=6, steps=8, kept=8, changes=(EVERYWHERE,))


def timed(folder, seconds, slower=1.0, classes=10, **config):
    clock = Clock()
    found = judged(Timed(clock, seconds, slower, classes), folder, classes, clock=clock,
                   **{"deadline_s": DEADLINE, "reach": REACH, **config})
    assert found.seconds == pytest.approx(clock.now - 1000)
    return found, clock


def test_a_plan_gets_cheaper_as_time_gets_short(large_images):
    found = [timed(large_images, seconds)[0] for seconds in (1e-3, 2e-2, 5e-2, 0.2, 0.4)]
    assert (found[0].images, found[0].side, found[0].steps, len(found[0].kept)) == (6, 64, 8, 8)
    costs = [f.images * f.side ** 2 * f.steps for f in found]
    assert costs == sorted(costs, reverse=True) and costs[0] > 20 * costs[-1]
    assert all(f.seconds < 0.7 * DEADLINE + 8 * 0.5 and f.steps >= 2 and len(f.kept) >= 5 for f in found)
    assert found[-1].side == 32 and found[-1].steps_asked == 8


@pytest.mark.parametrize("classes", [4, 10, 43])
def test_a_plan_counts_what_is_done(large_images, classes):
    found, clock = timed(large_images, 1e-5, classes=classes)
    counted = Plan(6, 1, 8, 8, 1, 0).passes(classes) * 4 * 1e-5  # four times 32x32 pixels
    assert clock.now - 1000 - (TRIES + 6) * 4 * 1e-5 == pytest.approx(counted)  # timed before: one image, all six
    assert found.steps == 8


@pytest.mark.parametrize("slower", [2.0, 5.0, 20.0, 100.0])
@pytest.mark.parametrize("seconds", [1e-2, 3e-2, 0.1])
def test_a_network_slower_than_timed_is_cut_off_in_time(large_images, seconds, slower):
    found, clock = timed(large_images, seconds, slower, classes=43)
    if slower >= 20:
        assert found.steps < timed(large_images, seconds, classes=43)[0].steps
    assert max(clock.starts) < DEADLINE and found.margins.isfinite().all()
    assert found.seconds < DEADLINE or slower > 10  # the first block of a network 20 times as slow may end later
    assert found.seconds < DEADLINE + slower * 0.1 * DEADLINE


def test_a_pass_that_had_to_wait_does_not_cut_the_plan(large_images):
    """Bug: on a busy machine two timed passes waited for their turn, and the verdict was made of next to nothing."""
    class Waiting(Timed):
        def forward(self, x):
            self.clock.now += 0.2 if len(self.clock.starts) < 2 else 0.0
            return super().forward(x)

    clock = Clock()
    found = judged(Waiting(clock, 1e-4), large_images, 10, clock=clock, deadline_s=DEADLINE, reach=REACH)
    assert (found.images, found.side, found.steps) == (6, 64, 8)


def test_no_block_starts_after_a_jump_of_the_clock(large_images):
    """The clock leaps beyond the deadline while the images of one block are in the network."""
    clock = Clock()
    model = Timed(clock, 1e-4)
    calls = []

    def leaping():
        calls.append(None)
        if len(calls) == 20:
            clock.now += 2 * DEADLINE
        return clock.now

    found = judged(model, large_images, 10, clock=leaping, deadline_s=DEADLINE, reach=REACH)
    assert 0 <= found.steps < 8 and max(clock.starts) < DEADLINE and found.margins.isfinite().all()


def test_without_time_the_answer_is_clean(large_images):
    found, clock = timed(large_images, 100.0)
    assert (found.backdoored, found.p_value, found.steps) == (False, 1.0, 0)
    assert found.margins.tolist() == [0.0] * 10 and len(clock.starts) == 2  # only the two timed images
    assert found.kept == tuple(range(10)) and found.suspect == 0


def test_one_step_a_change_stays_as_asked(large_images):
    for seconds in (1e-4, 0.2):
        found = timed(large_images, seconds, reach=UniversalConfig(images=6, steps=1))[0]
        assert found.steps == len(UniversalConfig().changes)


def test_the_mean_over_the_changes_is_judged(images):
    found = judged(Linear(10, 3), images, 10, reach=UniversalConfig(steps=2))
    assert found.suspect == 3 and found.backdoored and found.steps == found.steps_asked == 10
    stages = torch.tensor([[1.0, 2, 3, 4, 9], [0, 1, 0, 1, 0], [1, 2, 1, 3, 4]])
    p_value, suspect = standing_out(Reach(stages, (0, 1, 2, 3, 4), (0, 1, 2, 3), 3, 3))
    assert suspect == 4 and p_value == deleted_residual_p_value(stages.mean(0), 5)
    without = standing_out(Reach(stages, (0, 1, 2, 4), (0, 1, 2), 3, 3))  # class 3 was not followed
    assert without == (deleted_residual_p_value(stages.mean(0)[[0, 1, 2, 4]], 5), 4)


def test_small_images_are_not_shrunk(images):
    assert timed(images, 1.0)[0].side == 8


def test_on_a_graphics_card_the_clock_waits_for_the_work(monkeypatch):
    """Bug: blocks are queued there, and without waiting they all seemed done at once."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clock = Clock()
    device = torch.device("cuda", 1)
    late = detection._Deadline(1010.0, device, clock)
    assert not late() and waited == [device]
    clock.now += 3
    assert not late()  # 1003, the longest block 3 seconds: another may take 4.5
    clock.now += 3
    assert late() and waited == [device] * 3
