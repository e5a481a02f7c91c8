"""What a run leaves behind: command, configuration, versions, hardware, memory, results, as one JSON record."""
from __future__ import annotations

import os
import platform
import resource
import sys
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "transformers", "numpy", "scipy", "scikit-learn",
            "pillow")
CPU_INFO = Path("/proc/cpuinfo")


def environment() -> dict:
    """Versions and hardware of this process."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"python": platform.python_version(), "versions": versions, "system": platform.platform(),
            "cpu": _cpu_name(), "cores": os.cpu_count(), "gpu": gpu}


def _cpu_name() -> str:
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory_gib() -> dict[str, float]:
    """Largest resident size of this process so far and, with CUDA, of torch's allocator, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, KiB elsewhere
    peak = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)}
    if torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return peak
