"""Images a second of the full encoder, and an epoch of head tuning with the trunk against one on kept features:
`python -m benchmarks.encoder_speed` (also `python -m benchmarks.head_tuning --full`).

ViTamin-L-384 on random weights: time does not depend on them. Images lie on the device as what the image tower takes;
medians, in float32 and in bfloat16, batch by batch size. Tuning: as many rows as `--rows`, three rows an image, in
batches of the recipe; the trunk runs for both images of every row, or once for every image before the first epoch.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor

from benchmarks.kept_parts import measured_parts
from benchmarks.options import TIME_UP, add_device, add_minutes, add_out, device_of, record_file
from benchmarks.time_limit import TimeLimit
from data.devices import autocast
from data.files import write_json
from retrieval.encoder import Encoder, build_model, load_encoder
from retrieval.head_tuning import HeadConfig, Pairs, tune_head
from retrieval.trunk_features import trunk_and_head
from retrieval.vocabulary import Vocabulary
from submit.records import environment, peak_memory_gib

FULL, EMBEDDED = "ViTamin-L-384", "embedded"
BATCHES = (1, 16, 64, 256)
ROWS, ROWS_A_TARGET, EPOCHS = 2048, 3, 5  # epochs: of the recipe, for the ratio
RUNS, SEED = 5, 0
PRECISIONS = ("float32", "bfloat16")


def encoder_of(net: str, device: torch.device) -> Encoder:
    """The embedded encoder, or a net of open_clip on random weights."""
    if net == EMBEDDED:
        return load_encoder(device=device)
    config = open_clip.get_model_config(net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = build_model(config)
    vocabulary = Vocabulary(None, context_length=config["text_cfg"].get("context_length", 77))
    return Encoder(model.to(device), PreprocessCfg(size=config["vision_cfg"]["image_size"]), vocabulary,
                   config["embed_dim"])


def side_of(encoder: Encoder) -> int:
    size = encoder.preprocess.size
    return size if isinstance(size, int) else size[0]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def throughput(encoder: Encoder, batch: int, precision: str) -> dict:
    """Images a second through the whole image tower: the median of RUNS after one that warms up."""
    device, side = encoder.device, side_of(encoder)
    pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(SEED)).to(device)

    def work() -> None:
        with torch.no_grad(), autocast(device, precision):
            encoder.model.encode_image(pixels)

    work()
    times = [seconds(work, device) for _ in range(RUNS)]
    return {"batch": batch, "precision": precision, "images_a_second": batch / statistics.median(times),
            "milliseconds": [round(1e3 * value, 3) for value in times]}


def tuning(encoder: Encoder, rows: int, precision: str) -> dict:
    """Seconds of one epoch each way, of filling the cache, and how far the losses lie apart."""
    device, side = encoder.device, side_of(encoder)
    trunk, head = trunk_and_head(encoder.model)
    generator = torch.Generator().manual_seed(SEED)
    count = max(2, rows // ROWS_A_TARGET)
    images = torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    query, target = (torch.randint(count, (rows,), generator=generator) for _ in range(2))
    pairs = Pairs(query, target, torch.randn(rows, encoder.width, generator=generator))

    def through_the_trunk(numbers: Tensor) -> Tensor:
        with torch.no_grad(), autocast(device, precision):
            return torch.cat([trunk(block).float() for block in encoder.inputs(images[numbers])])

    def epoch(look_up: Callable[[Tensor], Tensor]) -> list[float]:
        found = next(tune_head(head.weight, look_up, pairs, HeadConfig(),
                               generator=torch.Generator().manual_seed(SEED)))
        return list(found.losses)

    losses: dict[str, list[float]] = {}
    through_the_trunk(torch.arange(min(2, count)))  # warms up
    kept: list[Tensor] = []
    filling = seconds(lambda: kept.append(through_the_trunk(torch.arange(count))), device)
    cached = seconds(lambda: losses.update(cached=epoch(lambda numbers: kept[0][numbers.to(device)])), device)
    slow = seconds(lambda: losses.update(trunk=epoch(through_the_trunk)), device)
    return {"rows": rows, "images": count, "precision": precision, "seconds_filling_the_cache": filling,
            "seconds_an_epoch_cached": cached, "seconds_an_epoch_through_the_trunk": slow,
            "times_faster_an_epoch": slow / cached,
            f"times_faster_{EPOCHS}_epochs_with_filling": EPOCHS * slow / (filling + EPOCHS * cached),
            "largest_difference_of_a_loss": max(abs(a - b) for a, b in zip(*losses.values(), strict=True))}


def run(net: str, batches: Sequence[int], rows: int, device: torch.device, minutes: float) -> dict:
    """The record's part on time; the encoder is built once."""
    limit, encoder = TimeLimit(minutes), encoder_of(net, device)
    parts = {f"{net} batch {batch} {precision}": lambda b=batch, p=precision: throughput(encoder, b, p)
             for precision in PRECISIONS for batch in batches}
    parts |= {f"{net} tuning {rows} {precision}": lambda p=precision: tuning(encoder, rows, p)
              for precision in PRECISIONS}
    found, left = measured_parts("encoder_speed", device, parts, limit)
    return {"net": net, "parameters": sum(p.numel() for p in encoder.model.parameters()), "side": side_of(encoder),
            "throughput": [row for row in found.values() if "batch" in row],
            "tuning": [row for row in found.values() if "rows" in row], "left": left}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", default=FULL, choices=(FULL, EMBEDDED))
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="images at once")
    parser.add_argument("--rows", type=int, default=ROWS, help="of the tuned set")
    add_minutes(parser)
    add_device(parser)
    add_out(parser, "encoder_speed")
    options = parser.parse_args(arguments)
    device = device_of(options, parser)
    if min(*options.batches, options.rows - 1) < 1:
        parser.error(f"--batches, --rows: expected >= 1, >= 2, found {options.batches}, {options.rows}")
    found = run(options.net, options.batches, options.rows, device, options.minutes)
    command = f"python -m benchmarks.encoder_speed --net {options.net} --rows {options.rows}"
    write_json(record_file("encoder_speed", device, options.out),
               {"command": command, "device": str(device), **found, "peak_memory_gib": peak_memory_gib(),
                "environment": environment()})
    for row in found["throughput"]:
        print(f"batch {row['batch']:4} {row['precision']:9} {row['images_a_second']:9.1f} images/s")
    for row in found["tuning"]:
        print(f"{row['precision']}: an epoch over {row['rows']} rows {row['seconds_an_epoch_through_the_trunk']:.2f} s "
              f"through the trunk, {row['seconds_an_epoch_cached']:.3f} s on kept features, filling "
              f"{row['seconds_filling_the_cache']:.2f} s")
    return TIME_UP if found["left"] else 0


if __name__ == "__main__":
    sys.exit(main())
