"""How well poisoned training images are told from the others: `python -m benchmarks.poisoned_samples [--seeds N]`.

A narrow network learns the built-in digits, a tenth of them with a white square (BadNets); SPC and MSPC then score
some of its training images. The record: AUROC of both, and what MSPC calls suspects, by seed. MSPC's settings are the
published ones but for the batch, which is small as the set is, so that the mask has 400 steps.
"""
from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score

from data.badnets import BadNetsConfig, poison
from data.files import write_json
from data.image_sets import read_digits
from data.victims import VictimConfig, attack_success, clean_accuracy, train_victim
from defense.scaled_consistency import (
    ConsistencyConfig,
    MaskedConsistencyConfig,
    masked_scaled_consistency,
    scaled_consistency,
)
from submit.records import environment

RECORD = Path(__file__).parent / "records" / "poisoned_samples.json"
VICTIM = VictimConfig(widths=(8, 8, 16, 16), epochs=25, rate=0.1, warm_up=0.1, crop=0, precision="float32")
SCORED = 300  # training images, the first: the set is in random order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    torch.set_num_threads(1)
    runs = []
    for seed in range(parser.parse_args().seeds):
        runs.append(one_run(seed))
        print(runs[-1], flush=True)
        means = {key: statistics.mean(run[key] for run in runs) for key in ("SPC", "MSPC first", "MSPC")}
        write_json(RECORD, {"command": f"python -m benchmarks.poisoned_samples --seeds {len(runs)}", "mean": means,
                            "widths": VICTIM.widths, "scored": SCORED, "runs": runs, "environment": environment()})


def normalise(images: torch.Tensor) -> torch.Tensor:
    """As `VICTIM` has its mean and std."""
    return (images - 0.5) / 0.5


def one_run(seed: int) -> dict[str, float]:
    """AUROC of each score; shares of the poisoned and of the clean images that MSPC suspects."""
    train, test = read_digits(seed=seed)
    bad = poison(train, BadNetsConfig(), ratio=0.1, target=0, seed=seed)
    model = train_victim(bad.images, bad.labels, bad.num_classes, VICTIM, seed=seed)
    poisoned = torch.zeros(len(bad.images), dtype=torch.bool)
    poisoned[bad.poisoned] = True
    images, poisoned = bad.images[:SCORED].float() / 255, poisoned[:SCORED]
    begun = time.perf_counter()
    plain = scaled_consistency(model, images, ConsistencyConfig(), normalise=normalise)
    masked = masked_scaled_consistency(model, images, MaskedConsistencyConfig(batch=30), normalise=normalise)
    return {"seed": seed, "ACC": clean_accuracy(model, test, VICTIM),
            "ASR": attack_success(model, test, VICTIM, bad.trigger, 0), "poisoned": int(poisoned.sum()),
            "SPC": roc_auc_score(poisoned, plain), "MSPC first": roc_auc_score(poisoned, masked.first),
            "MSPC": roc_auc_score(poisoned, masked.scores),
            "suspected poisoned": (masked.scores > 0)[poisoned].float().mean().item(),
            "suspected clean": (masked.scores > 0)[~poisoned].float().mean().item(),
            "mask corner": masked.mask[-3:, -3:].mean().item(), "mask": masked.mask.mean().item(),
            "seconds": time.perf_counter() - begun}


if __name__ == "__main__":
    main()
