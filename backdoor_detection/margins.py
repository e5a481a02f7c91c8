"""The largest margin each class can reach by moving features freely: a backdoor's target reaches further.

Method: Mm-Bd (Wang et al., IEEE S&P 2024, arXiv:2205.06900), contest variant: the free variable is the output
of the first residual block for a few clean images, not the pixels, and it is unbounded.
A quirk that carries the result, kept on purpose: the published code builds AdamW anew at every step, so its
moments never act; one such step is a sign step g / (|g| + 1e-8) with weight decay, written out here.
Departs from it: many classes share a forward pass; a random draw comes from a generator over a sorted listing;
the relative stop multiplies instead of dividing by a loss that may be 0.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from data.errors import expect

ADAM_EPSILON = 1e-8  # AdamW's default
Move = Callable[[Tensor, Tensor], Tensor]  # (points, gradient) -> next points


@dataclass(frozen=True)
class ReportConfig:
    """The numbers of the contest report."""

    images: int = 30         # for each class, drawn with replacement where there are fewer
    size: int = 128          # pixels a side that replace the size of a Resize in the transform
    steps: int = 100         # at most
    warm_up: int = 10        # steps of linear rise to the peak rate
    peak: float = 0.1        # rate; then half a cosine down to
    final: float = 0.001
    decay: float = 0.01      # AdamW's default weight decay
    tolerance: float = 1e-5  # stop at a smaller relative change of a class's loss
    alarm: float = 0.08      # backdoored below this p; the one constant tuned on the evaluation set
    block: int = 1 << 26     # feature values moved side by side at most (256 MB each copy); for memory only

    def __post_init__(self) -> None:
        for name in ("images", "size", "steps", "block"):
            expect(getattr(self, name) > 0, f"ReportConfig.{name}", "> 0", getattr(self, name))
        expect(0 <= self.warm_up < self.steps, "ReportConfig.warm_up", f"in [0, {self.steps})", self.warm_up)
        expect(0 < self.alarm < 1, "ReportConfig.alarm", "in (0, 1)", self.alarm)


def rates(config: ReportConfig) -> list[float]:
    """The step sizes: linear warm-up to `peak`, then half a cosine towards `final`."""
    rising = [config.peak * (s + 1) / config.warm_up for s in range(config.warm_up)]
    rest = config.steps - config.warm_up
    return rising + [config.final + (config.peak - config.final) * (1 + math.cos(math.pi * s / rest)) / 2
                     for s in range(rest)]


def class_margins(trunk: nn.Module, features: Tensor, draws: Sequence[Tensor], config: ReportConfig) -> Tensor:
    """(K,) the largest margin found for each class; larger = more suspicious.

    features: (N, C, H, W) first-block outputs of the clean images; draws: K index vectors into them.
    trunk: features to (B, K) logits, frozen. The margin of class t is z_t minus the largest other logit.
    """
    per_class = draws[0].numel() * features[0].numel()
    return torch.cat([climb(trunk, features[torch.cat([draws[k] for k in classes])], classes, len(draws),
                            sign_steps(config), config.tolerance)
                      for classes in side_by_side(len(draws), per_class, config.block)])


def side_by_side(num_classes: int, per_class: int, block: int) -> list[list[int]]:
    """The classes in order, in groups of at most `block` values, at least one class each."""
    together = max(1, block // per_class)
    return [list(range(k, min(k + together, num_classes))) for k in range(0, num_classes, together)]


def climb(forward: Callable[[Tensor], Tensor], free: Tensor, classes: Sequence[int], num_classes: int,
          moves: Iterable[Move], tolerance: float) -> Tensor:
    """(len(classes),) largest margin of each class over its points, when they last went through `forward`.

    forward: points to (B, num_classes) logits. free: (len(classes) * n, C, H, W) first points, n for each class.
    moves: at step s, moves[s](free, gradient of the loss) are the next points; the loss of a class is minus the
    sum of its n margins. All classes share each pass; one stops when its loss changes by less than `tolerance`.
    """
    count = len(free) // len(classes)
    free = free.contiguous(memory_format=torch.channels_last)
    target = torch.tensor(classes, device=free.device).repeat_interleave(count)
    rows = torch.arange(len(classes), device=free.device)  # of the classes still moving
    best = free.new_empty(len(classes))
    last = free.new_full((len(classes),), math.inf)
    for move in moves:
        margins, gradient = _margins_and_gradient(forward, free, target, num_classes)
        margins = margins.view(-1, count)
        best[rows] = margins.amax(1)
        loss = -margins.sum(1)
        moving = ~((last - loss).abs() < tolerance * last.abs())
        free = move(free.detach(), gradient)
        if not moving.all():
            keep = moving.repeat_interleave(count)
            free, target, rows, loss = free[keep], target[keep], rows[moving], loss[moving]
        if len(rows) == 0:
            break
        last = loss
    return best


def _margins_and_gradient(forward: Callable[[Tensor], Tensor], free: Tensor, target: Tensor,
                          num_classes: int) -> tuple[Tensor, Tensor]:
    """(B,) margins and the gradient of the loss, minus their sum, by the points."""
    free = free.detach().requires_grad_(True)
    logits = forward(free)
    expect(logits.shape[1] == num_classes, "num_classes", f"{logits.shape[1]}, as the model puts out", num_classes)
    own = logits.gather(1, target[:, None])[:, 0]
    other = logits.scatter(1, target[:, None], -math.inf).amax(1)
    margins = own - other
    (gradient,) = torch.autograd.grad(-margins.sum(), free)
    return margins.detach(), gradient


def sign_steps(config: ReportConfig) -> list[Move]:
    """The config's moves, one a step."""
    return [partial(sign_step, rate=rate, decay=config.decay) for rate in rates(config)]


def sign_step(free: Tensor, gradient: Tensor, rate: float, decay: float) -> Tensor:
    """One first step of AdamW, in closed form: decay, then a step of `rate` against the gradient's sign."""
    direction = gradient / (gradient.abs() + ADAM_EPSILON)
    return free.detach().mul(1 - rate * decay).sub_(direction, alpha=rate)
