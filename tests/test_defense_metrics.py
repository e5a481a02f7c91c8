import pytest
import torch

from defense.metrics import accuracy, attack_success, defense_effectiveness, robust_accuracy

LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 2, 1])
TRIGGERED = torch.tensor([0, 2, 0, 1, 0, 0, 2, 2])  # target 0: six others, three of them taken, two kept


def test_accuracy_by_hand():
    assert accuracy(torch.tensor([0, 0, 1, 2, 2, 1, 2, 1]), LABELS) == 0.75


def test_attack_success_leaves_the_target_class_out():
    assert attack_success(TRIGGERED, LABELS, 0) == 0.5
    assert attack_success(TRIGGERED, LABELS, 2) == 2 / 5


def test_robust_accuracy_counts_the_true_class_of_the_same_images():
    assert robust_accuracy(TRIGGERED, LABELS, 0) == pytest.approx(2 / 6)


@pytest.mark.parametrize(("before", "after", "rating"), [
    ((0.9, 1.0), (0.9, 0.0), 1.0),      # the attack gone, nothing lost
    ((0.9, 1.0), (0.9, 1.0), 0.5),      # nothing gained
    ((0.9, 1.0), (0.8, 0.2), 0.85),     # 1 + 0.8 - 0.1: lost accuracy counts against it
    ((0.9, 1.0), (0.1, 1.0), 0.1),
    ((0.9, 0.1), (0.95, 0.3), 0.5),     # gained accuracy and gained ASR count nothing
])
def test_rating_by_hand(before, after, rating):
    assert defense_effectiveness(before, after) == pytest.approx(rating)


def test_bad_input_is_named(refuses):
    with refuses(r"predicted, labels: expected \(N,\) each, found \(\(2,\), \(3,\)\)"):
        accuracy(torch.zeros(2), torch.zeros(3))
    with refuses(r"labels: expected at least one image, found 0"):
        accuracy(torch.zeros(0), torch.zeros(0))
    with refuses(r"labels: expected some of another class than 1, found none"):
        attack_success(torch.tensor([1, 0]), torch.tensor([1, 1]), 1)
    with refuses(r"labels: expected some of another class than 1, found none"):
        robust_accuracy(torch.tensor([1, 0]), torch.tensor([1, 1]), 1)
    with refuses(r"ASR after: expected a fraction in \[0, 1\], found 95"):
        defense_effectiveness((0.9, 1.0), (0.9, 95))
    with refuses(r"ACC before: expected a fraction in \[0, 1\], found nan"):
        defense_effectiveness((float("nan"), 1.0), (0.9, 0.5))
