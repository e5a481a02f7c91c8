import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock, ResNet

from data.preact_resnet import new_model
from defense import tsbd
from defense.activeness_tuning import TuningConfig
from defense.deadline import Deadline
from defense.neuron_ratio import RatioConfig, allowance, largest_bearable, split_clean
from defense.training import Epochs, Shift
from defense.tsbd import TSBDConfig, defend
from defense.unlearning import UnlearningConfig
from tests.defense_doubles import Clock, nan_from

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3
QUICK = TSBDConfig(neurons=0.3, unlearning=UnlearningConfig(rate=1e-2, epochs=3),
                   tuning=TuningConfig(epochs=2, steps=0, batch=6))

ONE_PASS = replace(QUICK, unlearning=UnlearningConfig(rate=1e-6, epochs=1))


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def a_model():
    return new_model(3, (2, 2, 4, 4), 3, seed=0).eval()


def defended(model=None, config=QUICK, seed=0, images=IMAGES, labels=LABELS, **more):
    return defend(a_model() if model is None else model, images, labels, config, generator=drawn(seed), **more)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def is_finite(model):
    return all(t.isfinite().all() for t in model.state_dict().values() if t.is_floating_point())


def a_vit():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTransformer(image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16,
                                 num_classes=3, dropout=0.1)


def a_resnet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)


@pytest.mark.parametrize("make", [a_model, a_resnet, a_vit])
def test_a_net_is_repaired_and_the_given_one_stays(make):
    model = make()
    frozen = next(model.parameters()).requires_grad_(False)
    before, generators = copy.deepcopy(model), torch.get_rng_state()
    config = replace(QUICK, tuning=replace(QUICK.tuning, epochs=1), unlearning=UnlearningConfig(rate=1e-3, epochs=1))
    with torch.no_grad():
        found = defended(model, config, augment=Shift(1))
    assert same(model, before) and torch.equal(torch.get_rng_state(), generators) and not frozen.requires_grad
    assert found.finite and found.complete and not found.failed and found.details["neurons"] == 0.3
    assert not same(found.model, before) and is_finite(found.model) and type(found.model) is type(model)
    assert found.model.training == model.training and not next(found.model.parameters()).requires_grad


def test_equal_seeds_give_equal_models():
    one, again, other = (defended(seed=seed, augment=Shift(1)) for seed in (0, 0, 1))
    assert same(one.model, again.model) and one.losses == again.losses
    assert not same(one.model, other.model)
    with_dropout = [defended(a_vit().train(), seed=0).model for _ in range(2)]
    assert same(*with_dropout)


def test_half_precision_and_odd_sets_work():
    half = defended(a_model().half(), images=IMAGES.half())
    assert half.model.conv1.weight.dtype == torch.float16 and is_finite(half.model)
    whole = defended(a_model().half().float(), images=IMAGES.half().float())
    assert same(half.model, whole.model.half())  # the work is done in float32
    small = defended(images=IMAGES[:2], labels=LABELS[:2])
    assert small.details["missing_classes"] == [2] and is_finite(small.model) and not small.failed
    with torch.inference_mode():
        assert same(defended(images=IMAGES.clone()).model, defended().model)


def test_the_record_is_json_without_the_model():
    record = defended().record()
    assert set(record) == {"method", "finite", "complete", "failed", "losses", "seconds", "unlearning", "neurons",
                           "missing_classes", "tried", "clean_accuracy", "clean_accuracy_repaired"}
    assert record["method"] == "tsbd" and len(record["losses"]) == 2 and record["seconds"] > 0
    assert record["unlearning"]["epochs"] >= 1 and record["unlearning"]["finite"]


def test_unlearning_without_a_finite_epoch_leaves_the_model_unrepaired():
    model = a_model()
    found = defended(model, augment=lambda images, generator: images * float("nan"))
    assert found.failed == "no finite epoch of unlearning" and same(found.model, model) and not found.finite


def test_tuning_without_a_finite_epoch_leaves_the_model_unrepaired():
    model = a_model()
    found = defended(model, augment=nan_from(2), config=ONE_PASS)
    assert found.failed == "no finite epoch of tuning" and same(found.model, model) and not found.finite


def test_a_late_nan_keeps_the_epochs_before_it():
    found = defended(config=ONE_PASS, augment=nan_from(4))  # one step of unlearning, two an epoch of tuning
    assert not found.finite and not found.failed and len(found.losses) == 1 and is_finite(found.model)
    assert same(found.model, defended(config=replace(ONE_PASS, tuning=replace(QUICK.tuning, epochs=1))).model)


