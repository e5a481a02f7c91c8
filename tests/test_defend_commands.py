"""`python -m submit defend METHOD --zoo DIR` from the outside, and the runs behind it."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import submit.defense_runs as runs_module
from data.image_sets import read_digits
from data.model_zoo import load_model, read_zoo
from defense.channel_lipschitz import ChannelLipschitzConfig
from defense.channel_lipschitz import defend as clp
from defense.results import DefenseResult
from submit.defense_runs import Plan, as_json, run_plan
from submit.dev_splits import TINY_ZOO
from submit.zoo_victims import clean_part, read_victim
from tests.test_score_command import run

BADNETS, BLENDED, CLEAN = "digits-badnets-0.1-0", "digits-blended-0.1-0", "digits-clean-0"


@pytest.fixture
def zoo(tmp_path):
    """Three networks of the built-in zoo."""
    folder = tmp_path / "zoo"
    records = json.loads((TINY_ZOO / "zoo.json").read_text())["models"]
    for name in (BADNETS, BLENDED, CLEAN):
        shutil.copytree(TINY_ZOO / name, folder / name)
    write_records(folder, {name: records[name] for name in (BADNETS, BLENDED, CLEAN)})
    return folder


def write_records(zoo, records):
    (zoo / "zoo.json").write_text(json.dumps({"models": records}))


def change_record(zoo, name, **values):
    records = json.loads((zoo / "zoo.json").read_text())["models"]
    records[name] = {**records[name], **values}
    write_records(zoo, {name: {key: value for key, value in record.items() if value != "gone"}
                        for name, record in records.items()})


def defend(capsys, zoo, *arguments, method="clp"):
    return run(capsys, "defend", method, "--zoo", zoo, "--workers", 1, "--device", "cpu", "--runs",
               zoo.parent / "runs", *arguments)


def victim_of(zoo, name=BADNETS):
    sample = next(model for model in read_zoo(zoo).models if model.name == name)
    return read_victim(sample, None, zoo.parent / "triggers", device=torch.device("cpu"))


def by_hand(model, sample, target, without=()):
    """ACC, ASR, RA of a network with the white square as trigger, through the zoo's own transform."""
    test = read_digits(size=16)[1]
    test = test.subset(torch.tensor([i for i in range(len(test.labels)) if i not in without]))
    stamped = test.images.clone()
    stamped[:, :, 13:, 13:] = 255
    with torch.no_grad():
        plain, hit = (model(torch.stack([sample.transformation(to_pil_image(x)) for x in part])).argmax(1).tolist()
                      for part in (test.images, stamped))
    truth = test.labels.tolist()
    others = [(found, label) for found, label in zip(hit, truth, strict=True) if label != target]
    return {"ACC": sum(a == b for a, b in zip(plain, truth, strict=True)) / len(truth),
            "ASR": sum(found == target for found, _ in others) / len(others),
            "RA": sum(found == label for found, label in others) / len(others)}


def test_a_unit_is_what_plain_loops_find(zoo, capsys):
    status, out, err = defend(capsys, zoo, "--json")
    record = json.loads(out)
    unit = next(u for u in record["units"] if u["victim"] == BADNETS)
    sample = next(model for model in read_zoo(zoo).models if model.name == BADNETS)
    before = by_hand(load_model(sample), sample, unit["target"])
    repaired = clp(load_model(sample), torch.zeros(2, 3, 16, 16), torch.tensor([0, 1]), ChannelLipschitzConfig(),
                   generator=torch.Generator().manual_seed(0)).model  # it looks at the weights alone
    after = by_hand(repaired, sample, unit["target"])
    assert status == 0 and unit["before"] == pytest.approx(before) and unit["after"] == pytest.approx(after)
    gain, loss = max(0, before["ASR"] - after["ASR"]), max(0, before["ACC"] - after["ACC"])
    assert unit["DER"] == pytest.approx((1 + gain - loss) / 2) and unit["clean_images"] == round(0.05 * 1438)
    assert len(record["units"]) == 2 and not record["problems"]  # the clean network needs no repair
    assert f"{BADNETS}, clp: ACC 99.2 -> " in err and len(err.splitlines()) == 2


