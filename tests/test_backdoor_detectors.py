"""The benchmark of detectors: one zoo or several, what is judged is kept."""
import json
import shutil

import pytest

from benchmarks import backdoor_detectors
from benchmarks.backdoor_detectors import main
from submit.dev_splits import TINY_ZOO

SAMPLES = {"one": ("digits-badnets-0.1-0", "digits-clean-0"), "two": ("digits-clean-0",)}


@pytest.fixture
def zoos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for zoo, names in SAMPLES.items():
        for name in names:
            shutil.copytree(TINY_ZOO / name, tmp_path / zoo / name)
        records = json.loads((TINY_ZOO / "zoo.json").read_text())
        (tmp_path / zoo / "zoo.json").write_text(json.dumps(records))
    return tmp_path


def test_networks_of_several_zoos_make_one_table_and_are_judged_once(zoos, monkeypatch, capsys):
    main(["one", "two", "--detectors", "ours", "--workers", "1", "--out", "record.json"])
    record = json.loads((zoos / "record.json").read_text())
    assert record["command"] == "python -m benchmarks.backdoor_detectors one two --detectors ours"
    assert [(m["zoo"], m["model"]) for m in record["models"]] == [(zoo, n) for zoo, names in SAMPLES.items()
                                                                  for n in names]
    assert record["models"][1]["ours"]["p"] == record["models"][2]["ours"]["p"]
    kept = sorted((zoos / "runs" / "backdoor_detectors" / "ours").iterdir())
    assert [file.name[:-22] for file in kept] == ["digits-badnets-0.1-0", "digits-clean-0"]  # the same one in both zoos
    kept[1].write_text(json.dumps({**json.loads(kept[1].read_text()), "p": 0.5}))
    main(["one", "two", "--detectors", "ours", "--workers", "1", "--out", "again.json"])
    assert json.loads((zoos / "again.json").read_text())["models"][2]["ours"]["p"] == 0.5
    assert capsys.readouterr().out.splitlines()[-1].startswith("ours")
    monkeypatch.setattr(backdoor_detectors, "detectors_code", lambda: "another detector's")
    main(["two", "--detectors", "ours", "--workers", "1", "--out", "third.json"])
    assert json.loads((zoos / "third.json").read_text())["models"][0]["ours"]["p"] == record["models"][1]["ours"]["p"]


def test_wrong_input_is_named(zoos, capsys):
    (zoos / "deep").mkdir()
    shutil.copytree(zoos / "two", zoos / "deep" / "two")
    for arguments, message in [(["two", "deep/two"], "zoos: expected folders of different names, found two, two"),
                               (["nowhere"], "nowhere: expected a folder of samples, found no such folder"),
                               (["two", "--detectors", "best"], "--detectors: expected some of ours, trodo, report")]:
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
    assert backdoor_detectors.DETECTORS.keys() == {"ours", "trodo", "report", "mmbd"}
