import pytest
import torch
from torch import nn

from data.preact_resnet import new_model
from defense.given import give_back, own_randomness, take

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def a_model():
    return new_model(3, (2, 2, 4, 4), 3, seed=0).eval()


def test_the_copy_is_independent_and_trainable():
    model = a_model()
    model.linear.weight.requires_grad_(False)
    model.linear.bias.grad = torch.ones(3)
    given = take(model, IMAGES, LABELS)
    assert (given.num_classes, given.missing) == (3, ())
    assert all(p.requires_grad and p.grad is None for p in given.model.parameters())
    for mine, theirs in zip(given.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
    assert not model.linear.weight.requires_grad and torch.equal(model.linear.bias.grad, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_flags_and_modes_come_back(dtype):
    model = a_model().to(dtype)
    model.layer1.train()
    model.conv1.weight.requires_grad_(False)
    given = take(model, IMAGES.double(), LABELS.int())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert given.images.dtype == given.model.conv1.weight.dtype == given.model.layer1[0].bn1.running_mean.dtype == wide
    assert given.labels.dtype == torch.int64
    back = give_back(given.model.train(), model)
    state = model.state_dict()
    for name, tensor in back.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name])
    assert not back.conv1.weight.requires_grad and back.linear.weight.requires_grad
    assert back.layer1.training and not back.layer2.training and not back.training


def test_missing_classes_are_listed():
    assert take(a_model(), IMAGES[:4], LABELS[:2].repeat(2)).missing == (2,)


def test_bad_input_is_named(refuses):
    def refused(pattern, model=None, images=IMAGES, labels=LABELS):
        with refuses(pattern):
            take(model or a_model(), images, labels)

    refused(r"images: expected \(N, C, H, W\) of floating point, found \(6, 3, 8, 8\) torch.uint8",
            images=IMAGES.to(torch.uint8))
    refused(r"images: expected \(N, C, H, W\) of floating point, found \(3, 8, 8\)", images=IMAGES[0])
    refused(r"images: expected at least one, found 0", images=IMAGES[:0], labels=LABELS[:0])
    refused(r"images: expected at least 2 for the batch norm of this model, found 1", images=IMAGES[:1],
            labels=LABELS[:1])
    refused(r"images: expected finite numbers, found NaN or infinity", images=IMAGES / 0)
    refused(r"labels: expected one for each of 6 images, found \(5,\)", labels=LABELS[:5])
    refused(r"labels: expected whole numbers, found torch.float32", labels=LABELS.float())
    refused(r"labels: expected whole numbers, found torch.bool", labels=LABELS.bool())
    refused(r"labels: expected in \[0, 3\), as the model has classes, found 1 to 3", labels=LABELS + 1)
    refused(r"labels: expected in \[0, 3\), as the model has classes, found -1 to 1", labels=LABELS - 1)
    refused(r"model: expected floating-point parameters, found none", model=nn.Flatten())
    refused(r"model: expected its parameters on one device, not meta, found meta", model=a_model().to("meta"))
    broken = a_model()
    broken.layer3[0].bn1.running_var[1] = float("inf")
    refused(r"model 'layer3.0.bn1.running_var': expected finite numbers, found NaN or infinity", model=broken)
    refused(r"model: expected one that takes images \(2, 3, 8, 8\), found RuntimeError: ", model=nn.Linear(3, 3))
    refused(r"model: expected logits of 2 images by at least 2 classes, found \(2, 3, 8, 8\)",
            model=nn.Conv2d(3, 3, 1))

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = a_model()

        def forward(self, x):
            return self.inner(x), x

    refused(r"model: expected one tensor of logits for images \(2, 3, 8, 8\), found tuple", model=Pair())


def test_a_single_image_does_without_batch_norm():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    assert len(take(plain, IMAGES[:1], LABELS[:1]).images) == 1


def test_global_generators_and_gradient_modes_stay():
    before = torch.get_rng_state()
    with torch.inference_mode(), own_randomness(torch.device("cpu"), generator=torch.Generator().manual_seed(3)):
        first = torch.rand(3)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with own_randomness(torch.device("cpu"), generator=torch.Generator().manual_seed(3)):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)
