"""What a defense may be given by strangers, for every defense by name: it works, or is refused with the reason."""
import copy

import pytest
import torch
from torch import nn

from defense.defenses import DEFENSES, ORACLES, defend
from defense.oracle_pruning import OracleTest
from tests.defense_doubles import IMAGES, LABELS, a_model, drawn, is_finite

CALM = {"rate": 1e-3, "epochs": 2}
TUNED = {"epochs": 2}
# A few steps of each; a defense that is not named here runs as it is by default.
SETTINGS = {
    "tsbd": {"neurons": 0.3, "unlearning": CALM, "tuning": {"epochs": 2, "steps": 0}},
    "ft": TUNED, "fp": {"tuning": TUNED}, "nwc-fp": {"unlearning": CALM, "pruning": {"tuning": TUNED}},
    "clp": {"deviations": 0.5}, "anp": {"steps": 2}, "anp-oracle": {"pruning": {"steps": 2, "rate": 0.5}},
    "nad": {"teacher": TUNED, "student": TUNED}, "i-bau": {"rounds": 1, "iterations": 1, "climb": 1.0},
    "rnp": {"unlearning": CALM, "epochs": 2}, "ft-sam": TUNED, "sau": {"rounds": 1, "steps": 1},
    "fmp": {"images": 4, "tuning": TUNED},
}
NORMLESS = {  # why a method that works on batch norms refuses a network without
    "clp": "norms", "anp": "norm", "anp-oracle": "norm", "rnp": "norm"}
every = pytest.mark.parametrize("name", sorted(DEFENSES))


def repaired(name, model=None, images=IMAGES, labels=LABELS, **settings):
    settings = {**SETTINGS.get(name, {}), **settings}
    if name in ORACLES:
        settings["test"] = OracleTest(IMAGES, LABELS, IMAGES + 1, 0)
    return defend(name, a_model() if model is None else model, images, labels, settings, generator=drawn(0))


def without_norms():
    """A network with three layers of weights and no norm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.ReLU()) for c in (3, 4)),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double().eval()


@every
def test_a_clean_set_smaller_than_a_batch_is_one_batch(name):
    found = repaired(name, images=IMAGES[:5], labels=LABELS[:5])
    assert is_finite(found.model) and (not found.failed or "batch" not in found.failed)


@every
def test_a_class_without_images_is_listed(name):
    some = LABELS != 2
    found = repaired(name, images=IMAGES[some], labels=LABELS[some])
    assert found.record()["missing_classes"] == [2] and is_finite(found.model)


@every
@pytest.mark.parametrize(("change", "message"), [
    (lambda x, y: (x, y + 1), r"labels: expected in \[0, 3\), as the model has classes, found 1 to 3"),
    (lambda x, y: (x, y - 1), r"labels: expected in \[0, 3\), as the model has classes, found -1 to 1"),
    (lambda x, y: (x, y[:-1]), "labels: expected one for each of 12 images"),
    (lambda x, y: (x, y.double()), "labels: expected whole numbers"),
    (lambda x, y: (x * float("nan"), y), "images: expected finite numbers, found NaN or infinity"),
    (lambda x, y: (x[:0], y[:0]), "images: expected at least one, found 0"),
    (lambda x, y: (x[:1], y[:1]), "images: expected at least 2 for the batch norm of this model, found 1"),
    (lambda x, y: (x.to(torch.uint8), y), r"images: expected \(N, C, H, W\) of floating point"),
])
def test_wrong_images_and_labels_are_named(name, refuses, change, message):
    images, labels = change(IMAGES, LABELS)
    with refuses(message):
        repaired(name, images=images, labels=labels)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_as_it_was(name, dtype):
    model = a_model().to(dtype)
    found = repaired(name, model, IMAGES.float(), LABELS)
    assert {p.dtype for p in found.model.parameters()} == {dtype} and is_finite(found.model)


@every
def test_a_frozen_network_is_repaired_and_stays_frozen(name):
    frozen, free = a_model().requires_grad_(False), a_model()
    before = copy.deepcopy(frozen.state_dict())
    ours, other = repaired(name, frozen).model, repaired(name, free).model
    assert not any(p.requires_grad for p in ours.parameters()) and all(p.requires_grad for p in other.parameters())
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[key], msg=key)
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())


@every
def test_a_network_without_norms_is_repaired_or_refused_with_the_reason(name, refuses):
    layers = {"layers": ("0", "1")} if name == "nad" else {}  # a ResNet's names are the default
    if name in NORMLESS:
        with refuses(f"model: expected .*{NORMLESS[name]}"):
            repaired(name, without_norms())
    else:
        found = repaired(name, without_norms(), **layers)
        assert is_finite(found.model) and not found.failed


@every
def test_a_network_that_is_none_or_is_spoiled_is_refused(name, refuses):
    with refuses("model: expected floating-point parameters, found none"):
        repaired(name, nn.Flatten())
    spoiled = a_model()
    next(spoiled.parameters()).data[0] = float("nan")
    with refuses("model '.*': expected finite numbers, found NaN or infinity"):
        repaired(name, spoiled)
