"""Seconds and memory of the shipped detector: `python -m benchmarks.backdoor_speed`.

Freshly initialised networks and noise images: what is timed does not depend on them. Against the report's way at
equal settings (same network, images and pixels, one thread each, in turns), from 10 to 200 classes, and at full
width on 128 x 128 pixels under the deadline.
"""
from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torchvision.transforms import Compose, Normalize, Resize, ToTensor
from torchvision.transforms.functional import to_pil_image

from backdoor_detection import detection, report
from backdoor_detection.detection import DetectorConfig
from backdoor_detection.margins import ReportConfig
from data.devices import chosen_device
from data.files import write_json
from data.preact_resnet import WIDTHS, new_model
from submit.records import environment, peak_memory_gib

NARROW, IMAGES, PIXELS, TURNS = (8, 16, 32, 64), 100, 32, 3
CLASSES = (10, 43, 100, 200)


def write_images(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for i in range(IMAGES):
        noise = torch.randint(256, (3, PIXELS, PIXELS), generator=generator, dtype=torch.uint8)
        to_pil_image(noise).save(folder / f"{i}_{i % 10}.png")


def transform(side: int) -> Compose:
    return Compose([Resize((side, side)), ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)])


def timed(detector, folder: Path, classes: int, widths: tuple, side: int, config, device) -> tuple[float, object]:
    model = new_model(classes, widths, 3, seed=0).to(device).eval()
    start = time.perf_counter()
    found = detector.detect(model, classes, folder, transform(side), config, generator=torch.Generator().manual_seed(0))
    return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    device = chosen_device()
    published = replace(ReportConfig(), size=PIXELS, tolerance=0.0)  # every step: its early stop depends on the network
    unhurried = DetectorConfig(deadline_s=3600.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder)
        turns = [(timed(report, folder, 10, NARROW, PIXELS, published, device)[0],
                  timed(detection, folder, 10, NARROW, PIXELS, unhurried, device)[0]) for _ in range(TURNS)]
        growth = {k: statistics.median(timed(detection, folder, k, NARROW, PIXELS, unhurried, device)[0]
                                       for _ in range(TURNS)) for k in CLASSES}
        torch.set_num_threads(threads)
        large = {k: timed(detection, folder, k, WIDTHS, 128, DetectorConfig(), device) for k in (10, 200)}
    slow, fast = (statistics.median(column) for column in zip(*turns, strict=True))
    record = {"command": "python -m benchmarks.backdoor_speed", "report_seconds": slow, "seconds": fast,
              "times_faster": slow / fast, "seconds_by_classes": growth, "growth_10_to_100": growth[100] / growth[10],
              "full_width_128": {k: {"seconds": s, "images": f.images, "side": f.side, "steps": f.steps,
                                     "steps_asked": f.steps_asked, "kept": len(f.kept)}
                                 for k, (s, f) in large.items()},
              "peak_memory_gib": peak_memory_gib(), "turns": TURNS, "environment": environment()}
    write_json(Path(__file__).parent / "records" / "backdoor_speed.json", record)
    print(f"10 classes: report {slow:.1f} s, ours {fast:.1f} s, {slow / fast:.1f} times faster; growth to 100 classes "
          f"{growth[100] / growth[10]:.1f}; full width at 128 pixels: "
          + ", ".join(f"{k} classes {s:.0f} s ({f.steps}/{f.steps_asked} steps)" for k, (s, f) in large.items())
          + f"; peak {record['peak_memory_gib']}")


if __name__ == "__main__":
    main()
