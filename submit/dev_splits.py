"""The built-in dev split of each task: generated once into `.cache/dev`, or committed (the model zoo)."""
from __future__ import annotations

from pathlib import Path

from data.files import fingerprint

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "dev"
TINY_ZOO = ROOT / "data" / "zoos" / "tiny"


def dev_split(task: str, seed: int) -> Path:
    """The folder of the built-in split; written on first use, anew when a generator's source changes."""
    if task == "backdoor":
        return TINY_ZOO
    sources = sorted(p for p in (ROOT / "data").rglob("*") if p.suffix in (".py", ".txt"))
    folder = CACHE / f"{task}-seed{seed}-{fingerprint(*sources)}"
    if not folder.exists():
        _writer(task)(folder, seed=seed)
    return folder


def _writer(task: str):
    if task == "retrieval":
        from data.scenes import write_retrieval_split
        return write_retrieval_split
    from data.defects import write_anomaly_split
    return write_anomaly_split
