"""One whole category through a preset, by stage: `python -m benchmarks.anomaly_category --preset report --images 200`.

Nets have random weights: time does not depend on them. Each stage in seconds; the share of the device's measured
matrix-product peak that features and mutual scoring reach; and what that means for ten such categories on an RTX 4090,
whose 16-bit peak with float32 sums is 165 TFLOP/s, if both reach the same share there. Meant for a GPU;
`--preset embedded --images 40` runs on a CPU. Writes benchmarks/records/anomaly_category_PRESET_IMAGES_DEVICE.json.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from anomaly.backbone import EMBEDDED, load_backbone, random_backbone
from anomaly.category import Nets, category_features, tiles_of
from anomaly.pipeline import category_scores, feature_scores
from anomaly.presets import PRESETS, preset
from anomaly.score_files import write_scores
from benchmarks.options import RECORDS, add_device, device_of
from data.anomaly_tree import AnomalyImage
from data.devices import half_is_faster
from data.files import write_json
from submit.calibration import synchronize
from submit.records import environment, peak_memory_gib
from submit.scoring import anomaly_metrics

RTX_4090 = 165e12  # multiply-adds count two
CATEGORIES, LIMIT_HOURS = 10, 3.0
SIDE, PEAK_SIDE = 800, 8192


def timed(function: Callable[[], object], device: torch.device) -> tuple[float, object]:
    synchronize(device)
    start = time.perf_counter()
    value = function()
    synchronize(device)
    return time.perf_counter() - start, value


def peak_flops(device: torch.device) -> float:
    """Of square matrix products in the precision that scoring uses; the best of five."""
    kind = torch.float16 if device.type == "cuda" else torch.bfloat16 if half_is_faster(device) else torch.float32
    side = PEAK_SIDE if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device).to(kind)
    return 2 * side ** 3 / min(timed(lambda: a @ a, device)[0] for _ in range(5))


def nets_of(name: str, device: torch.device) -> Nets:
    chosen = preset(name)
    if chosen.for_maps is None:
        net = load_backbone(EMBEDDED, device=device)
        return Nets(net, net)
    for_maps = random_backbone(chosen.for_maps, seed=0).to(device)
    same = chosen.for_images == chosen.for_maps
    return Nets(for_maps, for_maps if same else random_backbone(chosen.for_images, seed=0).to(device))


def write_images(folder: Path, count: int) -> list[AnomalyImage]:
    rng, images = np.random.default_rng(0), []
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (25, 25, 3), dtype=np.uint8))
        coarse.resize((SIDE, SIDE)).save(folder / f"{index:04}.jpg", quality=95)
        images.append(AnomalyImage(folder / f"{index:04}.jpg", "good", None))
    return images


def feature_flops(nets: Nets, device: torch.device) -> float:
    """Of one image through each net."""
    total = 0
    for net in nets.each:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.zeros(1, 3, *net.config.size, device=device))
        total += counter.get_total_flops()
    return total


def measured(name: str, count: int, device: torch.device) -> dict:
    config, nets = preset(name).scoring, nets_of(name, device)
    peak = peak_flops(device)
    per_image = feature_flops(nets, device)
    passes = len(config.degrees) if config.aggregation == "lnamd" else 1
    with tempfile.TemporaryDirectory() as scratch:
        images = write_images(Path(scratch), count)
        paths = [image.path for image in images]
        timed(lambda: category_features(paths[:2], nets, config), device)  # warms up
        reading, features = timed(lambda: category_features(paths, nets, config), device)
        scoring, found = timed(lambda: [feature_scores(f, config, tiles=tiles_of(net, config))
                                        for f, net in zip(features, nets.each, strict=True)], device)
        maps_seconds, (scores, maps) = timed(lambda: category_scores(found[0], found[-1], config), device)
        scores, maps = scores.double().cpu().numpy(), maps.cpu().numpy()
        writing, _ = timed(lambda: write_scores(Path(scratch), "part", images, scores, maps), device)
        truth = np.arange(count) % 2 == 0
        pixels = np.zeros(maps.shape[:1] + maps.shape[2:], bool)
        pixels[::2, 50:80, 60:90] = True
        judging, _ = timed(lambda: anomaly_metrics(truth, scores, pixels, np.rint(maps[:, 0] * 1e4) / 1e4), device)
    pairs = count * (count + 1) / 2
    products = sum(2 * pairs * layer.shape[1] ** 2 * layer.shape[2] * passes for f in features for layer in f.layers)
    shares = {"features": per_image * count / reading / peak, "scoring": products / scoring / peak}
    a_4090 = per_image * count / (shares["features"] * RTX_4090) + products / (shares["scoring"] * RTX_4090)
    whole = a_4090 + maps_seconds + writing + judging
    return {"preset": name, "images": count, "peak_tflops": peak / 1e12, "share_of_peak": shares,
            "seconds": {"reading and features": reading, "mutual scoring": scoring, "maps": maps_seconds,
                        "score files": writing, "metrics": judging},
            "predicted_rtx_4090": {"seconds_a_category": whole, "hours_of_ten": CATEGORIES * whole / 3600,
                                   "limit_hours": LIMIT_HOURS}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="report", choices=sorted(PRESETS))
    parser.add_argument("--images", type=int, default=200)
    add_device(parser)
    parser.add_argument("--out", type=Path, help="record; default as above")
    options = parser.parse_args(arguments)
    if options.images < 2:
        parser.error(f"--images: expected >= 2, found {options.images}")
    device = device_of(options, parser)
    record = measured(options.preset, options.images, device)
    for stage, seconds in record["seconds"].items():
        print(f"{stage:22} {seconds:8.2f} s")
    print(f"share of the peak of {record['peak_tflops']:.2f} TFLOP/s:",
          ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in record["share_of_peak"].items()))
    guess = record["predicted_rtx_4090"]
    print(f"RTX 4090, predicted: {guess['seconds_a_category']:.0f} s a category, {guess['hours_of_ten']:.2f} of "
          f"{LIMIT_HOURS} h for ten")
    command = f"python -m benchmarks.anomaly_category --preset {options.preset} --images {options.images}"
    file = RECORDS / f"anomaly_category_{options.preset}_{options.images}_{device.type}.json"
    write_json(options.out or file, {"command": f"{command} --device {device}", **record,
                                     "peak_memory_gib": peak_memory_gib(), "environment": environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
