"""CLP: channels to which small changes of their input matter far more than to the others of their layer are silenced.

Paper: Zheng et al., Data-free Backdoor Removal based on Channel Lipschitzness, ECCV 2022, arXiv:2208.03111. Bound of a
channel: the largest singular value of its kernel as a (inputs, places) matrix, times |weight| / deviation of its batch
norm. No image is used; the clean ones given only judge the result.
As in the released code a batch norm belongs to the last convolution before it in the order of modules; in
pre-activation nets that may be a shortcut's, and a norm over sums of convolutions belongs to one of them.
Departs from it: the deviation includes the norm's epsilon, as in its forward pass (a dead channel was infinite there);
norms of another width than that convolution's, and those after a linear layer, are left alone.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.errors import expect
from defense.baseline import Repaired, run_baseline
from defense.deadline import Deadline
from defense.given import Given
from defense.neurons import Convolution
from defense.results import DefenseResult
from defense.training import Augment, Training


@dataclass(frozen=True)
class ChannelLipschitzConfig:
    deviations: float = 3.0  # u: above mean + u * standard deviation of its layer a channel is silenced

    def __post_init__(self) -> None:
        expect(self.deviations >= 0, "ChannelLipschitzConfig.deviations", ">= 0", self.deviations)


def defend(model: nn.Module, images: Tensor, labels: Tensor, config: ChannelLipschitzConfig, *,
           generator: torch.Generator, augment: Augment | None = None,
           deadline: Deadline | None = None) -> DefenseResult:
    """Silence channels of a copy of `model`: see `run_baseline`. At the deadline the layers left stay as they are."""
    def repair(given: Given, training: Training) -> Repaired:
        pairs, silenced, done = norms_of_convolutions(given.model), 0, 0
        for convolution, norm in pairs:
            if training.deadline():
                break
            outliers = outlying(channel_bounds(convolution, norm), config.deviations)
            silence(norm, outliers)
            silenced, done = silenced + int(outliers.sum()), done + 1
        return Repaired(given.model, complete=done == len(pairs), failed="" if done else "no time to prune",
                        details={"pruned": silenced, "layers": done})

    return run_baseline("clp", repair, model, images, labels, generator=generator, augment=augment,
                        deadline=deadline)


def norms_of_convolutions(model: nn.Module) -> list[tuple[nn.Module, _BatchNorm]]:
    """(convolution, batch norm of its channels), in the order of modules; InputError where there are none."""
    found, last = [], None
    for module in model.modules():
        if isinstance(module, Convolution):
            last = module
        elif isinstance(module, nn.Linear):
            last = None  # a norm after it is of its features
        elif isinstance(module, _BatchNorm) and last is not None and module.num_features == last.out_channels \
                and module.weight is not None and module.running_var is not None:
            found.append((last, module))
    expect(found, "model", "convolutions followed by batch norms with weights and statistics", "none")
    return found


@torch.no_grad()
def channel_bounds(convolution: nn.Module, norm: _BatchNorm) -> Tensor:
    """(C,) bounds >= 0 of how much each output channel's value changes with its input; larger = more suspicious."""
    kernels = convolution.weight.flatten(2)                            # (C, inputs, places)
    scale = norm.weight.abs() / (norm.running_var + norm.eps).sqrt()   # (C,)
    return torch.linalg.matrix_norm(kernels, ord=2) * scale


def outlying(bounds: Tensor, deviations: float) -> Tensor:
    """(C,) mask of the bounds above their mean + `deviations` * their standard deviation; none of a single one."""
    if len(bounds) < 2:
        return torch.zeros_like(bounds, dtype=torch.bool)
    return bounds > bounds.mean() + deviations * bounds.std()


@torch.no_grad()
def silence(norm: _BatchNorm, channels: Tensor) -> None:
    """Zero the weight and the bias of these channels, so that their output is zero."""
    norm.weight[channels] = 0
    if norm.bias is not None:
        norm.bias[channels] = 0
