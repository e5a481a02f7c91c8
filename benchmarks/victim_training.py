"""Images a second of the victim trainer against the ordinary loop: `python -m benchmarks.victim_training`.

The ordinary loop: a Dataset of PIL images, RandomCrop, RandomHorizontalFlip, ToTensor, Normalize, a DataLoader with
workers, the same network, optimiser and schedule, float32. Ours on a CPU is one process a core, one thread each, as
the zoo builder trains; also shown: one model alone. On a GPU `--together` models share it, a process each. The ways
take turns; medians of the rounds.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor, multiprocessing
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor
from torchvision.transforms.functional import to_pil_image

from benchmarks.options import add_device, add_out, device_of, record_file
from data.files import write_json
from data.preact_resnet import new_model
from data.victims import VictimConfig, train_victim
from submit.calibration import synchronize
from submit.records import environment, peak_memory_gib

CLASSES = 10


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


def ordinary(pictures: Pictures, config: VictimConfig, device: torch.device, loaders: int) -> float:
    """Images a second of the textbook loop, workers' start included once, as an epoch has it."""
    model = new_model(CLASSES, config.widths, 3, seed=0).to(device).train()
    loader = DataLoader(pictures, config.batch, shuffle=True, num_workers=loaders, drop_last=True,
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


def ours(images: Tensor, labels: Tensor, config: VictimConfig, threads: int, device: torch.device) -> float:
    """Images a second of one model trained by this process; images and labels come from the CPU, before the clock."""
    torch.set_num_threads(threads)
    images, labels = images.to(device), labels.to(device)
    synchronize(device)
    start = time.perf_counter()
    model = train_victim(images, labels, CLASSES, config, seed=0)
    float(next(model.parameters()).detach().sum())
    return config.epochs * (len(images) // config.batch) * config.batch / (time.perf_counter() - start)


def side_by_side(pool: ProcessPoolExecutor, together: int, *work: object) -> float:
    """Images a second of several models at once, a process each."""
    return sum(pool.map(ours, *zip(*[work] * together, strict=True)))


def ways(images: Tensor, labels: Tensor, config: VictimConfig, device: torch.device, pool: ProcessPoolExecutor,
         together: int, loaders: int) -> dict:
    """Every way as a call without arguments; images and labels on the CPU."""
    threads = torch.get_num_threads()
    pictures = Pictures(images, labels, config)
    found = {"ordinary": lambda: ordinary(pictures, config, device, loaders)}
    name = "one model a core" if device.type == "cpu" else f"{together} models at once"
    for precision in ("float32", "bfloat16"):
        ours_so = replace(config, precision=precision)
        found[f"one model, {precision}"] = lambda c=ours_so: ours(images, labels, c, threads, device)
        found[f"{name}, {precision}"] = lambda c=ours_so: side_by_side(pool, together, images, labels, c, 1, device)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=8, help="channels of the first stage")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--together", type=int, default=2, help="models side by side")
    parser.add_argument("--loaders", type=int, default=2, help="workers of the ordinary DataLoader")
    add_device(parser)
    add_out(parser, "victim_training")
    options = parser.parse_args(arguments)
    device = device_of(options, parser)
    for name in ("width", "images", "rounds", "together", "loaders"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected > 0, found {getattr(options, name)}")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (options.images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (options.images,), generator=generator)
    width = options.width
    config = VictimConfig(widths=(width, 2 * width, 4 * width, 8 * width), epochs=1, flip=True)
    rates: dict[str, list[float]] = {}
    with ProcessPoolExecutor(options.together, multiprocessing.get_context("spawn")) as pool:
        measured = ways(images, labels, config, device, pool, options.together, options.loaders)
        for _ in range(1 + options.rounds):  # the first round warms up
            for name, way in measured.items():
                rates.setdefault(name, []).append(way())
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    record = {"command": f"python -m benchmarks.victim_training --width {width} --images {options.images}",
              "device": str(device), "images": options.images, "widths": config.widths, "batch": config.batch,
              "rounds": options.rounds, "together": options.together, "loaders": options.loaders,
              "images_a_second": rates, "median": medians,
              "times_ordinary": {name: rate / medians["ordinary"] for name, rate in medians.items()},
              "peak_memory_gib": peak_memory_gib(), "environment": environment()}
    write_json(record_file("victim_training", device, options.out), record)
    for name, rate in medians.items():
        print(f"{name:28} {rate:8.0f} images/s  {rate / medians['ordinary']:.2f} x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
