"""The device that predict functions use, as their signatures are the organizers' and have no room for it; and what
a device can take."""
from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import expect

if TYPE_CHECKING:
    import torch

VARIABLE = "KIT_DEVICE"  # set by `python -m submit ... --device`
WHERE = f"--device (${VARIABLE})"
CGROUP = Path("/sys/fs/cgroup")
PRECISIONS = ("auto", "float32", "bfloat16")
UNKNOWN_BYTES = 2**31  # taken as free where the system does not tell


def chosen_device() -> torch.device:
    """$KIT_DEVICE if set and not "auto"; else CUDA where there is one; else the CPU."""
    import torch  # takes more than a second, which `--help` need not wait for

    name = os.environ.get(VARIABLE, "auto")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    expect(device is not None and device.type in ("cpu", "cuda"), WHERE, "auto, cpu, cuda or cuda:N", name)
    expect(device.type != "cuda" or torch.cuda.is_available(), WHERE, "a device of this machine", name)
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A block in bfloat16 where `precision`, one of `PRECISIONS`, says so: auto does on a GPU alone."""
    import torch

    half = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def device_generator(device: torch.device, *, generator: torch.Generator) -> torch.Generator:
    """One on `device`, seeded by `generator`: for draws of millions of numbers a step, made where they are used."""
    import torch

    return torch.Generator(device).manual_seed(int(torch.randint(1 << 31, (), generator=generator)))


def carried(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; on its way from the CPU to a GPU, the caller goes on meanwhile."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on the device, within a container's limit where there is one; a rough figure.
    Tensors of `meta` take none."""
    import torch

    if device.type == "meta":
        return sys.maxsize
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min(_system_bytes(), _container_bytes())


def _system_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):  # no Linux
        return UNKNOWN_BYTES


def _container_bytes() -> int:
    """What a control group leaves; its file cache counts as free."""
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit == "max":
            return sys.maxsize
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - int(used) + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return sys.maxsize


def half_is_faster(device: torch.device) -> bool:
    """Whether the device multiplies 16-bit matrices faster than float32: every GPU, and CPUs with bfloat16 units."""
    import torch

    if device.type == "cuda":
        return True
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in asked if ask)
