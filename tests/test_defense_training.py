import math

import pytest
import torch
from torch import nn

from data.preact_resnet import new_model
from defense.deadline import Deadline
from defense.training import (
    Shift,
    Training,
    batch_count,
    epoch_batches,
    predicted_classes,
    run_epochs,
    statistics_kept,
    training_mode,
)


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


class Clock:
    """Shows `seconds`; a test moves it."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


@pytest.mark.parametrize(("count", "batch", "sizes"), [
    (1, 256, [1]), (3, 2, [3]), (5, 2, [3, 2]), (7, 3, [3, 2, 2]), (10, 256, [10]), (513, 256, [171, 171, 171])])
def test_batches_hold_every_image_once_and_none_is_alone(count, batch, sizes):
    parts = epoch_batches(count, batch, generator=drawn())
    assert [len(part) for part in parts] == sizes and batch_count(count, batch) == len(sizes)
    assert torch.cat(parts).sort().values.tolist() == list(range(count))


def run(model, step, epochs=3, batch=4, done=None, deadline=None, augment=None):
    images, labels = torch.arange(8.0).view(8, 1, 1, 1), torch.arange(8)
    given = Training(images, labels, drawn(), augment, deadline or Deadline())
    return run_epochs(model, given, step, epochs=epochs, batch=batch, done=done)


def test_epochs_give_their_mean_losses_and_end_when_done():
    seen = []

    def step(images, labels):
        assert images.flatten().tolist() == labels.tolist()
        seen.append(labels.tolist())
        return images.mean()

    found = run(nn.Linear(1, 1), step)
    assert found.losses == (3.5,) * 3 and found.steps == 6 and found.finite and found.complete
    assert sorted(seen[0] + seen[1]) == list(range(8)) and seen[:2] != seen[2:4]
    assert run(nn.Linear(1, 1), step, done=lambda: True).steps == 2


@pytest.mark.parametrize("broken", ["loss", "weight", "statistic"])
def test_a_number_that_is_none_brings_the_epoch_before_back(broken):
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    steps = []

    def step(images, labels):
        steps.append(1)
        bad = math.nan if len(steps) >= 5 else 1.0
        with torch.no_grad():
            model[0].weight.fill_(len(steps) * (bad if broken == "weight" else 1.0))
            model[1].running_var.fill_(bad if broken == "statistic" else 1.0)
        return torch.tensor(bad if broken == "loss" else 1.0)

    found = run(model, step)
    assert model[0].weight.item() == 4 and model[1].running_var.item() == 1
    assert (found.finite, found.complete, found.losses) == (False, False, (1.0, 1.0))


def test_the_deadline_ends_an_epoch_in_the_middle():
    clock = Clock()

    def step(images, labels):
        clock.seconds += 10
        return torch.tensor(1.0)

    found = run(nn.Linear(1, 1), step, deadline=Deadline(46, clock=clock))
    assert found.steps == 4 and not found.complete and found.finite and len(found.losses) == 2
    # after three steps: 30 + 1.5 * 10 <= 46; after four: 55 > 46
    assert clock.seconds == 140


def test_parts_of_a_deadline_share_what_they_learn():
    clock = Clock()
    whole = Deadline(100, clock=clock)
    clock.seconds += 20
    part = whole.part(0.5)
    assert part.end == 160 and not part()
    clock.seconds += 8
    assert not part() and part.steps is whole.steps and whole.steps.seconds == [0, 8]
    assert not whole()  # the time of the part is no step of the whole
    assert whole.steps.seconds == [0, 8, 0] and whole.elapsed() == 28
    clock.seconds += 4
    assert not part() and part.fits(9.3) and not part.fits(9.4)  # the median is 2, with caution 3; 28 left
    clock.seconds = 144
    assert part()  # the longest took 12, with caution 18; 16 left
    assert Deadline(clock=clock).fits(1e9)


def test_augmented_images_reach_the_step():
    found = run(nn.Linear(1, 1), lambda images, labels: (images.flatten() + labels).abs().sum(),
                augment=lambda images, generator: -images)
    assert found.losses == (0.0,) * 3


@pytest.mark.parametrize("mirror", [False, True])
def test_shift_agrees_with_a_loop(mirror):
    images = torch.randn(5, 2, 4, 6, generator=drawn(1))
    shifted = Shift(2, mirror)(images, drawn())
    assert shifted.shape == images.shape and not torch.equal(shifted, images)
    generator = drawn()
    moves = torch.randint(0, 5, (2, 5, 1), generator=generator) - 2
    mirrored = torch.rand(5, 1, generator=generator) < 0.5 if mirror else torch.zeros(5, 1)
    for i in range(5):
        for row in range(4):
            for column in range(6):
                at = 5 - column if mirrored[i] else column
                source = images[i, :, min(max(row + moves[0, i, 0], 0), 3), min(max(at + moves[1, i, 0], 0), 5)]
                assert torch.equal(shifted[i, :, row, column], source)
    assert torch.equal(Shift(0)(images, drawn()), images)


def test_running_statistics_stay_where_they_are_asked_to():
    model, images = new_model(3, (2, 2, 4, 4), 3, seed=0), torch.randn(4, 3, 8, 8, generator=drawn())
    before = {name: t.clone() for name, t in model.named_buffers()}
    training_mode(model, "running")
    model(images)
    training_mode(model, "batch")
    with statistics_kept(model):
        kept = model(images)
    assert all(torch.equal(t, before[name]) for name, t in model.named_buffers())
    torch.testing.assert_close(model(images), kept)  # each batch's statistics all the same
    assert not torch.equal(model.layer1[0].bn1.running_mean, before["layer1.0.bn1.running_mean"])


def test_classes_are_predicted_in_evaluation_mode():
    model = new_model(3, (2, 2, 4, 4), 3, seed=0).train()
    model.layer1.eval()
    images = torch.randn(7, 3, 8, 8, generator=drawn())
    found = predicted_classes(model, images, batch=3)
    assert model.training and not model.layer1.training and model.layer2.training
    assert torch.equal(found, model.eval()(images).argmax(1))


def test_bad_settings_are_named(refuses):
    with refuses(r"Shift.pixels: expected >= 0, found -1"):
        Shift(-1)
    with refuses(r"statistics: expected one of batch, running, found no"):
        training_mode(nn.Linear(1, 1), "no")
