"""What a machine says is free, and whether it likes 16 bits."""
import sys

import torch

from data import devices


def test_free_memory_is_what_the_system_says():
    assert 2**20 < devices.free_bytes(torch.device("cpu")) < 2**50


def test_a_container_limits_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    for name, text in (("memory.max", "1000\n"), ("memory.current", "900\n"),
                       ("memory.stat", "anon 500\ninactive_file 300\n")):
        (tmp_path / name).write_text(text)
    assert devices.free_bytes(torch.device("cpu")) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert devices._container_bytes() == sys.maxsize
    (tmp_path / "memory.max").unlink()
    assert devices._container_bytes() == sys.maxsize


def test_no_figure_of_the_system_means_a_cautious_one(monkeypatch):
    monkeypatch.setattr(devices.Path, "read_text", lambda self: "MemTotal: 5 kB\n")
    assert devices._system_bytes() == devices.UNKNOWN_BYTES


def test_half_is_faster_where_the_processor_says_so(monkeypatch):
    for answer in (True, False):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
        assert devices.half_is_faster(torch.device("cpu")) is answer
    assert devices.half_is_faster(torch.device("cuda"))
