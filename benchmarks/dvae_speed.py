"""A stage of D-VAE against the plain way, one run: `python -m benchmarks.dvae_speed [--data DIR]`.

The plain way: a Dataset of PIL images, ToTensor, a DataLoader with workers, the released layers (transposed 3x3
convolutions), float32, NCHW. Ours: the set on the device, batches by index, channels last; on a GPU in bfloat16 and
float32, on a CPU in float32 and bfloat16. Equal batches, epochs and schedule. Images are the built-in digits at 32 x
32 with LSP or, with DIR/cifar10, those. The ways take turns; medians of the rounds. PSNR: of the images that the last
network of each way gives back, at the mean of the code, against those it saw.
"""
from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image, to_tensor

from benchmarks.options import add_device, add_out, device_of, record_file
from data.files import write_json
from data.image_sets import read_digits, read_image_folder
from data.unlearnable import make_unlearnable
from defense.dvae_network import DVAE, NetworkConfig, new_dvae
from defense.dvae_stage import StageConfig, loss_terms, train_stage, unit
from submit.calibration import synchronize
from submit.records import environment, peak_memory_gib

ASKED = ("images", "epochs", "width", "latent", "rounds")  # options that the record's command names


class Pictures(Dataset):
    """PIL images, made tensors one by one."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.pictures, self.labels = [to_pil_image(image) for image in images], labels.tolist()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return to_tensor(self.pictures[i]), self.labels[i]


def released_layers(model: DVAE) -> DVAE:
    """The same network with transposed convolutions where ours has ordinary ones."""
    for decoder in (model.image[0], model.perturbation):
        for i, layer in enumerate(decoder):
            if isinstance(layer, nn.Conv2d):
                turned = nn.ConvTranspose2d(layer.in_channels, layer.out_channels, 3, 1, 1)
                turned.weight.data = layer.weight.data.flip(2, 3).transpose(0, 1).contiguous()
                turned.bias.data = layer.bias.data
                decoder[i] = turned
    return model


def plain(pictures: Pictures, classes: int, config: StageConfig, device: torch.device, loaders: int) -> DVAE:
    """The textbook loop; loaders: workers of its DataLoader."""
    shape = tuple(to_tensor(pictures.pictures[0]).shape)
    model = released_layers(new_dvae(classes, shape, config.network, seed=0)).to(device).train()
    loader = DataLoader(pictures, config.batch, shuffle=True, num_workers=loaders, drop_last=True,
                        pin_memory=device.type == "cuda", persistent_workers=True)
    optimiser = torch.optim.Adam(model.parameters(), config.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.epochs)
    for epoch in range(config.epochs):
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            found = model(images, labels, torch.randn(model.code_shape(len(images)), device=device))
            optimiser.zero_grad()
            loss_terms(found, images, config, epoch).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def psnr(model: DVAE, images: Tensor, labels: Tensor) -> float:
    """Decibels, of all images together."""
    errors = [(model(unit(x), y, None).image - unit(x)).square().mean((1, 2, 3))
              for x, y in zip(images.split(256), labels.split(256), strict=True)]
    return -10 * math.log10(torch.cat(errors).mean().item())


def timed(work: Callable[[], DVAE], device: torch.device) -> tuple[float, DVAE]:
    synchronize(device)
    begun = time.perf_counter()
    model = work()
    synchronize(device)
    return time.perf_counter() - begun, model


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder that holds cifar10/")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loaders", type=int, default=2, help="workers of the plain way's DataLoader")
    add_device(parser)
    add_out(parser, "dvae_speed")
    options = parser.parse_args(arguments)
    device = device_of(options, parser)
    for name in ASKED:
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected > 0, found {getattr(options, name)}")
    clean = read_image_folder(options.data / "cifar10")[0] if options.data else read_digits(size=32)[0]
    order = torch.randperm(len(clean.images), generator=torch.Generator().manual_seed(0))[:options.images]
    bad = make_unlearnable("lsp", clean.subset(order), {}, ratio=1.0, seed=0)
    images, labels, classes = bad.images.to(device), bad.labels.to(device), bad.num_classes
    config = StageConfig(epochs=options.epochs, precision="float32",
                         network=NetworkConfig(options.width, options.latent))
    pictures = Pictures(bad.images, bad.labels)

    def ours(precision: str) -> DVAE:
        return train_stage(images, labels, classes, replace(config, precision=precision),
                           generator=torch.Generator().manual_seed(0)).model

    ways = {"plain": lambda: plain(pictures, classes, config, device, options.loaders),
            "ours, float32": lambda: ours("float32"), "ours, bfloat16": lambda: ours("bfloat16")}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    decibels: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            elapsed, model = timed(way, device)
            seconds[name].append(elapsed)
            decibels[name].append(psnr(model, images, labels))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    asked = " ".join(f"--{name} {getattr(options, name)}" for name in ASKED)
    record = {"command": f"python -m benchmarks.dvae_speed{' --data DIR' if options.data else ''} {asked}",
              "device": device.type, "images": len(images), "seconds": seconds, "psnr_db": decibels, "median": median,
              "times faster than plain": {name: median["plain"] / value for name, value in median.items()},
              "loaders": options.loaders, "threads": torch.get_num_threads(), "peak_memory_gib": peak_memory_gib(),
              "environment": environment()}
    write_json(record_file("dvae_speed", device, options.out), record)
    print({key: value for key, value in record.items() if key != "environment"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
