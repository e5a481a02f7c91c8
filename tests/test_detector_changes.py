"""What each change adds: one climb a network, many ways of judging it."""
import json
import shutil

import pytest
import torch

from backdoor_detection.detection import DetectorConfig
from backdoor_detection.universal import UniversalConfig
from benchmarks import detector_changes
from benchmarks.detector_changes import SHIPPED, climbed, main, part, ways
from benchmarks.detector_verdicts import verdict
from data.model_zoo import read_zoo
from submit.dev_splits import TINY_ZOO


def test_the_shipped_row_is_the_shipped_detector():
    assert tuple(SHIPPED.values()) == UniversalConfig().changes
    sample = next(model for model in read_zoo(TINY_ZOO).models if model.name == "digits-badnets-0.1-0")
    found = climbed(sample)
    assert ways()["shipped"](found) == pytest.approx(verdict(sample, "ours", "cpu")["p"], rel=1e-3)
    assert ways()["columns alone"](found) == ways()["columns alone"]({
        **found, "stages": [[0.0] * 10, *found["stages"][1:]]})
    rows = torch.tensor(found["stages"])[[[*SHIPPED].index("columns"), len(SHIPPED) + 2]]
    assert torch.equal(part(found, ["columns", "columns, 0.2"]).stages, rows)


def test_a_zoo_gives_a_table_and_what_is_done_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("digits-badnets-0.1-0", "digits-clean-0"):
        shutil.copytree(TINY_ZOO / name, tmp_path / "zoo" / name)
    main(["zoo", "--workers", "1", "--out", "record.json"])
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["models"], record["backdoored"], record["table"].keys()) == (2, 1, ways().keys())
    assert record["table"]["shipped"] == {"auroc": 100, "accuracy": 100, "recall": 100, "false_alarms": 0}
    assert len(capsys.readouterr().out.splitlines()) == len(ways())
    monkeypatch.setattr(detector_changes, "climbed", lambda sample: pytest.fail("done twice"))
    main(["zoo", "--workers", "1", "--out", "again.json"])
    assert json.loads((tmp_path / "again.json").read_text())["table"] == record["table"]
    shutil.rmtree(tmp_path / "zoo" / "digits-clean-0")
    with pytest.raises(SystemExit):
        main(["zoo", "--out", "none.json"])
    assert "zoos: expected clean and backdoored networks, found one kind" in capsys.readouterr().err
    assert 0 < DetectorConfig().alarm < 1
