"""`score backdoor --repair`: flagged networks go through the shipped repair and are measured (a stand-in repairs)."""
import copy
import json
import shutil

import pytest
import torch

import defense.repair
from data.model_zoo import load_model, read_zoo
from defense.results import DefenseResult
from submit.dev_splits import TINY_ZOO
from submit.repair_run import repaired, summary
from tests.test_defend_commands import by_hand
from tests.test_score_command import run

BADNETS, BLENDED, CLEAN = "digits-badnets-0.1-0", "digits-blended-0.1-0", "digits-clean-0"
CALLS = []


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """Three networks, verdicts that flag two of them, and a repair that blinds a network's first channel."""
    for name in (BADNETS, BLENDED, CLEAN):
        shutil.copytree(TINY_ZOO / name, tmp_path / "zoo" / name)
        (tmp_path / "verdicts").mkdir(exist_ok=True)
        (tmp_path / "verdicts" / f"{name}.json").write_text(json.dumps({"backdoored": int(name != BLENDED)}))
    records = json.loads((TINY_ZOO / "zoo.json").read_text())["models"]
    (tmp_path / "zoo" / "zoo.json").write_text(json.dumps({"models": {
        name: records[name] for name in (BADNETS, BLENDED, CLEAN)}}))
    CALLS.clear()

    def shipped(model, num_classes, folder, transformation):
        CALLS.append(folder.parent.name)
        return DefenseResult("tsbd", blinded(model), failed="" if "badnets" in str(folder) else "no time to tune",
                             details={"clean_accuracy": 0.5})

    monkeypatch.setattr(defense.repair, "shipped", shipped)
    return tmp_path / "zoo"


def blinded(model):
    ours = copy.deepcopy(model)
    with torch.no_grad():
        ours.conv1.weight[0] = 0
    return ours


def score(capsys, zoo, *arguments):
    return run(capsys, "score", "backdoor", "--data", zoo, "--predictions", zoo.parent / "verdicts", "--repair",
               "--runs", zoo.parent / "runs", "--device", "cpu", *arguments)


def test_flagged_networks_are_repaired_and_measured_on_images_they_did_not_give(zoo, capsys):
    status, out, _ = score(capsys, zoo, "--json")
    repair = json.loads(out)["results"][0]["repair"]
    first, second = repair["networks"]
    assert status == 0 and [first["model"], second["model"]] == [BADNETS, CLEAN] == CALLS
    sample = next(model for model in read_zoo(zoo).models if model.name == BADNETS)
    given = {int(path.stem.split("_")[0]) for path in sample.images_folder.iterdir()}
    model = load_model(sample)
    for when, network in (("before", model), ("after", blinded(model))):
        assert first[when] == pytest.approx(by_hand(network, sample, 0, without=given)) and given
    assert second["after"] is None and "to make the trigger again, found no attack" in second["unknown"]
    assert (repair["flagged"], repair["failed"], repair["known"]) == (2, 1, 1)
    assert repair["after"] == pytest.approx({name: first["after"][name] for name in ("ACC", "ASR")})


def test_the_table_shows_them_and_finished_repairs_are_found_again(zoo, capsys):
    status, out, _ = score(capsys, zoo)
    assert status == 0 and "not repaired: no time to tune" in out and "mean of 1: ACC" in out and " -> " in out
    assert score(capsys, zoo)[1].split("repair of")[1] == out.split("repair of")[1] and CALLS == [BADNETS, CLEAN]
    (zoo / BADNETS / "model.pt").write_bytes((zoo / BLENDED / "model.pt").read_bytes())
    score(capsys, zoo)
    assert CALLS == [BADNETS, CLEAN, BADNETS]  # other weights are other work


def test_nothing_flagged_is_nothing_repaired(zoo, capsys):
    for path in (zoo.parent / "verdicts").iterdir():
        path.write_text('{"backdoored": 0}')
    repair = json.loads(score(capsys, zoo, "--json")[1])["results"][0]["repair"]
    assert repair == {"flagged": 0, "failed": 0, "known": 0, "before": None, "after": None, "networks": []}
    assert not CALLS and score(capsys, zoo)[0] == 0


def test_a_network_without_record_is_repaired_all_the_same(zoo, tmp_path):
    (zoo / "zoo.json").unlink()
    sample = next(model for model in read_zoo(zoo).models if model.name == BADNETS)
    row = repaired(sample, None, tmp_path / "kept")
    assert row["after"] is None and row["attack"] is None and row["details"] == {"clean_accuracy": 0.5}
    assert summary([row]) == {"flagged": 1, "failed": 0, "known": 0, "before": None, "after": None}


@pytest.mark.parametrize("arguments", [["retrieval", "--repair"], ["backdoor", "--sets", "x"]])
def test_repair_belongs_to_the_backdoor_task(capsys, tmp_path, arguments):
    status, out, err = run(capsys, "score", *arguments, "--runs", tmp_path / "runs")
    assert (status, out) == (2, "") and "--repair, --sets: expected together, with backdoor or all" in err
