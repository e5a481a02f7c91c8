"""The steps of `benchmarks.full_size`, as data: short ones first, then those that go on for many calls."""
from __future__ import annotations

from dataclasses import dataclass

CIFAR = ("cifar10",)
TINY = "benchmarks/tiny"


@dataclass(frozen=True)
class Step:
    """One command. full, tiny: its arguments, with {data}, {start}, {photos}, {minutes} and {out} (its record, or the
    folder of its weights) to be filled in; `{minutes}` is there where it stops by itself and goes on when it is called
    again. An empty `tiny`: not run in small."""

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


def anomaly(images: int, least: float) -> Step:
    return Step(f"anomaly {images}", "benchmarks.anomaly_category", f"anomaly_category_report_{images}",
                f"--preset report --images {images} --out {{out}}", "--preset embedded --images 4 --out {out}", least)


def weights(name: str, steps: int, *, tiny: int = 0, more: str = "") -> Step:
    """Training ends when it is interrupted and goes on from its checkpoint, on the same machine. tiny: its steps in
    small."""
    small = f"weights train {name} --steps {tiny} --device cpu --out {{out}}" if tiny else ""
    return Step(f"train {name}", "submit", "",
                f"weights train {name} --steps {steps} --device cuda --out {{out}}{more}", small, weights=True)


STEPS = (
    Step("profile", "benchmarks.profile_prediction", "profile_prediction",
         "--device cuda --preset report --minutes {minutes} --out {out}",
         "--device cpu --most 1 --minutes {minutes} --out {out}"),
    Step("mutual scoring", "benchmarks.mutual_scoring", "mutual_scoring",
         "--device cuda --images 16 64 256 1000 --minutes {minutes} --out {out}",
         "--device cpu --images 4 --patches 9 --widths 8 --minutes {minutes} --out {out}"),
    anomaly(200, 3.0),
    anomaly(1000, 6.0),
    Step("encoder", "benchmarks.encoder_speed", "encoder_speed", "--minutes {minutes} --out {out}",
         "--net embedded --batches 1 2 --rows 6 --minutes {minutes} --out {out}"),
    Step("detector", "benchmarks.backdoor_speed", "backdoor_speed", "--minutes {minutes} --out {out}",
         "--tiny --minutes {minutes} --out {out}"),
    Step("victims", "benchmarks.victim_training", "victim_training",
         "--width 64 --images 25600 --rounds 3 --together 6 --loaders 8 --out {out}",
         "--width 2 --images 128 --rounds 1 --loaders 1 --together 1 --out {out}", 4.0),
    Step("tsbd", "benchmarks.tsbd_speed", "tsbd_speed",
         "--recipe data/recipes/defense_full.toml --data {data} --clean 2500 --batch 256 --epochs 20 --turns 2 "
         "--workers 8 --out {out}",
         f"--recipe {TINY}/defense_victims.toml --clean 16 --batch 8 --epochs 1 --turns 1 --workers 0 --out {{out}}",
         6.0, CIFAR),
    Step("dvae", "benchmarks.dvae_speed", "dvae_speed",
         "--data {data} --images 25600 --epochs 2 --width 64 --latent 256 --rounds 2 --loaders 8 --out {out}",
         "--images 128 --epochs 1 --width 4 --latent 4 --rounds 1 --loaders 1 --out {out}", 4.0, CIFAR),
    Step("zoo", "benchmarks.contest_zoo", "contest_zoo_contest",
         "--data {data} --recipe contest --workers 6 --minutes {minutes} --out {out}",
         f"--recipe {TINY}/zoo.toml --detectors trodo --minutes {{minutes}} --out {{out}}",
         3.0, ("cifar10", "mnist", "gtsrb32")),
    Step("defenses", "benchmarks.defense_sweep", "defense_sweep_full",
         "--data {data} --recipe full --drop --workers 4 --minutes {minutes} --out {out}",
         f"--recipe {TINY}/defense.toml --drop --minutes {{minutes}} --out {{out}}", 3.0, CIFAR),
    Step("unlearnable", "benchmarks.unlearnable_sweep", "unlearnable_full",
         "--data {data} --recipe unlearnable_full --workers 6 --minutes {minutes} --out {out}",
         f"--recipe {TINY}/unlearnable.toml --minutes {{minutes}} --out {{out}}", 3.0, CIFAR),
    weights("encoder", 6000, tiny=1),
    weights("backbone", 28_000, tiny=1, more=" --photos {photos}"),  # four times what ships
    weights("parser", 27_000, more=" --start {start}"),  # in small it would take as long as all others together
)