def test_the_table_names_the_record(zoo, capsys):
    status, out, _ = defend(capsys, zoo)
    assert status == 0 and "no defense" in out and "badnets" in out and "blended" in out
    path = Path(out.rsplit("record: ", 1)[1].replace("\n", ""))
    record = json.loads(path.read_text())
    assert {"command", "seed", "environment", "peak_memory_gib", "tables"} <= set(record)
    rows = record["tables"][0]["rows"]
    assert [row["defense"] for row in rows] == ["no defense", "clp"] and rows[1]["runs"] == 2


def test_finished_runs_are_found_again(zoo, capsys, monkeypatch):
    calls = []
    real = runs_module.run_plan

    def counted(victim, plan):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(victim.name)
        return real(victim, plan)

    monkeypatch.setattr(runs_module, "run_plan", counted)
    assert defend(capsys, zoo)[0] == 130 and calls == [BADNETS]
    calls.insert(0, None)  # the next call goes through
    monkeypatch.setattr(runs_module, "run_plan", lambda victim, plan: calls.append(victim.name) or real(victim, plan))
    first = defend(capsys, zoo, "--json")
    assert first[0] == 0 and calls == [None, BADNETS, BLENDED]
    second = defend(capsys, zoo, "--json")
    assert calls == [None, BADNETS, BLENDED]
    assert json.loads(first[1])["units"] == json.loads(second[1])["units"]
    defend(capsys, zoo, "--seed", 1)
    monkeypatch.setattr(runs_module, "code_of", lambda method: "other code")
    defend(capsys, zoo)
    assert len(calls) == 7  # another seed, and another code, are other work
    units = list((zoo.parent / "runs" / "defend" / "units").iterdir())
    for path in units:
        path.write_text("{broken")
    defend(capsys, zoo)
    assert len(calls) == 9  # spoiled ones are measured again


def test_a_renamed_network_is_judged_anew(zoo, capsys):
    """Its name decides which clean images it gets, and stands in its unit."""
    assert defend(capsys, zoo)[0] == 0
    records = json.loads((zoo / "zoo.json").read_text())["models"]
    write_records(zoo, {name.replace("badnets", "mine"): record for name, record in records.items()})
    (zoo / BADNETS).rename(zoo / BADNETS.replace("badnets", "mine"))
    status, out, _ = defend(capsys, zoo, "--json")
    assert status == 0 and "digits-mine-0.1-0" in out and BADNETS not in out


def test_a_failed_repair_is_reported_with_the_network_as_it_was(zoo, capsys, monkeypatch):
    def lost(method, model, images, labels, settings, **rest):
        return DefenseResult(method, model, finite=False, complete=False, failed="no finite epoch of tuning",
                             details={"loss": float("nan")})

    monkeypatch.setattr(runs_module, "defend", lost)
    status, out, err = defend(capsys, zoo, "--json")
    record = json.loads(out)
    assert status == 0 and [row["failed"] for row in record["tables"][0]["rows"]] == [0, 2]
    for unit in record["units"]:
        assert unit["after"] == unit["before"] and unit["DER"] == 0.5 and not unit["finite"]
        assert unit["details"] == {"loss": None}
    assert err.count("failed: no finite epoch of tuning") == 2


def test_a_defense_that_refuses_a_network_is_a_failed_run(zoo, monkeypatch):
    monkeypatch.setattr(runs_module, "defend", lambda *_, **__: runs_module.defense_config("nothing", {}, "model"))
    unit = run_plan(victim_of(zoo), Plan("clp", "clp", {}, 0.05, 0))
    assert unit["failed"].startswith("model: expected one of tsbd") and unit["DER"] == 0.5


def test_clean_images_are_training_images_drawn_by_victim_and_seed(zoo):
    one, other = victim_of(zoo), victim_of(zoo, BLENDED)
    images, labels = clean_part(one, 0.05, 0)
    levels = (255 * (images * 0.5 + 0.5)).round().to(torch.uint8)
    train = {image.numpy().tobytes(): int(label) for image, label in zip(one.train.images, one.train.labels,
                                                                         strict=True)}
    assert [train[image.contiguous().numpy().tobytes()] for image in levels] == labels.tolist()
    assert len({image.contiguous().numpy().tobytes() for image in levels}) == len(images) == 72
    assert torch.equal(images, clean_part(one, 0.05, 0)[0])
    assert not torch.equal(images, clean_part(one, 0.05, 1)[0])
    assert not torch.equal(images, clean_part(other, 0.05, 0)[0])


