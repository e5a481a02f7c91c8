"""TSBD with one thing changed at a time: `python -m benchmarks.defense_ablations`.

Which weights are zeroed (V1 whole neurons, V2 weights anywhere, V3 both), how the network is tuned (with the gradient's
norm, plainly, not at all), the shares n and m, 1 to 10 % clean images; on backdoored networks of a zoo, finished runs
kept under runs/defend. And a small ViT, trained here on the built-in digits under BadNets, before and after.
"""
from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.functional import cross_entropy

from data.attacks import poison
from data.devices import chosen_device
from data.errors import expect
from data.files import write_json
from data.image_sets import read_digits
from data.model_zoo import ZooModel, read_zoo
from data.victims import VictimConfig, augment, normalise
from defense.deadline import Deadline
from defense.defenses import defense_config
from defense.given import own_randomness, take
from defense.metrics import defense_effectiveness
from defense.neurons import neuron_weights
from defense.training import Shift, Training
from defense.tsbd import defend
from defense.unlearning import UnlearningConfig, clean_unlearning
from defense.weight_change import weight_change
from defense.zero_reinitialisation import ReinitialisationConfig, weights_to_zero, zero_reinitialisation
from submit.defense_runs import Plan, victim_units
from submit.dev_splits import TINY_ZOO
from submit.records import environment
from submit.zoo_victims import Victim, clean_part, measured, own_seed, read_victim

RECORDS = Path(__file__).parent / "records"
NETWORKS = ("digits-blended-0.1-0", "digits-low_frequency-0.1-0")
BATCH = 32
PART = {"batch": BATCH}
FORGET = {"batch": BATCH, "rate": 5e-4}  # five times the published rate: a fifth of the epochs
BASE: dict[str, Any] = {"neurons": 0.15, "unlearning": FORGET, "tuning": PART}
UNTUNED = "no tuning"


def plans(clean: float) -> list[Plan]:
    """Every variant but the one without tuning; the first is the base."""
    def plan(label: str, share: float = clean, **changed: Any) -> Plan:
        return Plan(label, "tsbd", {**BASE, **changed}, share, 0)

    return [plan("V3, n 0.15, m 0.7, aware tuning"),
            plan("V1: whole neurons", scheme="V1"), plan("V2: weights anywhere", scheme="V2"),
            plan("plain tuning", tuning={**PART, "mix": 0.0}),
            plan("norm of all tensors", tuning={**PART, "norm": "global"}),
            *(plan(f"n {n:g}", neurons=n) for n in (0.05, 0.3, 0.5)), plan("n by its rule", neurons=None),
            *(plan(f"m {m:g}", weights=m) for m in (0.3, 1.0)),
            *(plan(f"{100 * share:g} % clean", share) for share in (0.01, 0.02, 0.1))]


def untuned(victim: Victim, clean: float) -> dict[str, Any]:
    """The base without its last stage, as a unit."""
    images, labels = clean_part(victim, clean, 0)
    generator = torch.Generator().manual_seed(own_seed(victim, 0))
    with own_randomness(images.device, generator=generator):
        given = take(victim.model, images, labels)
        training = Training(given.images, given.labels, generator, Shift(round(images.shape[-1] / 16)), Deadline())
        unlearned = clean_unlearning(given.model, training, given.num_classes, UnlearningConfig(**FORGET))
    change = weight_change(neuron_weights(given.model, given.num_classes), dict(unlearned.model.named_parameters()))
    zero_reinitialisation(given.model, weights_to_zero(change, ReinitialisationConfig(BASE["neurons"])))
    after = measured(given.model, victim.test, victim.triggered, victim.record["target"], victim.scale)
    return {"victim": victim.name, "defense": UNTUNED, "after": after, "DER": _rating(victim.before, after),
            "failed": "", "seconds": 0.0}


