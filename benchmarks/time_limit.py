"""Whether one more piece of work ends in time, judged by how long pieces of its kind took so far."""
from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable


class TimeLimit:
    """The end of a run, in seconds of `clock`."""

    def __init__(self, minutes: float = math.inf, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.end = clock() + 60 * minutes
        self.longest: dict[str, float] = {}  # seconds, by kind

    def took(self, kind: str, seconds: float) -> None:
        """A piece of this kind took so long, now or in an earlier run."""
        self.longest[kind] = max(self.longest.get(kind, 0.0), seconds)

    def expected(self, kind: str) -> float:
        """Seconds: the longest of its kind; of a kind not met yet, the median of those of the others."""
        known = list(self.longest.values())
        return self.longest.get(kind, statistics.median(known) if known else 0.0)

    def fits(self, kind: str) -> bool:
        """Whether a piece that starts now ends in time."""
        now = self.clock()
        return now < self.end and now + self.expected(kind) <= self.end

    def minutes_left(self) -> float:
        return max(0.0, self.end - self.clock()) / 60
