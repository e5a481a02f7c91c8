import json
import os

import pytest

from data.files import fingerprint, new_folder, write_atomic, write_json


def disk_full(*_):
    raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "a.txt", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_json_refuses_nan(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, "ä"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, "ä"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", float("nan"))
    assert not (tmp_path / "b.json").exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path, refuses):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert (tmp_path / "out" / "whole").exists()
    with refuses(r"out: expected a path where nothing lies yet"), new_folder(tmp_path / "out"):
        pass


def test_fingerprint_depends_on_every_part(tmp_path):
    (tmp_path / "a").write_text("1")
    one = fingerprint("x", 1, tmp_path / "a")
    assert one == fingerprint("x", 1, tmp_path / "a") and len(one) == 16
    (tmp_path / "a").write_text("2")
    assert one != fingerprint("x", 1, tmp_path / "a")
    assert fingerprint("ab", "c") != fingerprint("a", "bc")


def test_names_that_are_no_unicode_can_be_written(tmp_path):
    write_json(tmp_path / "a.json", "/c\udcff")
    assert json.loads((tmp_path / "a.json").read_text()) == "/c\udcff"