def _rating(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    return defense_effectiveness((before["ACC"], before["ASR"]), (after["ACC"], after["ASR"]))


def rows(units: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean over the networks of each variant, in percent."""
    labels = list(dict.fromkeys(unit["defense"] for unit in units))
    found = []
    for label in labels:
        own = [unit for unit in units if unit["defense"] == label]
        means = {name: 100 * statistics.fmean(unit["after"][name] for unit in own) for name in ("ACC", "ASR", "RA")}
        found.append({"variant": label, "networks": len(own), "failed": sum(bool(unit["failed"]) for unit in own),
                      **means, "DER": 100 * statistics.fmean(unit["DER"] for unit in own)})
    return found


class Square(nn.Module):
    """A small ViT of timm on images of one size, without dropout."""

    def __init__(self, num_classes: int, side: int) -> None:
        super().__init__()
        self.vit = VisionTransformer(img_size=side, patch_size=side // 4, embed_dim=48, depth=3, num_heads=4,
                                     num_classes=num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vit(x)


def vit_repaired(epochs: int, device: torch.device) -> dict[str, Any]:
    """ACC, ASR, RA of a ViT trained on poisoned digits, before and after TSBD with 5 % clean images."""
    train, test = (half.to(device) for half in read_digits(size=16))
    bad = poison("badnets", train, {}, ratio=0.1, target=0, seed=1)
    config, generator = VictimConfig(crop=1), torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Square(train.num_classes, 16).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(bad.images), generator=generator).split(64):
            x = normalise(augment(bad.images[index.to(device)], config, generator=generator), config)
            loss = cross_entropy(model(x), bad.labels[index.to(device)])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    before = measured(model.eval(), test, bad.trigger(test.images), 0, config)
    index = torch.randperm(len(train.images), generator=generator)[:round(0.05 * len(train.images))].to(device)
    settings = defense_config("tsbd", {**BASE, "unlearning": {**FORGET, "rate": 1e-3}}, "ViT")
    found = defend(model, normalise(train.images[index], config), train.labels[index], settings,
                   generator=torch.Generator().manual_seed(0), augment=Shift(1))
    after = measured(found.model, test, bad.trigger(test.images), 0, config)
    return {"before": before, "after": after, "DER": _rating(before, after), **found.record(), "losses": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", type=Path, default=TINY_ZOO)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--data", type=Path, help="folder of the image sets, unless built in")
    parser.add_argument("--clean", type=float, default=0.05)
    parser.add_argument("--vit-epochs", type=int, default=30)
    parser.add_argument("--keep", type=Path, default=Path("runs/defend"), help="finished runs")
    parser.add_argument("--out", type=Path, default=RECORDS / "defense_ablations.json")
    options = parser.parse_args()
    device, wanted = chosen_device(), options.networks.split(",")
    samples: list[ZooModel] = [sample for sample in read_zoo(options.zoo).models if sample.name in wanted]
    expect(len(samples) == len(wanted), "--networks", f"networks of {options.zoo}", options.networks)
    units: list[Mapping[str, Any]] = []
    for sample in samples:
        found, problem = victim_units(sample, plans=plans(options.clean), data=options.data, out=options.keep)
        expect(problem is None, sample.name, "a network that can be judged", problem)
        victim = read_victim(sample, options.data, options.keep / "triggers", device=device)
        units += [*found, untuned(victim, options.clean)]
    table, vit = rows(units), vit_repaired(options.vit_epochs, device)
    before = rows([{**unit, "defense": "no defense", "after": unit["before"], "DER": 0.5}
                   for unit in units if unit["defense"] == units[0]["defense"]])
    record = {"command": "python -m benchmarks.defense_ablations", "networks": wanted, "clean": options.clean,
              "rows": [*before, *table], "vit": vit, "environment": environment()}
    write_json(options.out, record)
    for row in record["rows"]:
        print(f"{row['variant']:34} {row['networks']} networks, {row['failed']} failed: ACC {row['ACC']:.1f}, "
              f"ASR {row['ASR']:.1f}, RA {row['RA']:.1f}, DER {row['DER']:.1f}")
    print("ViT: " + ", ".join(f"{name} {100 * vit['before'][name]:.1f} -> {100 * vit['after'][name]:.1f}"
                              for name in ("ACC", "ASR", "RA")) + f", DER {100 * vit['DER']:.1f}")


if __name__ == "__main__":
    main()
