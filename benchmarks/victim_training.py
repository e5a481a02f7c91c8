"""Images a second of the victim trainer against the ordinary loop: `python -m benchmarks.victim_training`.

The ordinary loop: a Dataset of PIL images, RandomCrop, RandomHorizontalFlip, ToTensor, Normalize, a DataLoader with
workers, the same network, optimiser and schedule, float32. Ours on a CPU is one process a core, one thread each, as
the zoo builder trains; also shown: one model alone. The ways take turns; medians of the rounds.
"""
from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, multiprocessing
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor
from torchvision.transforms.functional import to_pil_image

from data.devices import chosen_device
from data.files import write_json
from data.preact_resnet import new_model
from data.victims import VictimConfig, train_victim
from submit.records import environment

CLASSES, WORKERS = 10, 2


class Pictures(Dataset):
    """What torchvision's CIFAR10 is: PIL images, transformed one by one."""

    def __init__(self, images: Tensor, labels: Tensor, config: VictimConfig) -> None:
        self.pictures, self.labels = [to_pil_image(image) for image in images], labels.tolist()
        self.transform = Compose([RandomCrop(images.shape[-1], config.crop), RandomHorizontalFlip(), ToTensor(),
                                  Normalize(config.mean, config.std)])

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[i]), self.labels[i]


def ordinary(pictures: Pictures, config: VictimConfig, device: torch.device) -> float:
    """Images a second of the textbook loop, workers' start included once, as an epoch has it."""
    model = new_model(CLASSES, config.widths, 3, seed=0).to(device).train()
    loader = DataLoader(pictures, config.batch, shuffle=True, num_workers=WORKERS, drop_last=True,
                        pin_memory=device.type == "cuda", persistent_workers=True)
    optimiser = torch.optim.SGD(model.parameters(), config.rate, config.momentum, weight_decay=config.decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.epochs * len(loader))
    start = time.perf_counter()
    for _ in range(config.epochs):
        for images, labels in loader:
            loss = cross_entropy(model(images.to(device)), labels.to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    loss.item()
    return config.epochs * len(loader) * config.batch / (time.perf_counter() - start)


def ours(images: Tensor, labels: Tensor, config: VictimConfig, threads: int) -> float:
    """Images a second of one model trained by this process."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    model = train_victim(images, labels, CLASSES, config, seed=0)
    float(next(model.parameters()).detach().sum())
    return config.epochs * (len(images) // config.batch) * config.batch / (time.perf_counter() - start)


def side_by_side(pool: ProcessPoolExecutor, images: Tensor, labels: Tensor, config: VictimConfig) -> float:
    """Images a second of as many models at once as the pool has processes, one thread each."""
    return sum(pool.map(ours, *zip(*[(images, labels, config, 1)] * WORKERS, strict=True)))


def ways(images: Tensor, labels: Tensor, config: VictimConfig, device: torch.device, pool: ProcessPoolExecutor) -> dict:
    threads = torch.get_num_threads()
    pictures = Pictures(images.cpu(), labels, config)
    half = replace(config, precision="bfloat16")
    full = replace(config, precision="float32")
    found = {"ordinary": lambda: ordinary(pictures, config, device),
             "one model, float32": lambda: ours(images, labels, full, threads),
             "one model, bfloat16": lambda: ours(images, labels, half, threads)}
    if device.type == "cpu":
        found["one model a core, float32"] = lambda: side_by_side(pool, images, labels, full)
        found["one model a core, bfloat16"] = lambda: side_by_side(pool, images, labels, half)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=8, help="channels of the first stage")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records" / "victim_training.json")
    options = parser.parse_args()
    device = chosen_device()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (options.images, 3, 32, 32), generator=generator, dtype=torch.uint8).to(device)
    labels = torch.randint(CLASSES, (options.images,), generator=generator).to(device)
    width = options.width
    config = VictimConfig(widths=(width, 2 * width, 4 * width, 8 * width), epochs=1, flip=True)
    rates: dict[str, list[float]] = {}
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        measured = ways(images, labels, config, device, pool)
        for _ in range(1 + options.rounds):  # the first round warms up
            for name, way in measured.items():
                rates.setdefault(name, []).append(way())
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    record = {"command": f"python -m benchmarks.victim_training --width {width}", "images": options.images,
              "widths": config.widths, "batch": config.batch, "rounds": options.rounds, "images_a_second": rates,
              "median": medians, "times_ordinary": {name: rate / medians["ordinary"] for name, rate in medians.items()},
              "environment": environment()}
    write_json(options.out, record)
    for name, rate in medians.items():
        print(f"{name:28} {rate:8.0f} images/s  {rate / medians['ordinary']:.2f} x")


if __name__ == "__main__":
    main()
