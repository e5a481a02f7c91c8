"""What this machine's device reaches, measured in a few seconds: the rates of `submit.roofline`.

For each kind of operation several shapes that nets really have; the range spans them. Anything else that runs
meanwhile makes the device look slower than it is.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, layer_norm, scaled_dot_product_attention

from data.devices import half_is_faster
from submit.op_costs import ATTENTION, CONVOLUTION, DOUBLE, HALF, MATMUL, SINGLE, count, total
from submit.roofline import Range, Rates

DTYPES = {"cuda": {HALF: torch.float16, SINGLE: torch.float32, DOUBLE: torch.float64},
          "cpu": {HALF: torch.bfloat16, SINGLE: torch.float32, DOUBLE: torch.float64}}
PRODUCTS = ((256, 384, 384), (1024, 1024, 1024), (2048, 192, 768), (4096, 64, 1024))      # rows, inner, columns
IMAGES = ((16, 3, 64, 32), (16, 32, 32, 64), (8, 128, 16, 128), (2, 64, 64, 64))          # images, in, side, out
HEADS = ((2, 6, 196, 64), (1, 16, 576, 64), (8, 3, 64, 32))                               # images, heads, tokens, D
MOVED = (1 << 20, 1 << 24)  # numbers
LARGER = 8                  # times as many rows, images or numbers on a GPU, which small shapes do not fill
LEAST_S, REPEATS = 0.02, 3  # seconds of one timing, timings of which the best counts
TINY_CALLS = 200


@torch.no_grad()
def measured_rates(device: torch.device, *, clock: Callable[[], float] = time.perf_counter) -> Rates:
    """Ranges over the shapes above."""
    flop: dict[tuple[str, str], list[float]] = {}
    for key, work in _products(device):
        flop.setdefault(key, []).append(total(count(work).costs).flop / _seconds(work, device, clock))
    moved = [total(count(work).costs).bytes / _seconds(work, device, clock) for work in _moves(device)]
    one = torch.zeros(1, device=device)
    launch = _seconds(lambda: [one.add(1) for _ in range(TINY_CALLS)], device, clock) / TINY_CALLS
    return Rates({key: Range(min(found), max(found)) for key, found in flop.items()},
                 Range(min(moved), max(moved)), Range(launch, 3 * launch))


def _products(device: torch.device) -> Iterator[tuple[tuple[str, str], Callable[[], Tensor]]]:
    """(kind, precision) and work of it, made one after the other."""
    more = LARGER if device.type == "cuda" else 1
    for precision, dtype in DTYPES[device.type].items():
        if precision == HALF and not half_is_faster(device):
            continue
        new = {"dtype": dtype, "device": device}
        for rows, inner, columns in PRODUCTS:
            a, b = torch.randn(more * rows, inner, **new), torch.randn(inner, columns, **new)
            yield (MATMUL, precision), lambda a=a, b=b: a @ b
        if precision == DOUBLE:
            continue
        for images, inside, side, outside in IMAGES:
            x = torch.randn(more * images, inside, side, side, **new).contiguous(memory_format=torch.channels_last)
            w = torch.randn(outside, inside, 3, 3, **new)
            yield (CONVOLUTION, precision), lambda x=x, w=w: conv2d(x, w, padding=1)
            yield (CONVOLUTION, precision), lambda x=x, w=w: _backward(x, w)
        for images, heads, tokens, width in HEADS:
            q = torch.randn(more * images, heads, tokens, width, **new)
            yield (ATTENTION, precision), lambda q=q: scaled_dot_product_attention(q, q, q)


def _backward(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a convolution: on CPUs far slower than itself. The result's own gradient is one everywhere."""
    ones = x.new_ones(()).expand(len(x), len(w), *x.shape[2:])
    return torch.ops.aten.convolution_backward(ones, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
                                               [True, True, False])


def _moves(device: torch.device) -> Iterator[Callable[[], Tensor]]:
    """Work that is bound by memory."""
    more = LARGER if device.type == "cuda" else 1
    for numbers in MOVED:
        x = torch.randn(more * numbers // 256, 256, device=device)
        yield lambda x=x: x + 1
        yield lambda x=x: layer_norm(x, (256,))
        yield lambda x=x: interpolate(x.view(-1, 1, 64, 64), scale_factor=2, mode="bilinear")


def _seconds(work: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Of one call, after a warm-up; the quickest of some timings, as other programs only slow it down."""
    work()
    times = 1
    while (spent := _timed(work, times, device, clock)) < LEAST_S:
        times = max(2 * times, int(times * LEAST_S / max(spent, 1e-9)))
    return min(spent, *(_timed(work, times, device, clock) for _ in range(REPEATS - 1))) / times


def _timed(work: Callable[[], object], times: int, device: torch.device, clock: Callable[[], float]) -> float:
    synchronize(device)
    begin = clock()
    for _ in range(times):
        work()
    synchronize(device)
    return clock() - begin


def synchronize(device: torch.device) -> None:
    """Wait for what is queued on a GPU, which a clock would else not see."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
