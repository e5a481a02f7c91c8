"""The steps of `benchmarks.full_size`, as data."""
from __future__ import annotations

from dataclasses import dataclass

CIFAR = ("cifar10",)


@dataclass(frozen=True)
class Step:
    """One command. full, tiny: its arguments, with {data}, {start}, {minutes} and {out} (its record, or the folder of
    its weights) to be filled in; `{minutes}` is there where it stops by itself and goes on when it is called again."""

    name: str
    module: str             # python -m
    record: str             # name of its file, without the ending
    full: str
    tiny: str
    least: float = 0.5      # minutes that are worth starting it; a guess where it cannot stop by itself
    sets: tuple[str, ...] = ()  # folders in --data
    weights: bool = False   # {out} is a folder of weights with a card

    def arguments(self, tiny: bool) -> str:
        return self.tiny if tiny else self.full


STEPS = (
    Step("zoo", "benchmarks.contest_zoo", "contest_zoo_contest",
         "--data {data} --recipe contest --workers 6 --minutes {minutes} --out {out}",
         "--recipe benchmarks/tiny/zoo.toml --detectors trodo --minutes {minutes} --out {out}",
         sets=("cifar10", "mnist", "gtsrb32")),
)
