import json
import math
import tracemalloc
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from data.image_sets import ImageSet
from data.unlearnable import make_unlearnable
from defense import dvae, dvae_stage
from defense.deadline import Deadline
from defense.dvae import DVAEConfig, grey_levels, purify
from defense.dvae_network import DVAE, Disentangled, NetworkConfig, new_dvae
from defense.dvae_stage import Stage, StageConfig, loss_terms, nats, train_stage

TINY = NetworkConfig(width=4, latent=6)
QUICK = StageConfig(epochs=2, batch=8, network=TINY)
CONFIG = DVAEConfig(first=QUICK, second=QUICK)


def a_set(count=20, channels=3, size=(8, 8), classes=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(40, 200, (count, channels, *size), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % classes, classes, "noise")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the network

def test_the_published_network_has_the_published_sizes():
    model = new_dvae(10, (3, 32, 32), NetworkConfig(), seed=0)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count["encoder"] == pytest.approx(0.380e6, rel=0.01)
    assert count["mean"] + count["log_variance"] + count["after"] == pytest.approx(0.099e6, rel=0.01)
    assert count["image"] == count["perturbation"] == pytest.approx(0.187e6, rel=0.01)
    assert model.classes.shape == (10, 128, 16, 16)
    assert model.code_shape(5) == (5, 256, 16, 16)


def slow_patch_decoder(state, x, name, normed):
    """Convolutions on the grid, then every position's numbers to its patch."""
    x = F.conv2d(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"], padding=1)
    if normed:
        x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    last = 3 if normed else 2
    x = F.conv2d(x.relu(), state[f"{name}.{last}.weight"], state[f"{name}.{last}.bias"], padding=1)
    b, c, rows, columns = x.shape
    return x.reshape(b, c // 4, 2, 2, rows, columns).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * rows, -1)


def slow_forward(model, images, labels, noise, patches=False):
    """Layer by layer, with the transposed convolutions of the released network, or on a grid of patches."""
    state = model.state_dict()

    def norm(x, name):
        return F.batch_norm(x, state[f"{name}.running_mean"], state[f"{name}.running_var"], state[f"{name}.weight"],
                            state[f"{name}.bias"])

    def basic(x, name, stride):
        kept = x
        if f"{name}.downsample.0.weight" in state:
            kept = norm(F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride), f"{name}.downsample.1")
        x = norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1").relu()
        return (norm(F.conv2d(x, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2") + kept).relu()

    def turned(x, name):
        weight = state[f"{name}.weight"].flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(x, weight, state[f"{name}.bias"], 1, 1)

    def decoder(x, name):
        x = F.conv_transpose2d(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"], 2, 1)
        x = F.instance_norm(turned(x, f"{name}.1")).relu()
        return turned(F.instance_norm(turned(x, f"{name}.4")).relu(), f"{name}.7")

    if patches:
        b, c, rows, columns = images.shape
        x = images.reshape(b, c, rows // 2, 2, columns // 2, 2).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
        h = norm(F.conv2d(x, state["encoder.1.0.weight"], padding=1), "encoder.1.1").relu()
        h = basic(h, "encoder.2", 1)
    else:
        h = norm(F.conv2d(images, state["encoder.0.0.weight"], padding=1), "encoder.0.1").relu()
        h = basic(basic(basic(h, "encoder.1", 1), "encoder.2", 1), "encoder.3", 2)
    mean, variance = (F.conv2d(h, state[f"{n}.weight"], state[f"{n}.bias"]) for n in ("mean", "log_variance"))
    z = F.conv2d(mean + torch.exp(0.5 * variance) * noise, state["after.weight"], state["after.bias"])
    told = z + state["classes"][labels]
    if patches:
        image = slow_patch_decoder(state, z, "image.0", False).sigmoid()
        return image, slow_patch_decoder(state, told, "perturbation", True), mean, variance
    return decoder(z, "image.0").sigmoid(), decoder(told, "perturbation"), mean, variance


@pytest.mark.parametrize("layout", ["released", "patches"])
def test_the_network_is_what_it_says_layer_by_layer(layout):
    model = new_dvae(3, (3, 8, 12), NetworkConfig(width=4, latent=6, layout=layout), seed=0)
    model.train()(torch.rand(6, 3, 8, 12), torch.zeros(6).long(), None)  # so that batch norms have statistics
    model.eval()
    x, y = torch.rand(5, 3, 8, 12, generator=generator()), torch.tensor([0, 1, 2, 0, 1])
    noise = torch.randn(model.code_shape(5), generator=generator(1))
    for ours, theirs in zip(model(x, y, noise), slow_forward(model, x, y, noise, layout == "patches"), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_only_the_perturbation_sees_the_class_and_both_see_the_noise():
    model = new_dvae(2, (3, 8, 8), TINY, seed=0).eval()
    x, noise = torch.rand(2, 3, 8, 8, generator=generator()), torch.randn(model.code_shape(2), generator=generator(1))
    one, other = (model(x, torch.tensor([k, k]), noise) for k in (0, 1))
    assert torch.equal(one.image, other.image) and not torch.equal(one.perturbation, other.perturbation)
    still = model(x, torch.tensor([0, 0]), None)
    assert not torch.equal(still.image, one.image) and not torch.equal(still.perturbation, one.perturbation)


@pytest.mark.parametrize("size, halvings, code", [((32, 32), 1, (16, 16)), ((64, 64), 2, (16, 16)),
                                                  ((224, 224), 3, (28, 28)), ((13, 18), 2, (4, 5)),
                                                  ((1, 3), 1, (1, 2))])
@pytest.mark.parametrize("layout", ["released", "patches"])
def test_any_size_of_image_does(size, halvings, code, layout):
    model = new_dvae(2, (3, *size), NetworkConfig(4, 6, halvings, layout), seed=0).eval()
    found = model(torch.rand(1, 3, *size), torch.tensor([1]), None)
    assert found.image.shape == found.perturbation.shape == (1, 3, *size) and found.mean.shape == (1, 6, *code)


def test_a_new_network_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (new_dvae(2, (3, 8, 8), TINY, seed=seed).classes for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and torch.equal(torch.get_rng_state(), before)


# --- the loss

def test_nats_are_those_of_the_formula_a_latent_position():
    mean, variance = torch.randn(2, 5, 3, 4, generator=generator()), torch.randn(2, 5, 3, 4, generator=generator(1))
    total = sum(0.5 * (math.exp(v) + m * m - 1 - v)
                for m, v in zip(mean.flatten().tolist(), variance.flatten().tolist(), strict=True))
    assert nats(mean, variance).item() == pytest.approx(total / (2 * 3 * 4), rel=1e-5)


def by_hand(found, x, config, epoch):
    image = ((found.image - x) ** 2).mean()
    both = ((torch.clamp(found.image + found.perturbation, 0, 1) - x) ** 2).mean()
    power = (found.perturbation ** 2).mean()
    return [image, both, config.weight * max(nats(found.mean, found.log_variance).item(), config.rate_limit),
            max(power.item(), 0.002) if epoch >= 11 else 0.0]


@pytest.mark.parametrize("epoch", [10, 11])
@pytest.mark.parametrize("scale", [0.01, 0.5])  # of the perturbation: below and above its free power
@pytest.mark.parametrize("limit", [0.1, 100.0])  # below and above the rate
def test_the_loss_is_the_released_one(epoch, scale, limit):
    draws = [torch.rand(2, 3, 4, 4, generator=generator(seed)) for seed in range(3)]
    code = torch.randn(2, 5, 2, 2, generator=generator(4))
    found, config = Disentangled(draws[0], scale * draws[1], code, code / 2), StageConfig(rate_limit=limit)
    torch.testing.assert_close(loss_terms(found, draws[2], config, epoch),
                               torch.tensor(by_hand(found, draws[2], config, epoch)))


def test_a_rate_below_its_limit_is_free():
    mean = torch.full((1, 2, 1, 1), 0.5, requires_grad=True)
    flat = torch.zeros(1, 3, 2, 2)
    for limit, free in ((1.0, True), (0.01, False)):
        found = Disentangled(flat, flat, mean, torch.zeros(1, 2, 1, 1))
        (slope,) = torch.autograd.grad(loss_terms(found, flat, StageConfig(rate_limit=limit), 0).sum(), mean)
        assert (slope == 0).all() == free


def test_terms_can_be_switched_off():
    bright = Disentangled(torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2), *torch.zeros(2, 1, 2, 1, 1))
    plain = loss_terms(bright, torch.ones(1, 3, 2, 2), StageConfig(clamp=False, power=0.0), 20)
    assert plain.tolist() == pytest.approx([0, 1, 0.01, 0])  # the paper's form: unclamped, without the power
    assert loss_terms(bright, torch.ones(1, 3, 2, 2), StageConfig(), 20).tolist() == pytest.approx([0, 0, 0.01, 1])


# --- a stage

def test_training_lowers_the_loss_and_depends_on_the_seed_alone():
    clean, before = a_set(), torch.get_rng_state()
    config = StageConfig(epochs=6, batch=8, network=TINY)
    one, same, other = (train_stage(clean.images, clean.labels, 4, config, generator=generator(seed))
                        for seed in (0, 0, 1))
    assert one.losses["image"][-1] < one.losses["image"][0] and len(one.losses["rate"]) == 6
    assert one.losses == same.losses and one.losses != other.losses
    assert one.finite and one.complete and not one.model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_sixteen_bits_do_on_a_cpu_too():
    clean = a_set()
    config = StageConfig(epochs=1, batch=8, network=TINY, precision="bfloat16")
    found = train_stage(clean.images, clean.labels, 4, config, generator=generator())
    full = train_stage(clean.images, clean.labels, 4, QUICK, generator=generator())
    assert found.losses["image"][0] == pytest.approx(full.losses["image"][0], rel=0.05)


def test_progress_falls_with_epochs_or_time_whichever_is_further():
    now = [0.0]
    deadline = Deadline(100.0, clock=lambda: now[0])
    assert dvae_stage._progress(3, 10, deadline) == pytest.approx(0.3)
    now[0] = 60.0
    assert dvae_stage._progress(3, 10, deadline) == pytest.approx(0.6)
    assert dvae_stage._progress(3, 10, Deadline()) == pytest.approx(0.3)


# --- two stages, three inferences

class Known(nn.Module):
    """Stands for a trained network: the perturbation is a fixed share of the image, the image is its square."""

    def __init__(self, share):
        super().__init__()
        self.share, self.calls = share, []

    def forward(self, images, labels, noise):
        self.calls.append(images.clone())
        return Disentangled(images**2, self.share * images, None, None)

    def code_shape(self, count):
        return count, 1


@pytest.fixture
def known(monkeypatch):
    """Two known networks in place of trained ones; what the stages were trained on."""
    models, seen = [Known(0.1), Known(0.2)], []

    def trained(images, labels, classes, config, **_):
        seen.append((images.clone(), config))
        return Stage(models[len(seen) - 1], {"image": (0.5,), "both": (), "rate": (), "power": ()}, True, True)

    monkeypatch.setattr(dvae, "train_stage", trained)
    return models, seen


def test_two_stages_and_three_inferences_are_the_published_ones(known):
    models, seen = known
    clean = a_set(4)
    config = DVAEConfig()
    found = purify(clean.images, clean.labels, config, generator=generator())
    x0 = clean.images.float() / 255
    first = (255 * (x0 - 0.1 * x0)).floor().to(torch.uint8)  # stored between the stages
    assert torch.equal(seen[0][0], clean.images) and torch.equal(seen[1][0], first)
    assert (seen[0][1].rate_limit, seen[1][1].rate_limit) == (1.0, 3.0)
    x1 = first.float() / 255
    x2 = x1 - 0.2 * x1
    torch.testing.assert_close(models[1].calls[0], x1)
    torch.testing.assert_close(models[1].calls[1], x2)
    assert torch.equal(found.images, (255 * x2**2).floor().to(torch.uint8))
    torch.testing.assert_close(found.perturbations.float(), 25.5 * x0, atol=0.02, rtol=1e-3)
    assert [len(model.calls) for model in models] == [1, 2]


def test_one_stage_alone_can_be_asked_for(known):
    clean = a_set(4)
    x0 = clean.images.float() / 255
    found = purify(clean.images, clean.labels, DVAEConfig(stages="first", rounding="nearest"), generator=generator())
    assert torch.equal(found.images, (255 * 0.9 * x0).round().to(torch.uint8))


def test_the_second_stage_alone_works_on_what_is_given(known):
    models, _ = known
    clean = a_set(4)
    x0 = clean.images.float() / 255
    found = purify(clean.images, clean.labels, DVAEConfig(stages="second"), generator=generator())
    assert torch.equal(found.images, (255 * (0.9 * x0)**2).floor().to(torch.uint8)) and len(models[0].calls) == 2


def test_as_many_pixels_go_through_at_once_whatever_the_size():
    assert [dvae.inference_batch(*size) for size in ((32, 32), (224, 224), (9000, 9000))] == [500, 10, 1]


def test_grey_levels_are_cut_as_released_or_rounded():
    x = torch.tensor([0.0, 0.999 / 255, 1.6 / 255, 1.0])
    assert grey_levels(x, "floor").tolist() == [0, 0, 1, 255] and grey_levels(x, "nearest").tolist() == [0, 1, 2, 255]


def test_purifying_depends_on_the_seed_alone_and_leaves_its_input(tmp_path):
    bad = make_unlearnable("lsp", a_set(), {"patch": 4}, ratio=1.0, seed=0)
    before = bad.images.clone(), torch.get_rng_state()
    one, same, other = (purify(bad.images, bad.labels, CONFIG, generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.images, same.images) and not torch.equal(one.images, other.images)
    assert torch.equal(bad.images, before[0]) and torch.equal(torch.get_rng_state(), before[1])
    assert one.images.dtype == torch.uint8 and one.perturbations.dtype == torch.float16
    assert one.complete and not one.failed and set(one.losses) == {
        f"stage {n} {name}" for n in (1, 2) for name in ("image", "both", "rate", "power")}
    json.dumps(one.details)


def test_codes_are_drawn_or_their_means(monkeypatch):
    seen, clean = [], a_set()
    forward = DVAE.forward

    def watched(self, images, labels, noise):
        seen.append((self.training, noise is None))
        return forward(self, images, labels, noise)

    monkeypatch.setattr(DVAE, "forward", watched)
    purify(clean.images, clean.labels, replace(CONFIG, sampled=False), generator=generator())
    assert {(False, True), (True, False)} == set(seen)  # in training they are always drawn
    seen.clear()
    purify(clean.images, clean.labels, CONFIG, generator=generator())
    assert {(False, False), (True, False)} == set(seen)


class Untouched(TorchFunctionMode):
    """Raises where any operation gets one of the sealed tensors, or a view of one."""

    def __init__(self, *sealed):
        super().__init__()
        self.sealed = {tensor.untyped_storage().data_ptr() for tensor in sealed}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self.sealed:
                raise AssertionError("clean images were touched")
        return function(*args, **(kwargs or {}))


def test_no_clean_image_is_touched():
    clean = a_set()
    bad = make_unlearnable("lsp", clean, {"patch": 4}, ratio=1.0, seed=0)
    sealed = clean.images, clean.labels
    with Untouched(*sealed), pytest.raises(AssertionError, match="clean images were touched"):
        clean.images.float()  # the seal works
    with Untouched(*sealed):
        assert purify(bad.images, bad.labels, CONFIG, generator=generator()).complete


# --- images that a device cannot hold

def test_images_that_lie_elsewhere_go_batch_by_batch_and_give_the_same(monkeypatch):
    clean, sent, seen, to = a_set(), [], [], DVAE.to
    monkeypatch.setattr(dvae, "INFERENCE_PIXELS", 7 * 64)
    whole = purify(clean.images, clean.labels, CONFIG, generator=generator())

    def watched(tensor, device):
        sent.append((len(tensor), device))
        return tensor.clone()

    monkeypatch.setattr("defense.training.carried", watched)
    monkeypatch.setattr(dvae, "carried", watched)
    monkeypatch.setattr(DVAE, "to", lambda self, device, **more: seen.append(device) or to(self, device, **more))
    there = torch.device("cpu", 0)  # told from where the images are by its number
    found = purify(clean.images, clean.labels, CONFIG, generator=generator(), device=there)
    assert found.images.device == found.perturbations.device == clean.images.device != there
    assert {device for _, device in sent} == {there} and seen == [there] * 2
    assert [count for count, _ in sent] == 2 * 3 * [7, 7, 7, 7, 6, 6]  # two epochs and a pass
    assert torch.equal(found.images, whole.images) and found.losses == whole.losses
    assert torch.equal(found.perturbations, whole.perturbations)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="repeats on a GPU what the test above does on the CPU")
def test_images_on_the_cpu_are_purified_on_a_gpu_as_if_they_lay_there():
    clean, gpu = a_set(), torch.device("cuda")
    config = DVAEConfig(*2 * [replace(QUICK, precision="float32")])
    found = purify(clean.images, clean.labels, config, generator=generator(), device=gpu)
    there = purify(clean.images.to(gpu), clean.labels.to(gpu), config, generator=generator())
    assert found.images.device.type == found.perturbations.device.type == "cpu"
    difference = found.images.int() - there.images.cpu().int()
    assert difference.abs().double().mean() < 0.5  # sums on a GPU may come in another order


# --- kept work, deadlines, bad input

def counted(monkeypatch):
    """The numbers of the stages that are trained from now on."""
    trained, run_stage = [], dvae.run_stage

    def counting(number, *rest, **more):
        trained.append(number)
        return run_stage(number, *rest, **more)

    monkeypatch.setattr(dvae, "run_stage", counting)
    return trained


def test_finished_stages_are_found_again(tmp_path, monkeypatch):
    clean = a_set()
    whole = purify(clean.images, clean.labels, CONFIG, generator=generator(), kept=tmp_path)
    trained = counted(monkeypatch)
    again = purify(clean.images, clean.labels, CONFIG, generator=generator(), kept=tmp_path)
    assert trained == [] and torch.equal(again.images, whole.images) and again.losses == whole.losses
    next(tmp_path.glob("stage2-*.safetensors")).unlink()  # as if it had been stopped after the first
    again = purify(clean.images, clean.labels, CONFIG, generator=generator(), kept=tmp_path)
    assert trained == [2] and torch.equal(again.images, whole.images)
    assert torch.equal(again.perturbations, whole.perturbations)
    for other in ({"generator": generator(1)}, {"generator": generator()}):
        images = clean.images if other["generator"].initial_seed() else clean.images.flip(3)
        trained.clear()
        purify(images, clean.labels, CONFIG, **other, kept=tmp_path)
        assert trained == [1, 2]


def test_a_stage_of_other_code_is_not_taken(tmp_path, monkeypatch):
    clean = a_set()
    purify(clean.images, clean.labels, CONFIG, generator=generator(), kept=tmp_path)
    assert {path.name for path in dvae.CODE} == {"dvae.py", "dvae_network.py", "dvae_stage.py", "training.py",
                                                 "resnet.py"}
    (tmp_path / "dvae.py").write_text("changed")
    monkeypatch.setattr(dvae, "CODE", (tmp_path / "dvae.py", *dvae.CODE[1:]))
    trained = counted(monkeypatch)
    purify(clean.images, clean.labels, CONFIG, generator=generator(), kept=tmp_path)
    assert trained == [1, 2]


def test_a_stage_found_again_counts_the_seconds_it_took(tmp_path):
    clean = a_set()
    first, again = (purify(clean.images, clean.labels, CONFIG, generator=generator(), kept=tmp_path,
                           deadline=Deadline(1e6, clock=ticking(1.0))) for _ in range(2))
    assert first.seconds > 20 and first.seconds - 15 < again.seconds < first.seconds + 15  # readings of the clock


def test_a_spoiled_file_is_made_anew(tmp_path, monkeypatch):
    clean = a_set()
    whole = purify(clean.images, clean.labels, CONFIG, generator=generator(), kept=tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"spoiled")
    trained = counted(monkeypatch)
    again = purify(clean.images, clean.labels, CONFIG, generator=generator(), kept=tmp_path)
    assert trained == [1, 2] and torch.equal(again.images, whole.images)


def ticking(step):
    """A clock that moves by `step` seconds whenever it is read."""
    now = [0.0]

    def clock():
        now[0] += step
        return now[0]

    return clock


def test_a_deadline_cuts_epochs_short_and_keeps_no_stage(tmp_path):
    clean = a_set()
    long = StageConfig(epochs=50, batch=8, network=TINY)
    found = purify(clean.images, clean.labels, DVAEConfig(first=long, second=long), generator=generator(),
                   deadline=Deadline(100.0, clock=ticking(0.5)), kept=tmp_path)
    assert not found.complete and not found.failed and not list(tmp_path.iterdir())
    assert 1 <= len(found.losses["stage 1 image"]) < 50 and 1 <= len(found.losses["stage 2 image"]) < 50
    assert not torch.equal(found.images, clean.images)


def test_training_leaves_time_to_apply_a_stage(monkeypatch):
    clean, now = a_set(), [0.0]
    train, infer = dvae_stage._terms, dvae.without_perturbation

    def slow(work, seconds):
        def slowly(*given, **more):
            now[0] += seconds
            return work(*given, **more)
        return slowly

    monkeypatch.setattr(dvae_stage, "_terms", slow(train, 1.0))             # 3 batches an epoch
    monkeypatch.setattr(dvae, "without_perturbation", slow(infer, 1.0))    # a pass over the set: a third of an epoch
    monkeypatch.setattr(dvae, "reconstruction", slow(dvae.reconstruction, 1.0))
    long = StageConfig(epochs=500, batch=8, network=TINY)
    found = purify(clean.images, clean.labels, DVAEConfig(first=long, second=long), generator=generator(),
                   deadline=Deadline(60.0, clock=lambda: now[0]))
    assert not found.complete and 52 < now[0] <= 60 and found.seconds == now[0]


def test_without_time_for_an_epoch_the_images_come_back_as_they_are():
    clean = a_set()
    found = purify(clean.images, clean.labels, CONFIG, generator=generator(),
                   deadline=Deadline(1.0, clock=ticking(0.4)))
    assert found.failed == "stage 1: no time for an epoch" and torch.equal(found.images, clean.images)


def test_a_stage_that_blows_up_is_told():
    clean = a_set()
    wild = StageConfig(epochs=2, batch=8, rate=1e30, clip=1e30, network=TINY)
    found = purify(clean.images, clean.labels, DVAEConfig(first=wild, second=QUICK), generator=generator())
    assert found.failed == "stage 1: no finite epoch" and torch.equal(found.images, clean.images)
    assert found.details == {"not finite": [1]}


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32])
def test_labels_may_be_of_any_whole_type(kind):
    clean = a_set()
    expected = purify(clean.images, clean.labels, CONFIG, generator=generator())
    found = purify(clean.images, clean.labels.to(kind), CONFIG, generator=generator())
    assert torch.equal(found.images, expected.images) and found.details == {"not finite": []}


def test_finding_a_stage_again_takes_no_copies_of_the_images(tmp_path):
    images, labels = torch.zeros(400, 3, 64, 64, dtype=torch.uint8), torch.arange(400) % 2
    output = dvae.StageOutput(images[:1], None, {name: (1.0,) for name in dvae.TERMS}, True, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dvae, "run_stage", lambda *_, **__: output)
        tracemalloc.start()
        dvae._kept_stage(1, images, labels, CONFIG, 0, Deadline(), tmp_path, None, images.device)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < images.numel() / 2


@pytest.mark.parametrize("count, channels, size, classes", [
    (6, 3, (9, 10), 1), (1, 3, (8, 8), 1), (3, 1, (7, 5), 3), (9, 3, (8, 8), 2)])
def test_odd_sets_are_purified(count, channels, size, classes):
    clean = a_set(count, channels, size, classes)
    found = purify(clean.images, clean.labels, CONFIG, generator=generator())
    assert not found.failed and found.images.shape == clean.images.shape


@pytest.mark.parametrize("change, message", [
    (lambda x, y: (x.float() / 100, y), r"images: expected \(N, C, H, W\) uint8, grey levels, found '?.*float32"),
    (lambda x, y: (x[0], y), r"images: expected \(N, C, H, W\) uint8"),
    (lambda x, y: (x[:0], y[:0]), "images: expected at least one, found 0"),
    (lambda x, y: (x, y[:-1]), "labels: expected one whole number for each of 20 images"),
    (lambda x, y: (x, y - 1), "labels: expected >= 0, found -1")])
def test_bad_sets_are_refused(change, message, refuses):
    clean = a_set()
    with refuses(message):
        purify(*change(clean.images, clean.labels), CONFIG, generator=generator())


def test_images_of_one_patch_are_refused(refuses):
    new_dvae(2, (3, 8, 9), NetworkConfig(4, 6, 3, "patches"), seed=0)
    with refuses("images: expected larger than 8 x 8 pixels, one patch, .*, found 8 x 8"):
        new_dvae(2, (3, 8, 8), NetworkConfig(4, 6, 3, "patches"), seed=0)


@pytest.mark.parametrize("kind, settings, message", [
    (StageConfig, {"epochs": 0}, "StageConfig epochs, batch: expected > 0, > 1"),
    (StageConfig, {"rate_limit": -1}, "StageConfig rate_limit, weight: expected >= 0"),
    (StageConfig, {"power": -1}, "StageConfig power, power_from: expected >= 0"),
    (StageConfig, {"rate": 0}, "StageConfig rate, clip: expected > 0"),
    (StageConfig, {"precision": "half"}, "StageConfig.precision: expected auto, float32 or bfloat16, found half"),
    (NetworkConfig, {"width": 1}, "NetworkConfig width, latent: expected >= 2, > 0"),
    (NetworkConfig, {"halvings": 0}, "NetworkConfig.halvings: expected >= 1, found 0"),
    (NetworkConfig, {"layout": "odd"}, "NetworkConfig.layout: expected released or patches, found odd"),
    (DVAEConfig, {"stages": "third"}, "DVAEConfig.stages: expected both, first or second, found third"),
    (DVAEConfig, {"rounding": "up"}, "DVAEConfig.rounding: expected floor or nearest, found up")])
def test_bad_settings_are_refused(kind, settings, message, refuses):
    with refuses(message):
        kind(**settings)
