"""From counted costs to seconds on a device, by a roofline for each kind of operation.

seconds = max(flop / rate, bytes / bandwidth) + calls * launch, summed over kinds and precisions. A rate is never one
number: what a GPU reaches of its peak depends on shapes that a table does not know. So every rate is a range, and so is
every prediction. Where this machine has a GPU of the table, its shares of peak are measured and carried over; else
`ASSUMED` holds.
"""
from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

from data.errors import expect
from data.toml_files import read_toml
from submit.op_costs import ATTENTION, CONVOLUTION, DOUBLE, HALF, MATMUL, MEMORY, SINGLE, Cost, Costs

COMPUTING, PRECISIONS = (MATMUL, CONVOLUTION, ATTENTION), (HALF, SINGLE, DOUBLE)
TABLE = Path(__file__).with_name("gpus.toml")
# Shares of peak that well-sized work reaches, least and most; nobody's measurement: wide on purpose.
ASSUMED = {MATMUL: (0.40, 0.85), CONVOLUTION: (0.20, 0.70), ATTENTION: (0.20, 0.65), MEMORY: (0.40, 0.85)}
LAUNCH_S = (4e-6, 15e-6)   # of one operator from Python on a GPU
CARRIED = (0.6, 1.0)       # of the share that this machine's GPU reaches: what another GPU is taken to reach


@dataclass(frozen=True)
class Range:
    """Least and most."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)


@dataclass(frozen=True)
class Gpu:
    key: str
    name: str
    memory: float  # GiB
    bandwidth: float  # GB/s
    peaks: Mapping[str, float]  # precision, and "tf32" -> TFLOPS

    def peak(self, kind: str, precision: str) -> float:
        """Operations a second; convolutions of float32 run in TF32, as torch does it."""
        tf32 = kind == CONVOLUTION and precision == SINGLE
        return 1e12 * self.peaks["tf32" if tf32 else precision]


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: flop of (kind, precision), bytes, and the seconds of a call."""

    flop: Mapping[tuple[str, str], Range]
    bytes: Range
    launch: Range

    def seconds(self, costs: Costs) -> Range:
        """Of counted costs."""
        return sum((self._seconds(key, cost) for key, cost in costs.items()), Range(0.0, 0.0))

    def _seconds(self, key: tuple[str, str], cost: Cost) -> Range:
        rate = self.flop.get(key) or self.flop.get((key[0], SINGLE), Range(math.inf, math.inf))  # memory: no flop
        worst = max(cost.flop / rate.low, cost.bytes / self.bytes.low)
        best = max(cost.flop / rate.high, cost.bytes / self.bytes.high)
        return Range(best + cost.calls * self.launch.low, worst + cost.calls * self.launch.high)


@cache
def gpus() -> Mapping[str, Gpu]:
    """Every GPU of the table by its key."""
    table = read_toml(TABLE)
    return {key: Gpu(key, row["name"], row["memory"], row["bandwidth"],
                     {name: row[name] for name in (*PRECISIONS, "tf32")}) for key, row in table.items()}


def gpu(key: str) -> Gpu:
    """The GPU of this key; an unknown one is refused with those there are."""
    expect(key in gpus(), "--gpu", f"one of {', '.join(gpus())}, or here", key)
    return gpus()[key]


def gpu_called(device_name: str) -> Gpu | None:
    """The GPU of the table that a driver's device name means; None where none does."""
    words = re.split(r"[^A-Za-z0-9]+", device_name)
    if "Laptop" in words:  # the same name, another chip
        return None
    fitting = [found for found in gpus().values() if set(found.name.split()) <= set(words)]
    return max(fitting, key=lambda found: len(found.name), default=None)


def assumed_rates(target: Gpu) -> Rates:
    """Of a GPU that nothing was measured on."""
    return _rates(target, {}, Range(*ASSUMED[MEMORY]), Range(*LAUNCH_S))


def carried_rates(measured: Rates, here: Gpu, target: Gpu) -> Rates:
    """Of `target`, from what this machine's GPU `here` was measured to reach of its own peaks."""
    shares = {key: _share(rate, here.peak(*key)) for key, rate in measured.flop.items()}
    return _rates(target, shares, _share(measured.bytes, 1e9 * here.bandwidth), measured.launch)


def _share(rate: Range, peak: float) -> Range:
    return Range(min(1.0, CARRIED[0] * rate.low / peak), min(1.0, CARRIED[1] * rate.high / peak))


def _rates(target: Gpu, shares: Mapping[tuple[str, str], Range], memory: Range, launch: Range) -> Rates:
    """Shares of the target's peaks; those that are not given are assumed."""
    flop = {}
    for kind, precision in product(COMPUTING, PRECISIONS):
        share, peak = shares.get((kind, precision), Range(*ASSUMED[kind])), target.peak(kind, precision)
        flop[kind, precision] = Range(share.low * peak, share.high * peak)
    bandwidth = 1e9 * target.bandwidth
    return Rates(flop, Range(memory.low * bandwidth, memory.high * bandwidth), launch)
