"""Time and memory of a task by stage: counted or timed in small, put up to the size asked for, predicted for a GPU."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import inf, sqrt
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from submit.calibration import synchronize
from submit.op_costs import Cost, Costs, Counted, count, scaled, total
from submit.roofline import Range, Rates
from submit.workloads import Place, Stage, Workload

QUICK_FLOP = 5e10  # of a sample that a CPU may be timed on
HOST = (1.0, 1.5)  # what is timed here counts as measured to half as slow again: sizes and caches differ
FITS, TIGHT, UNKNOWN, EXCEEDS = "fits", "tight", "cannot tell", "does not fit"
CUT_SHORT = "cut short by its own deadline"
TIGHT_UP_TO = 1.5  # times the limit: the slow end of a range that is still called tight


@dataclass(frozen=True)
class Sampled:
    """A stage in small: what it costs at some sizes; the same as this machine does it, and seconds of the largest size
    there, if timed."""

    counted: Mapping[int, Counted] = field(default_factory=dict)
    seconds: float | None = None
    own: Mapping[int, Counted] = field(default_factory=dict)


@dataclass(frozen=True)
class StageProfile:
    """At the size asked for. here: seconds on this machine; predicted: on the GPU, the host's as here. guessed: what
    this machine would take for a stage that was not timed."""

    name: str
    units: str
    host: bool
    costs: Costs
    peak_bytes: float
    weight_bytes: int
    adapts: bool
    here: float | None
    predicted: Range
    guessed: Range | None = None

    def record(self) -> dict:
        cost = total(self.costs)
        return {"stage": self.name, "units": self.units, "on": "host" if self.host else "device", "flop": cost.flop,
                "bytes": cost.bytes, "calls": cost.calls, "peak_bytes": self.peak_bytes, "seconds_here": self.here,
                "seconds_here_predicted": [self.guessed.low, self.guessed.high] if self.guessed else None,
                "seconds": [self.predicted.low, self.predicted.high],
                "flop_by_kind": {"-".join(key): part.flop for key, part in self.costs.items() if part.flop}}


def sample(workload: Workload, timed: Workload, device: torch.device, *, say: Callable[[str], None],
           clock: Callable[[], float] = time.perf_counter) -> dict[str, Sampled]:
    """Every stage in small. timed: the same workload as this machine would run it."""
    found = {}
    for stage, own in zip(workload.stages, timed.stages, strict=True):
        say(stage.name)
        with TemporaryDirectory() as folder, torch.inference_mode(not stage.gradients):
            place = Place(Path(folder), device)
            counted, as_here = _counted(stage, place), _counted(own, place)
            seconds = _seconds(own, own.sizes[-1], place, clock) if _may_be_timed(own, as_here, device) else None
        found[stage.name] = Sampled(counted, seconds, as_here)
    return found


def _counted(stage: Stage, place: Place) -> Mapping[int, Counted]:
    where = replace(place, device=torch.device("meta")) if stage.net else place
    return {} if stage.host else {n: count(stage.prepare(n, where)) for n in stage.sizes}


def _may_be_timed(stage: Stage, counted: Mapping[int, Counted], device: torch.device) -> bool:
    """A large net on a CPU would take minutes; everything else is timed."""
    return not stage.net or device.type == "cuda" or total(counted[stage.sizes[-1]].costs).flop < QUICK_FLOP


def _seconds(stage: Stage, size: int, place: Place, clock: Callable[[], float]) -> float:
    """Of the largest sample: of its second run, unless the first is what users see."""
    work = stage.prepare(size, place)
    if not stage.once:
        work()
    synchronize(place.device)
    begin = clock()
    work()
    synchronize(place.device)
    return clock() - begin


def stage_profiles(workload: Workload, samples: Mapping[str, Sampled], rates: Rates, here: Rates | None = None
                   ) -> list[StageProfile]:
    """Every stage at the size of the workload. here: of this machine, for stages that were not timed."""
    return [_profile(stage, samples[stage.name], rates, here) for stage in workload.stages]


def _profile(stage: Stage, found: Sampled, rates: Rates, own_rates: Rates | None) -> StageProfile:
    costs = scaled(_fitted_costs(stage, found.counted), stage.times)
    units = f"{stage.units} {stage.counted}" + (f" x {stage.times}" if stage.times > 1 else "")
    here = guessed = None
    if found.seconds is not None:
        here = found.seconds * _growth(stage, found)
    elif own_rates is not None:
        guessed = own_rates.seconds(_own_costs(stage, found))
    predicted = Range(HOST[0] * here, HOST[1] * here) if stage.host else rates.seconds(costs)
    return StageProfile(stage.name, units, stage.host, costs, _peak(stage, found.counted),
                        stage.weight_bytes, stage.adapts, here, predicted, guessed)


def _growth(stage: Stage, found: Sampled) -> float:
    """How many times the largest sample the whole is on this machine: by operations, else bytes, else units."""
    if stage.host:
        return stage.units * stage.times / stage.sizes[-1]
    own = found.own or found.counted
    whole, part = total(_own_costs(stage, found)), total(own[max(own)].costs)
    return whole.flop / part.flop if part.flop else whole.bytes / part.bytes


def _own_costs(stage: Stage, found: Sampled) -> Costs:
    """Of the whole as this machine does it."""
    return scaled(_fitted_costs(stage, found.own or found.counted), stage.times)


def _fitted_costs(stage: Stage, counted: Mapping[int, Counted]) -> Costs:
    keys = dict.fromkeys(key for one in counted.values() for key in one.costs)

    def at(part: Callable[[Cost], float], key: tuple[str, str]) -> float:
        return through({n: part(one.costs.get(key, Cost())) for n, one in counted.items()}, stage.units)

    return {key: Cost(at(lambda c: c.flop, key), at(lambda c: c.bytes, key), at(lambda c: c.calls, key))
            for key in keys}


def _peak(stage: Stage, counted: Mapping[int, Counted]) -> float:
    """Bytes on the device at once; a net's units pass in batches of the sample's size."""
    if stage.host:
        return 0.0
    if stage.adapts:
        return float(stage.kept_bytes * stage.units)
    peaks = {n: float(one.peak_bytes) for n, one in counted.items()}
    made = peaks[max(peaks)] if stage.net else through(peaks, stage.units)
    return made + stage.kept_bytes * stage.units


def through(points: Mapping[int, float], n: int) -> float:
    """At n of the polynomial through the points (Lagrange), never negative; of one point: in proportion."""
    if len(points) == 1:
        (size, value), = points.items()
        return value * n / size
    result = 0.0
    for size, value in points.items():
        for other in points:
            if other != size:
                value *= (n - other) / (size - other)
        result += value
    return max(0.0, result)


# --- what it means

def whole(stages: list[StageProfile]) -> Range:
    """Of all stages: at best the host's work hides behind the device's or the other way, at worst they take turns."""
    host = [stage.predicted for stage in stages if stage.host]
    device = [stage.predicted for stage in stages if not stage.host]
    return Range(max(sum(r.low for r in host), sum(r.low for r in device)),
                 sum(r.high for r in host) + sum(r.high for r in device))


def peak_bytes(stages: list[StageProfile], memory: float = inf) -> float:
    """Of the stage that takes most, and of all weights, which stay. A stage that adapts takes what there is at most."""
    weights = sum(stage.weight_bytes for stage in stages)
    return weights + max(min(stage.peak_bytes, max(0.0, memory - weights)) if stage.adapts else stage.peak_bytes
                         for stage in stages)


def verdict(seconds: Range, limit: float, peak: float, memory: float, *, planned: bool = False) -> str:
    """fits: also at the slow end. tight: the slow end is up to half above the limit. memory, peak: bytes. planned: the
    work keeps a deadline of its own, so too little time means less of it."""
    if peak > memory:
        return EXCEEDS
    if seconds.low > limit:
        return CUT_SHORT if planned else EXCEEDS
    if seconds.high <= limit:
        return FITS
    return TIGHT if seconds.high <= TIGHT_UP_TO * limit else UNKNOWN


def largest(build: Callable[[int], Workload], samples: Mapping[str, Sampled], rates: Rates, limit: float,
            memory: float, *, start: int, least: int = 1, most: int = 10**7) -> int:
    """About the largest size that surely fits, at least 99 % of it, by halving; 0: none from `least` on does. Costs
    are taken to grow with the size."""
    def fits(n: int) -> bool:
        if n < least:
            return False
        stages = stage_profiles(build(n), samples, rates)
        return verdict(whole(stages), limit, peak_bytes(stages, memory), memory) == FITS

    low, high = (start, most) if fits(start) else (0, start)
    while high - low > max(1, low // 100):
        middle = round(sqrt(low * high)) if low > 100 else (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
