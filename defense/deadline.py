"""The end of the time a defense has, asked between steps."""
from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

CAUTION = 1.5  # the next step is taken to last as many times the longest so far
RECENT = 100   # steps whose median tells how long one is


class Steps:
    """Seconds of each step so far, and of the longest: a stage may have a hundred thousand."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.longest = 0.0

    def add(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.longest = max(self.longest, seconds)

    def typical(self, latest: int = 0) -> float:
        """The median, of all or of the `latest`; 0 before the first."""
        return statistics.median(self.seconds[-latest:]) if self.seconds else 0.0


class Deadline:
    """Called before a step: True where that step would end too late. Without `seconds` it never does.

    start: by `clock`, the beginning of the time; None = now. after: what has to be done when the steps have ended, in
    steps: that much of the time is kept free.
    """

    def __init__(self, seconds: float = math.inf, *, clock: Callable[[], float] = time.perf_counter,
                 start: float | None = None, parent: Deadline | None = None, after: float = 0.0) -> None:
        self.clock, self.parent, self.after = clock, parent, after
        self.last = clock()
        self.start = self.last if start is None else start
        self.end = self.start + seconds
        self.steps: Steps = parent.steps if parent else Steps()

    def __call__(self) -> bool:
        if math.isinf(self.end):
            return False
        now = self._now()
        self.steps.add(now - self.last)
        self._leave(now)
        return now + CAUTION * self.steps.longest > self.start + self.length()

    def length(self) -> float:
        """Seconds from the start that there are for the steps."""
        return self.end - self.start - (self.after * self.steps.typical(RECENT) if self.after else 0.0)

    def fits(self, steps: float, latest: int = 0) -> bool:
        """Whether so many steps end in time, judged by the median, of all or of the `latest`: first steps and pauses
        take longer."""
        return self._now() + CAUTION * steps * self.steps.typical(latest) <= self.end

    def part(self, share: float, *, after: float = 0.0) -> Deadline:
        """The end of `share` of the time left, for a stage; what it learns of the steps' length counts here too."""
        now = self._now()
        self._leave(now)
        return Deadline(share * (self.end - now), clock=self.clock, start=now, parent=self, after=after)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._now() - self.start

    def _now(self) -> float:
        if torch.cuda.is_available() and torch.cuda.is_initialized() and math.isfinite(self.end):
            torch.cuda.synchronize()  # else the clock would time the queueing alone
        return self.clock()

    def _leave(self, now: float) -> None:
        """The next step begins now, here and where this is a part of."""
        self.last = now
        if self.parent:
            self.parent._leave(now)
