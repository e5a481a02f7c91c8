import copy

import torch
from torch import nn

from backdoor_detection.split_model import SplitModel, frozen_copy, input_channels
from data.preact_resnet import new_model


def a_model(channels=3):
    """Norms differ from the initial ones, so that a wrong fold shows."""
    model = new_model(4, (2, 4, 4, 8), channels, seed=0)
    generator = torch.Generator().manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        norm.bias.data.uniform_(-0.5, 0.5, generator=generator)
        norm.running_mean.uniform_(-0.5, 0.5, generator=generator)
    return model.eval()


class AfterNorm(nn.Module):
    """Names as in a PreActResNet18, but a norm after each convolution: bn2 must not be folded into conv1."""

    def __init__(self):
        super().__init__()
        self.inner = a_model()
        for name in ("conv1", "layer1", "layer2", "layer3", "layer4", "avgpool", "linear"):
            setattr(self, name, getattr(self.inner, name))
        self.bn1 = nn.BatchNorm2d(2)  # does not commute with bn2
        self.bn1.running_var.fill_(0.25)
        self.bn2 = nn.BatchNorm2d(2)
        self.bn2.running_mean.fill_(3.0)

    def forward(self, x):
        return self.bn2(self.bn1(self.conv1(x)))


def test_a_frozen_copy_computes_the_model_and_leaves_it():
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    for model in (a_model(), AfterNorm().eval(), nn.Sequential(nn.Flatten(), nn.Linear(192, 4))):
        expected, state = model(x).detach(), copy.deepcopy(model.state_dict())
        net = frozen_copy(model.train())
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
        assert not any(p.requires_grad for p in net.parameters()) and not any(m.training for m in net.modules())
        assert model.training and all(p.requires_grad for p in model.parameters())
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_channels_of_the_first_convolution_count():
    assert input_channels(a_model(1)) == 1 and input_channels(nn.Sequential(a_model(5))) == 5
    assert input_channels(nn.Linear(2, 2)) == 3


def test_another_network_is_not_split(refuses):
    with refuses("model: expected a PreActResNet18 with 'conv1', found Linear"):
        SplitModel(nn.Linear(2, 4))
    with refuses("model: expected a PreActResNet18, without a norm after its stem, found AfterNorm"):
        SplitModel(AfterNorm())
