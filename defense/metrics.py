"""How well a defense did: ACC, ASR, RA and the defense effectiveness rating, all as fractions in [0, 1].

DER as BackdoorBench words it: half of (1 + what the attack lost - what clean accuracy lost), gains counted as zero.
1 = the attack is gone and no accuracy lost; 0.5 = nothing gained.
"""
from __future__ import annotations

from torch import Tensor

from data.errors import expect


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """ACC: share of (N,) clean test images that get their class; higher is better."""
    _check_pair(predicted, labels)
    return _share(predicted == labels)


def attack_success(predicted: Tensor, labels: Tensor, target: int) -> float:
    """ASR: share of the triggered images of other classes that get the target's; lower is better.

    predicted: (N,) classes of triggered images. labels: (N,) their true classes; those of the target are left out.
    """
    others = _others(predicted, labels, target)
    return _share(predicted[others] == target)


def robust_accuracy(predicted: Tensor, labels: Tensor, target: int) -> float:
    """RA: share of the triggered images of other classes that get their true class; higher is better."""
    others = _others(predicted, labels, target)
    return _share(predicted[others] == labels[others])


def defense_effectiveness(before: tuple[float, float], after: tuple[float, float]) -> float:
    """DER of (ACC, ASR) before and after the defense; higher is better."""
    for where, value in zip(("ACC before", "ASR before", "ACC after", "ASR after"), (*before, *after), strict=True):
        expect(0 <= value <= 1, where, "a fraction in [0, 1]", value)
    return (1 + max(0.0, before[1] - after[1]) - max(0.0, before[0] - after[0])) / 2


def _others(predicted: Tensor, labels: Tensor, target: int) -> Tensor:
    _check_pair(predicted, labels)
    others = labels != target
    expect(bool(others.any()), "labels", f"some of another class than {target}", "none")
    return others


def _check_pair(predicted: Tensor, labels: Tensor) -> None:
    expect(predicted.ndim == 1 and predicted.shape == labels.shape, "predicted, labels", "(N,) each",
           (tuple(predicted.shape), tuple(labels.shape)))
    expect(len(labels) > 0, "labels", "at least one image", 0)


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()
