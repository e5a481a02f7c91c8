"""What a backdoor looks like from inside: weight change under unlearning, activeness, trigger activation change.

Paper: Lin et al., NeurIPS 2024, arXiv:2405.20291: neurons that unlearning clean images changes most are those that
unlearning poisoned images changes most (Observation 1), and a backdoor's neurons have large gradients (Observation 2).
Trigger activation change (TAC): Zheng et al., Data-free Backdoor Removal Based on Channel Lipschitzness, ECCV 2022,
arXiv:2208.03111; here absolute changes are summed over space, as BackdoorBench does.
Everything is by layer, {name of the weight: (neurons,)}, on the CPU, the layers being those of `neuron_weights`; the
model given stays as it is. `submit/observation_plots.py` draws them.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data.errors import expect
from defense.deadline import Deadline
from defense.given import Given, evaluation, own_randomness, take
from defense.neurons import neuron_weights
from defense.training import EVALUATION_BATCH, Augment, Training, run_epochs, training_mode
from defense.unlearning import UnlearningConfig, clean_unlearning
from defense.weight_change import weight_change

ByLayer = dict[str, Tensor]


def unlearning_change(model: nn.Module, images: Tensor, labels: Tensor, config: UnlearningConfig, *,
                      generator: torch.Generator, kinds: str = "auto", augment: Augment | None = None) -> ByLayer:
    """Neuron weight change (NWC) from unlearning these images: clean unlearning with clean ones, poison unlearning with
    triggered ones labelled as the attacker wants. >= 0, larger = more moved.

    images: (N, C, H, W) float as the model takes them. labels: (N,). InputError where no epoch stayed finite.
    """
    with own_randomness(next(model.parameters()).device, generator=generator):
        given = take(model, images, labels)
        unlearned = clean_unlearning(given.model, _training(given, generator, augment), given.num_classes, config)
    expect(unlearned.epochs.losses, "unlearning", "a finite epoch (a smaller rate)", "none")
    change = weight_change(neuron_weights(given.model, given.num_classes, kinds),
                           dict(unlearned.model.named_parameters()))
    return {name: part.flatten(1).sum(1).cpu() for name, part in change.items()}


def unlearning_activeness(model: nn.Module, images: Tensor, labels: Tensor, config: UnlearningConfig, *,
                          generator: torch.Generator, kinds: str = "auto", augment: Augment | None = None) -> ByLayer:
    """Activeness: sum over a neuron's weights of |gradient of the loss|, the mean over the batches of the first epoch
    of unlearning these images. >= 0, larger = more active. Arguments as of `unlearning_change`."""
    with own_randomness(next(model.parameters()).device, generator=generator):
        given = take(model, images, labels)
        watched = neuron_weights(given.model, given.num_classes, kinds)
        parameters = list(given.model.parameters())
        optimiser = torch.optim.SGD(parameters, config.rate, config.momentum, maximize=True)
        sums: ByLayer = {}

        def ascend(batch: Tensor, truth: Tensor) -> Tensor:
            loss = cross_entropy(given.model(batch), truth)
            optimiser.zero_grad()
            loss.backward()
            for name, weight in watched.items():
                active = weight.grad.abs().flatten(1).sum(1)
                sums[name] = sums[name] + active if name in sums else active
            optimiser.step()
            return loss.detach()

        training_mode(given.model, config.statistics)
        went = run_epochs(given.model, _training(given, generator, augment), ascend, epochs=1, batch=config.batch)
    expect(went.losses, "unlearning", "a finite epoch (a smaller rate)", "none")
    return {name: (total / went.steps).cpu() for name, total in sums.items()}


def _training(given: Given, generator: torch.Generator, augment: Augment | None) -> Training:
    return Training(given.images, given.labels, generator, augment, Deadline())


@torch.no_grad()
def trigger_activation_change(model: nn.Module, images: Tensor, triggered: Tensor, *, kinds: str = "auto") -> ByLayer:
    """TAC: sum over a neuron's outputs of |f(x) - f(trigger(x))|, the mean over images. >= 0, larger = more of the
    backdoor's.

    images, triggered: (N, C, H, W) float as the model takes them, in the same order; convolutions and linear layers
    are looked at, in evaluation mode; attention's projections give their hooks no output and are left out:
    `joined` with a second argument keeps other values to the layers that are left.
    """
    expect(images.shape == triggered.shape and len(images) > 0, "images, triggered",
           "as many of both, of one shape, at least one", (tuple(images.shape), tuple(triggered.shape)))
    given = take(model, images, torch.zeros(len(images), dtype=torch.int64))
    triggered = triggered.to(given.images.device, given.images.dtype)
    modules = dict(given.model.named_modules())
    layers = {name: modules[name.removesuffix(".weight")]
              for name in neuron_weights(given.model, given.num_classes, kinds) if name.endswith(".weight")}
    sums: ByLayer = {}
    for clean, changed in zip(given.images.split(EVALUATION_BATCH), triggered.split(EVALUATION_BATCH), strict=True):
        before, after = (outputs(given.model, layers, part) for part in (clean, changed))
        for name in (seen for seen in layers if seen in before):
            moved = (after[name] - before[name]).abs().flatten(2).sum((0, 2)).cpu()
            sums[name] = sums[name] + moved if name in sums else moved
    return {name: total / len(images) for name, total in sums.items()}


def outputs(model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor) -> ByLayer:
    """(B, neurons, places) of each layer for one batch, in evaluation mode; a linear layer's tokens are its places."""
    seen: ByLayer = {}
    handles = [layer.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
               for name, layer in layers.items()]
    try:
        with evaluation(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: output.flatten(1, -2).transpose(1, 2) if isinstance(layers[name], nn.Linear) and output.ndim > 2
            else output.reshape(*output.shape[:2], -1) for name, output in seen.items()}


def joined(values: Mapping[str, Tensor], among: Mapping[str, Tensor] | None = None) -> Tensor:
    """(M,) all neurons, the layers one after the other; of the layers that `among` has too, if given."""
    return torch.cat([part for name, part in values.items() if among is None or name in among])


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's, in [-1, 1], of two (M,) tensors; InputError where one of them is constant."""
    expect(one.shape == other.shape and one.ndim == 1 and len(one) > 1, "correlation", "two of (M,), M > 1",
           (tuple(one.shape), tuple(other.shape)))
    centred = [part.double() - part.double().mean() for part in (one, other)]
    norms = [part.norm() for part in centred]
    expect(min(norms) > 0, "correlation", "values that differ", "equal ones")
    return float(centred[0] @ centred[1] / (norms[0] * norms[1]))


def coverage(scores: Tensor, tac: Tensor, shares: Sequence[float]) -> Tensor:
    """(S,) float64: share of the top neurons by TAC that are also top by `scores`, for each share of all neurons.

    scores, tac: (M,), higher = more suspicious; of equal ones the first. A random order gives the share itself.
    """
    expect(scores.shape == tac.shape and scores.ndim == 1, "scores, tac", "(M,) each",
           (tuple(scores.shape), tuple(tac.shape)))
    ranks = [torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
             for order in (part.cpu().argsort(descending=True, stable=True) for part in (scores, tac))]
    found = []
    for share in shares:
        expect(0 < share <= 1, "shares", "in (0, 1]", share)
        count = max(1, int(share * len(scores) + 1e-9))
        found.append(((ranks[0] < count) & (ranks[1] < count)).double().sum() / count)
    return torch.stack(found)