def test_a_model_that_tuning_loses_is_not_given_back(monkeypatch):
    model = a_model()
    monkeypatch.setattr(tsbd, "_accuracy", lambda net, given: 0.25 if net.conv1.weight.abs().max() > 1e6 else 0.9)
    found = defended(model, replace(QUICK, tuning=TuningConfig(rate=1e12, epochs=1, steps=0)))
    assert found.failed == "the repaired model is lost: accuracy 0.250 on the clean images"
    assert same(found.model, model) and found.details["clean_accuracy_repaired"] == 0.25


def test_a_model_that_its_dtype_cannot_hold_is_not_given_back(monkeypatch):
    def repaired(net, *_):
        net.linear.weight.data *= 1e8
        return net, Epochs((1.0,), True, True, 1)

    model = a_model().half()
    monkeypatch.setattr(tsbd, "_repaired", repaired)
    found = defended(model, images=IMAGES.half())
    assert found.failed == "the repaired model is too large for its dtype" and same(found.model, model)


def test_no_time_leaves_the_model_unrepaired():
    model = a_model()
    found = defended(model, deadline=Deadline(1.0, clock=Clock(2.0)))
    assert found.failed == "no time to unlearn" and same(found.model, model) and not found.complete


@pytest.mark.parametrize("limit", [50, 120])
def test_the_deadline_is_kept(limit):
    clock = Clock(1.0)
    config = replace(QUICK, neurons=None, unlearning=UnlearningConfig(rate=1e-9),
                     tuning=TuningConfig(epochs=10**6, batch=16))
    found = defended(config=config, deadline=Deadline(limit, clock=clock), images=IMAGES.repeat(4, 1, 1, 1),
                     labels=LABELS.repeat(4))
    assert not found.complete and not found.failed and is_finite(found.model)
    assert limit * 0.8 < clock.seconds <= limit
    assert found.details["neurons"] == RatioConfig().fallback and found.details["tried"] == {}  # no time to choose
    assert found.details["unlearning"]["accuracy"] is not None and found.seconds <= limit


# --- the ratio of neurons --------------------------------------------------------------------------------------

def test_images_are_split_in_proportion():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10 + [3])
    tuned, judges = split_clean(labels, RatioConfig(), generator=drawn())
    assert sorted(torch.cat([tuned, judges]).tolist()) == list(range(101))
    assert torch.bincount(labels[judges], minlength=4).tolist() == [12, 6, 2, 0]
    assert torch.equal(split_clean(labels, RatioConfig(), generator=drawn())[1], judges)
    assert len(split_clean(labels[:40], RatioConfig(), generator=drawn())[1]) == 20
    assert split_clean(torch.arange(30), RatioConfig(), generator=drawn()) is None  # one image a class
    assert split_clean(labels[:18], RatioConfig(), generator=drawn()) is None


@pytest.mark.parametrize("bound", [0.0, 0.01, 0.05, 0.12, 0.4, 0.89, 0.9, 1.0])
@pytest.mark.parametrize("budget", [0.0, 0.02])
def test_halving_finds_what_a_search_of_all_finds(bound, budget):
    config = RatioConfig(budget=budget)

    def judge(ratio):
        return 0.9 if ratio <= bound else 0.9 - allowance(budget, 1000) - 0.0001

    ratio, tried = largest_bearable(judge, config, 1000)
    borne = [c for c in config.candidates if c <= bound]
    assert ratio == (borne[-1] if borne else 0.01) and len(tried) <= 5 and tried[0.0] == 0.9


def test_the_loss_that_chance_explains_is_borne():
    assert allowance(0.0, 20) == pytest.approx(2 * (0.05 * 0.95 / 20) ** 0.5)
    assert allowance(0.015, 400) == pytest.approx(0.015 + 2 * (0.015 * 0.985 / 400) ** 0.5)
    assert largest_bearable(lambda ratio: 0.9 - 0.1 * (ratio > 0), RatioConfig(), 20)[0] == 0.9
    assert largest_bearable(lambda ratio: 0.9 - 0.15 * (ratio > 0), RatioConfig(), 20)[0] == 0.01


def test_a_choice_out_of_time_takes_what_is_known():
    def until(answers):
        return lambda ratio: answers.get(ratio)

    config = RatioConfig()
    assert largest_bearable(until({}), config, 50) == (0.15, {})
    assert largest_bearable(until({0: 0.9}), config, 50) == (0.15, {0: 0.9})
    assert largest_bearable(until({0: 0.9, 0.25: 0.9}), config, 50)[0] == 0.25
    assert largest_bearable(until({0: 0.9, 0.25: 0.5}), config, 50)[0] == 0.15
    assert largest_bearable(until({0: 0.9, 0.25: 0.5, 0.1: 0.5}), config, 50)[0] == 0.05
    assert largest_bearable(until({0: 0.9, 0.01: 0.5}), RatioConfig(candidates=(0.01,)), 50)[0] == 0.01


