"""What benchmarks ask for alike: the device, the time, where the record goes; and how they end when time is up."""
from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from data.devices import VARIABLE, chosen_device
from data.errors import InputError

RECORDS = Path(__file__).parent / "records"
TIME_UP = 3  # exit status: what is done is kept, and the same command goes on from there


def add_device(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    parser.add_argument("--device", default=default, help=f"auto, cpu, cuda or cuda:N; default {default}")


def add_minutes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=float("inf"),
                        help=f"nothing new starts later than that; exit status {TIME_UP} where something is left")


def add_out(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--out", type=Path, help=f"record; default benchmarks/records/{name}.json, {name}_gpu.json "
                                                 "where it was measured on a GPU")


def device_of(options: argparse.Namespace, parser: argparse.ArgumentParser) -> torch.device:
    """The device asked for, also for the processes started from here; a wrong one ends the program in one line."""
    if options.device != "auto":
        os.environ[VARIABLE] = options.device
    try:
        return chosen_device()
    except InputError as error:
        parser.error(str(error))


def record_file(name: str, device: torch.device, out: Path | None = None) -> Path:
    """Where the record goes: figures of a GPU never take the place of those of a CPU."""
    return out or RECORDS / (f"{name}.json" if device.type == "cpu" else f"{name}_gpu.json")
