"""Seconds and memory of the shipped detector: `python -m benchmarks.backdoor_speed [--device cuda]`.

Freshly initialised networks and noise images: what is timed does not depend on them. Against the report's way at
equal settings (same network, images and pixels, one thread each, in turns), from 10 to 200 classes, and at full
width on 128 x 128 pixels under the deadline; on a GPU at full width from 10 to 200 classes too. With `--minutes` parts
that would not end in time are left for the same command.
"""
from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torchvision.transforms import Compose, Normalize, Resize, ToTensor
from torchvision.transforms.functional import to_pil_image

from backdoor_detection import detection, report
from backdoor_detection.detection import DetectorConfig
from backdoor_detection.margins import ReportConfig
from benchmarks.kept_parts import measured_parts
from benchmarks.options import TIME_UP, add_device, add_minutes, add_out, device_of, record_file
from benchmarks.time_limit import TimeLimit
from data.files import write_json
from data.preact_resnet import WIDTHS, new_model
from submit.calibration import synchronize
from submit.records import environment, peak_memory_gib

NARROW, PIXELS = (8, 16, 32, 64), 32


@dataclass(frozen=True)
class Size:
    """How much is timed."""

    images: int = 100
    turns: int = 3
    classes: tuple[int, ...] = (10, 43, 100, 200)
    side: int = 128                       # pixels, at full width
    widths: tuple[int, ...] = WIDTHS
    steps: int = 0                        # of ours a bound, of the report's after its warm-up; 0 = all


TINY = Size(images=10, turns=1, classes=(10, 12), side=32, widths=NARROW, steps=2)


def write_images(folder: Path, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        noise = torch.randint(256, (3, PIXELS, PIXELS), generator=generator, dtype=torch.uint8)
        to_pil_image(noise).save(folder / f"{i}_{i % 10}.png")


def transform(side: int) -> Compose:
    return Compose([Resize((side, side)), ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)])


def timed(detector, folder: Path, classes: int, widths: tuple, side: int, config, device) -> tuple[float, object]:
    """Seconds and what was found; both detectors end with numbers on the CPU."""
    model = new_model(classes, widths, 3, seed=0).to(device).eval()
    synchronize(device)
    start = time.perf_counter()
    found = detector.detect(model, classes, folder, transform(side), config, generator=torch.Generator().manual_seed(0))
    synchronize(device)
    return time.perf_counter() - start, found


def in_turns(folder: Path, size: Size, device: torch.device) -> dict:
    """Both ways at equal settings; every step of the report's, as its early stop depends on the network."""
    published = replace(ReportConfig(), size=PIXELS, tolerance=0.0)
    if size.steps:
        published = replace(published, steps=published.warm_up + size.steps)
    turns = [(timed(report, folder, 10, NARROW, PIXELS, published, device)[0],
              timed(detection, folder, 10, NARROW, PIXELS, unhurried(size), device)[0]) for _ in range(size.turns)]
    slow, fast = (statistics.median(column) for column in zip(*turns, strict=True))
    return {"report_seconds": slow, "seconds": fast, "times_faster": slow / fast}


def unhurried(size: Size) -> DetectorConfig:
    config = DetectorConfig(deadline_s=3600.0)
    return replace(config, reach=replace(config.reach, steps=size.steps)) if size.steps else config


def by_classes(folder: Path, classes: int, widths: tuple, size: Size, device: torch.device) -> dict:
    return {"seconds": statistics.median(timed(detection, folder, classes, widths, PIXELS, unhurried(size), device)[0]
                                         for _ in range(size.turns))}


def at_full_width(folder: Path, classes: int, size: Size, device: torch.device) -> dict:
    """With all threads and the shipped deadline; how far it got."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    seconds, found = timed(detection, folder, classes, size.widths, size.side, DetectorConfig(), device)
    torch.set_num_threads(threads)
    return {"seconds": seconds, "images": found.images, "side": found.side, "steps": found.steps,
            "steps_asked": found.steps_asked, "kept": len(found.kept)}


def parts_of(folder: Path, size: Size, device: torch.device) -> dict[str, Callable[[], dict]]:
    """Every part by its label; the key of the record and the classes stand in it."""
    parts = {f"turns {size}": lambda: in_turns(folder, size, device)}
    parts |= {f"narrow {k} {size}": lambda k=k: by_classes(folder, k, NARROW, size, device) for k in size.classes}
    if device.type == "cuda":
        parts |= {f"wide {k} {size}": lambda k=k: by_classes(folder, k, size.widths, size, device)
                  for k in size.classes}
    return parts | {f"large {k} {size}": lambda k=k: at_full_width(folder, k, size, device)
                    for k in (size.classes[0], size.classes[-1])}


def record_of(found: dict[str, dict], size: Size) -> dict:
    """The record's figures, as far as they were measured."""
    kinds: dict[str, dict[int, dict]] = {}
    for label, part in found.items():
        kind, number = label.split()[:2]
        kinds.setdefault(kind, {})[int(number) if number.isdigit() else 0] = part
    narrow, wide = ({k: part["seconds"] for k, part in kinds.get(name, {}).items()} for name in ("narrow", "wide"))
    record = {**kinds.get("turns", {}).get(0, {}), "seconds_by_classes": narrow}
    if {10, 100} <= narrow.keys():
        record["growth_10_to_100"] = narrow[100] / narrow[10]
    if wide:
        record["seconds_by_classes_full_width"] = wide
    return record | {"full_width_128": kinds.get("large", {}), "turns": size.turns}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="next to nothing, to try it out; goes with --out")
    add_minutes(parser)
    add_device(parser)
    add_out(parser, "backdoor_speed")
    options = parser.parse_args(arguments)
    if options.tiny and not options.out:
        parser.error("--tiny: expected --out with it, found none")
    device, size, limit = device_of(options, parser), TINY if options.tiny else Size(), TimeLimit(options.minutes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name), size.images)
        found, left = measured_parts("backdoor_speed", device, parts_of(Path(name), size, device), limit)
    torch.set_num_threads(threads)
    record = {"command": "python -m benchmarks.backdoor_speed", "device": str(device), **record_of(found, size),
              "left": left, "peak_memory_gib": peak_memory_gib(), "environment": environment()}
    write_json(record_file("backdoor_speed", device, options.out), record)
    for label, part in found.items():
        values = ", ".join(f"{name} {value:.2f}" for name, value in part.items())
        print(f"{' '.join(label.split()[:2])[:20]:20} {values}")
    return TIME_UP if left else 0


if __name__ == "__main__":
    sys.exit(main())