def test_the_chosen_ratio_is_the_largest_that_held_out_images_bear(monkeypatch):
    """The repair for each ratio is replaced by a net that is right on as many held-out images as the test says."""
    images, labels = IMAGES.repeat(5, 1, 1, 1), LABELS.repeat(5)
    seen = []

    class Right(nn.Module):
        def __init__(self, ratio):
            super().__init__()
            self.ratio = ratio

        def forward(self, x):
            places = [next(i for i in range(12) if torch.equal(IMAGES[i], image)) for image in x]
            right = torch.nn.functional.one_hot(LABELS[places], 3).float()
            wrong = torch.arange(len(x)) < (3 if self.ratio > 0.2 else 1 if self.ratio > 0 else 0)
            return torch.where(wrong[:, None], 1 - right, right)

    def repaired(model, change, ratio, training, config):
        seen.append((ratio, len(training.images)))
        ours, epochs = true_repair(model, change, min(ratio, 0.1), training, config)
        return (Right(ratio) if len(training.images) < 60 else ours), epochs

    true_repair = tsbd._repaired
    monkeypatch.setattr(tsbd, "_repaired", repaired)
    found = defended(images=images, labels=labels, config=replace(
        ONE_PASS, neurons=None, tuning=TuningConfig(epochs=1, steps=0)))
    assert found.details["neurons"] == 0.2 and seen[-1] == (0.2, 60) and {n for _, n in seen[:-1]} == {40}
    assert found.details["tried"]["0.0"] == 1.0 and found.details["tried"]["0.25"] == 0.85


@pytest.mark.parametrize(("limit", "tried"), [(150, 5), (130, 4)])
def test_time_for_a_ratio_is_told_by_tunings_own_steps(monkeypatch, limit, tried):
    """Unlearning takes 1 s, each tuning 10 steps of 2 s: before the fifth, at 81 s, two need 60 s with caution."""
    clock, pace, tune = Clock(0.0), [1.0], tsbd.activeness_aware_finetuning

    def slow(images, generator):
        clock.seconds += pace[0]
        return images

    def tuning(*given):
        pace[0] = 2.0
        return tune(*given)

    monkeypatch.setattr(tsbd, "activeness_aware_finetuning", tuning)
    config = replace(ONE_PASS, neurons=None, tuning=TuningConfig(epochs=10, steps=0), ratio=RatioConfig(budget=0.9))
    found = defended(images=IMAGES.repeat(5, 1, 1, 1), labels=LABELS.repeat(5), config=config, augment=slow,
                     deadline=Deadline(limit, clock=clock))
    assert len(found.details["tried"]) == tried and found.complete == (tried == 5) and not found.failed
    assert len(found.losses) == 10 and clock.seconds == 1 + 20 * (tried + 1)


def test_without_a_finite_mark_the_fallback_is_taken():
    found = defended(images=IMAGES.repeat(5, 1, 1, 1), labels=LABELS.repeat(5), augment=nan_from(2),
                     config=replace(ONE_PASS, neurons=None, tuning=TuningConfig(epochs=1, steps=0)))
    assert found.details["neurons"] == RatioConfig().fallback and found.details["tried"] == {}


def test_bad_settings_and_input_are_named(refuses):
    with refuses(r"TSBDConfig.kinds: expected one of auto, convolutions, all, found x"):
        TSBDConfig(kinds="x")
    with refuses(r"ReinitialisationConfig.neurons: expected in \(0, 1\], found 2"):
        TSBDConfig(neurons=2)
    with refuses(r"RatioConfig.candidates: expected rising numbers in \(0, 1\], found \(0.5, 0.1\)"):
        RatioConfig(candidates=(0.5, 0.1))
    with refuses(r"RatioConfig.candidates: expected rising numbers in \(0, 1\], found \(\)"):
        RatioConfig(candidates=())
    with refuses(r"RatioConfig budget, held_out: expected in \[0, 1\), in \(0, 1\), found \(0.015, 1\)"):
        RatioConfig(held_out=1)
    with refuses(r"RatioConfig.fallback: expected in \(0, 1\], found 0"):
        RatioConfig(fallback=0)
    with refuses(r"labels: expected in \[0, 3\), as the model has classes, found 1 to 3"):
        defended(labels=LABELS + 1)
    with refuses(r"model: expected floating-point parameters, found none"):
        defended(nn.Flatten())