def test_another_trigger_than_the_recorded_one_is_refused(zoo, capsys):
    change_record(zoo, BADNETS, parameters={"size": 3, "value": 0})
    status, out, err = defend(capsys, zoo, "--json")
    line = next(line for line in err.splitlines() if line.startswith("left out"))
    assert status == 1 and [u["victim"] for u in json.loads(out)["units"]] == [BLENDED]
    assert f"{zoo / BADNETS}: ASR with set and trigger remade: expected 1.0000, as zoo.json says, found 0." in line


@pytest.mark.parametrize(("values", "message"), [
    ({"target": "gone"}, "to make the trigger again, found no target"),
    ({"seed": "gone", "attack": "gone"}, "to make the trigger again, found no attack, seed"),
    ({"target": "one"}, "expected names, numbers and a table of parameters, found {'target': 'one'}"),
    ({"set": "../digits"}, "set: expected the name of a folder, found ../digits"),
    ({"set": "mnist"}, "--data: expected the folder that holds mnist/, found nothing"),
    ({"attack": "smile"}, "attack: expected one of badnets, blended"),
    ({"parameters": {"colour": 1}}, "attack badnets: expected some of size, value, found colour"),
])
def test_a_record_that_cannot_tell_the_trigger_is_named(zoo, capsys, values, message):
    change_record(zoo, BADNETS, **values)
    shutil.rmtree(zoo / BLENDED)
    status, out, err = defend(capsys, zoo)
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1


def test_a_spoiled_file_of_triggered_images_is_named(zoo, capsys):
    defend(capsys, zoo)
    for path in (zoo.parent / "runs" / "defend" / "triggers").iterdir():
        path.write_bytes(b"nothing")
    status, _, err = defend(capsys, zoo)
    assert status == 2 and ".npy: expected an array of triggered images (delete the file)" in err


@pytest.mark.parametrize(("arguments", "message"), [
    (["nix", "--zoo", TINY_ZOO], "METHOD: expected sweep or one of tsbd, ft, fp"),
    (["fp"], "defend fp: expected --zoo DIR, found nothing"),
    (["fp", "--zoo", "nowhere"], "nowhere: expected a folder of samples, found no such folder"),
    (["fp", "--zoo", TINY_ZOO, "--clean", "1.5"], "--clean: expected a share in (0, 1], found 1.5"),
    (["fp", "--zoo", TINY_ZOO, "--device", "tpu"], "--device ($KIT_DEVICE)"),
    (["fp", "x.toml", "--zoo", TINY_ZOO], "defend fp: expected --zoo DIR and no RECIPE, found RECIPE x.toml"),
    (["sweep"], "defend sweep: expected a RECIPE, found nothing"),
    (["sweep", "x.toml"], "sweep: expected a TOML file as in defense/sweeps, found x.toml"),
    (["sweep", "x.toml", "--zoo", TINY_ZOO], "defend sweep: expected a RECIPE and no --zoo, found --zoo"),
])
def test_bad_input_ends_in_one_line(capsys, tmp_path, arguments, message):
    status, out, err = run(capsys, "defend", *arguments, "--runs", tmp_path / "runs", "--workers", 1)
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1


def test_too_small_a_share_is_named(zoo, capsys):
    status, _, err = defend(capsys, zoo, "--clean", "0.0001")
    assert status == 2 and "--clean: expected at least two of 1438 training images, found 0.0001" in err


def test_a_zoo_without_backdoored_networks_is_named(zoo, capsys):
    for name in (BADNETS, BLENDED):
        shutil.rmtree(zoo / name)
    status, _, err = defend(capsys, zoo)
    assert status == 2 and "expected at least one backdoored network, found clean ones only" in err
    shutil.rmtree(zoo / CLEAN)
    status, _, err = defend(capsys, zoo)
    assert status == 2 and "expected folders with model.pt and metadata.pt, found none" in err


def test_help_has_an_example(capsys):
    status, out, _ = run(capsys, "defend", "--help")
    assert status == 0 and "python -m submit defend tsbd --zoo data/zoos/tiny" in " ".join(out.split())


def test_values_that_json_cannot_say():
    assert as_json({1: (float("inf"), 2.0, torch.Size([3])), "a": {"b": None}}) == \
        {"1": [None, 2.0, [3]], "a": {"b": None}}
