"""What every defense of a model returns."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class DefenseResult:
    """model: the repaired copy, every number finite; device, dtypes, flags and modes are the given model's.

    finite: False where a stage gave NaN or infinity; `model` is then the last state before that.
    complete: False where the deadline, or such a stage, ended the work early.
    failed: why `model` is not repaired at all; empty where it is.
    losses: mean of each epoch of the last training stage. details: the method's own record, JSON values.
    """

    method: str
    model: nn.Module
    finite: bool = True
    complete: bool = True
    failed: str = ""
    losses: tuple[float, ...] = ()
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Everything but the model, as JSON values."""
        return {"method": self.method, "finite": self.finite, "complete": self.complete, "failed": self.failed,
                "losses": list(self.losses), "seconds": self.seconds, **self.details}
