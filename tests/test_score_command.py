"""`python -m submit score` from the outside: tables, records, bad input, interruption. Predictors are stand-ins."""
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import anomaly.predict
import backdoor_detection.detection
import retrieval.nets
import retrieval.predict
from anomaly.score_files import write_scores
from backdoor_detection.detection import Detection
from data.anomaly_tree import read_tree
from data.errors import InputError
from data.files import write_json
from data.model_zoo import read_zoo
from retrieval.parser import Modification
from submit.cli import Task, _use_weights, main
from submit.dev_splits import dev_split
from submit.score_run import score_task
from submit.tables import _margins, _query_table
from submit.weights_registry import how_to_get

CALLS: list[str] = []
ZOO = dev_split("backdoor", 0)
NAMES = [model.name for model in read_zoo(ZOO).models]
SHARE = 100 * sum(model.ground_truth == 0 for model in read_zoo(ZOO).models) / len(NAMES)  # right if all are accused


def run(capsys, *arguments):
    """Exit status, stdout, stderr of `python -m submit ...`."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def picture(path, value, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def mask(path, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(size, dtype=np.uint8)
    pixels[4:12, 4:12] = 255
    Image.fromarray(pixels).save(path)


@pytest.fixture
def parts(tmp_path):
    """Two categories of five images, two of them defective, with masks."""
    root = tmp_path / "parts"
    for category in ("bolt", "nut"):
        for i in range(3):
            picture(root / category / "test" / "good" / f"{i}.png", i)
        for i in range(2):
            picture(root / category / "test" / "cut" / f"{i}.png", 10 + i)
            mask(root / category / "ground_truth" / "cut" / f"{i}.png")
    return root


@pytest.fixture
def scenes(tmp_path):
    root = tmp_path / "scenes"
    for i, name in enumerate("abc"):
        picture(root / "images" / f"{name}.png", i)
    (root / "queries.csv").write_text(
        "query_image,query_text,target_image\na.png,add cup,b.png\nb.png,add pan,c.png\nc.png,x,a.png\n")
    return root


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, tmp_path):
    """Quick predictors: defects are bright, a query finds the image it names, margins follow the file."""
    CALLS.clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KIT_DEVICE", raising=False)

    def predict_category(paths):
        CALLS.append(Path(paths[0]).parts[-4])
        scores = np.array([0.9 if "cut" in str(p) else 0.1 for p in paths])
        maps = np.linspace(0, 1, 224 * 224).reshape(1, 1, 224, 224).repeat(len(paths), 0).round(4)
        maps[:, :, 28:84, 28:84] *= scores[:, None, None, None]
        return scores, maps

    def embed(names):
        CALLS.append("embed")
        return np.array([[np.cos(ord(name[0])), np.sin(ord(name[0]))] for name in names])

    monkeypatch.setattr(anomaly.predict, "predict_category", predict_category)
    monkeypatch.setattr(retrieval.predict, "encode_database",
                        lambda df: embed([Path(p).name for p in df["target_image"]]))
    monkeypatch.setattr(retrieval.predict, "encode_queries",
                        lambda df: embed([{"add cup": "b", "add pan": "c"}.get(t, "c") for t in df["query_text"]]))
    monkeypatch.setattr(backdoor_detection.detection, "judge", lambda *_: Detection(
        True, 0.01, torch.tensor([1.0, 2.0, -0.4, 3.00004]), 1, (0, 1, 3), images=24, side=32, steps=7, steps_asked=10,
        seconds=1.23456))


def test_retrieval_is_predicted_scored_and_recorded(capsys, scenes, tmp_path):
    status, out, err = run(capsys, "score", "retrieval", "--data", scenes)
    assert (status, err) == (0, "")
    assert "66.67" in out and "3 queries" in out and "found instead" in out
    record = json.loads(next((tmp_path / "runs").glob("*-score-retrieval/record.json")).read_text())
    result = record["results"][0]
    assert result["value"] == pytest.approx(200 / 3) and result["dev_split"] is False
    assert result["data"] == str(scenes.resolve()) and result["predictions"] is None
    assert [part["correct"] for part in result["parts"]] == [True, True, False]
    assert record["environment"]["versions"]["torch"] and record["seed"] == 0
    assert not list((tmp_path / "runs" / "unfinished").iterdir())  # finished work is not found again by surprise


def test_a_shard_that_cannot_be_encoded_says_why(capsys, scenes, monkeypatch):
    def refuse(df):
        raise InputError("row 2 'query_image' a.png: expected sides, found a line")

    monkeypatch.setattr(retrieval.predict, "encode_queries", refuse)
    status, out, err = run(capsys, "score", "retrieval", "--data", scenes)
    assert (status, out) == (2, "") and "row 2 'query_image' a.png: expected sides, found a line" in err


def test_existing_predictions_are_scored_without_predicting(capsys, scenes, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    np.save(folder / "query_embeddings.npy", np.eye(3)[[0, 1, 2]])
    np.save(folder / "database_embeddings.npy", np.eye(3))
    status, out, _ = run(capsys, "score", "retrieval", "--data", scenes, "--predictions", folder, "--json")
    assert status == 0 and json.loads(out)["results"][0]["value"] == 100 and not CALLS
    assert sorted(p.name for p in folder.iterdir()) == ["database_embeddings.npy", "query_embeddings.npy"]
    np.save(folder / "query_embeddings.npy", np.eye(3)[:2])
    status, out, err = run(capsys, "score", "retrieval", "--data", scenes, "--predictions", folder)
    assert (status, out) == (2, "") and "query_embeddings.npy: expected 3 rows, found 2" in err
    np.save(folder / "query_embeddings.npy", np.array([print]), allow_pickle=True)
    status, _, err = run(capsys, "score", "retrieval", "--data", scenes, "--predictions", folder)
    assert status == 2 and "query_embeddings.npy: expected a NumPy array of numbers, found" in err
    status, _, err = run(capsys, "score", "retrieval", "--data", scenes, "--predictions", tmp_path / "none")
    assert status == 2 and "query_embeddings.npy: expected an array of embeddings, found no such file" in err


def test_anomaly_writes_the_organizers_files(capsys, parts, tmp_path):
    status, out, err = run(capsys, "score", "anomaly", "--data", parts)
    assert (status, err) == (0, "") and "bolt" in out and "10 images" in out
    folder = next((tmp_path / "runs").glob("*-score-anomaly"))
    results = json.loads((folder / "output" / "results.json").read_text())
    assert [row["Category"] for row in results["metadata"]] == ["bolt", "nut", "mean"]
    assert results["result"] == results["metadata"][-1]["leaderboard_score"]
    header = (folder / "output" / "results.csv").read_text().splitlines()[0]
    assert header == ("Category,pixel_auroc,pixel_f1,pixel_ap,pixel_aupro,image_auroc,image_f1,image_ap,"
                      "leaderboard_score")
    record = json.loads((folder / "record.json").read_text())["results"][0]
    assert record["value"] == results["result"] and record["parts"][0]["image_auroc"] == 100
    status, out, _ = run(capsys, "score", "anomaly", "--data", parts, "--predictions",
                         folder / "predictions" / "anomaly", "--json")
    assert json.loads(out)["results"][0]["value"] == record["value"]


def test_category_without_masks_is_scored_on_images_alone(capsys, parts):
    shutil.rmtree(parts / "nut" / "ground_truth")
    status, out, _ = run(capsys, "score", "anomaly", "--data", parts, "--json")
    result = json.loads(out)["results"][0]
    assert status == 0 and result["value"] == result["parts"][0]["leaderboard_score"]
    assert result["parts"][1]["images_only"] and result["parts"][1]["leaderboard_score"] == 100
    assert result["notes"] == ["no masks, so scored on image metrics alone: nut (left out of the mean)"]


def test_a_broken_image_is_named_and_the_others_are_scored(capsys, parts):
    (parts / "nut" / "test" / "good" / "1.png").write_bytes(b"no image")
    status, out, err = run(capsys, "score", "anomaly", "--data", parts)
    assert status == 1 and "9 images" in out
    assert "left out:" in err and "1.png: expected a readable image" in err and len(err.splitlines()) == 1


def test_a_category_of_one_image_does_not_stop_the_others(capsys, parts, monkeypatch):
    monkeypatch.undo()  # the real predictor refuses it
    monkeypatch.chdir(parts.parent)
    for name in ("good/1.png", "good/2.png", "cut/0.png", "cut/1.png"):
        (parts / "nut" / "test" / name).unlink()
    shutil.rmtree(parts / "nut" / "test" / "cut")
    shutil.rmtree(parts / "nut" / "ground_truth")
    status, out, err = run(capsys, "score", "anomaly", "--data", parts)
    assert status == 1 and "5 images" in out
    assert err == "left out: nut: paths: expected >= 2 images of a category, found 1\n"


def test_empty_folder_and_missing_scores(capsys, parts, tmp_path):
    (tmp_path / "empty").mkdir()
    for task in ("retrieval", "anomaly", "backdoor"):
        status, out, err = run(capsys, "score", task, "--data", tmp_path / "empty")
        assert (status, out) == (2, "") and err.startswith("error: ") and len(err.splitlines()) == 1
    status, _, err = run(capsys, "score", "anomaly", "--data", parts, "--predictions", tmp_path / "empty")
    assert status == 2 and "expected scores of at least one category" in err
    trees = read_tree(parts).categories
    write_scores(tmp_path / "empty", "bolt", trees[0].images, np.linspace(0, 1, 5), np.zeros((5, 1, 224, 224)))
    status, out, err = run(capsys, "score", "anomaly", "--data", parts, "--predictions", tmp_path / "empty")
    assert status == 1 and "nut" in err and "undefined, counted as 0: pixel_aupro" in out
    assert "bolt maps: expected different scores among the highest 30 % of the normal pixels, without which" in err


def test_interrupted_work_is_found_again(capsys, parts, monkeypatch, tmp_path):
    quick = anomaly.predict.predict_category

    def interrupted(paths):
        if "nut" in str(paths[0]):
            raise KeyboardInterrupt
        return quick(paths)

    monkeypatch.setattr(anomaly.predict, "predict_category", interrupted)
    status, out, err = run(capsys, "score", "anomaly", "--data", parts)
    assert (status, out) == (130, "") and "what is finished is kept" in err
    assert not list((tmp_path / "runs").glob("*-score-anomaly"))
    monkeypatch.setattr(anomaly.predict, "predict_category", quick)
    CALLS.clear()
    status, out, _ = run(capsys, "score", "anomaly", "--data", parts)
    assert status == 0 and CALLS == ["nut"] and "10 images" in out
    CALLS.clear()
    run(capsys, "score", "anomaly", "--data", parts)
    assert CALLS == ["bolt", "nut"]  # a finished run is never taken for the next one's predictions


def test_changed_input_is_predicted_anew(capsys, parts, monkeypatch):
    quick = anomaly.predict.predict_category
    monkeypatch.setattr(anomaly.predict, "predict_category",
                        lambda paths: quick(paths) if "bolt" in str(paths[0]) else run_out_of_disk())
    status, _, err = run(capsys, "score", "anomaly", "--data", parts)
    assert status == 2 and "No space left on device" in err and len(err.splitlines()) == 1
    monkeypatch.setattr(anomaly.predict, "predict_category", quick)
    picture(parts / "bolt" / "test" / "good" / "0.png", 99, size=(40, 40))
    CALLS.clear()
    run(capsys, "score", "anomaly", "--data", parts)
    assert CALLS == ["bolt", "nut"]


def run_out_of_disk():
    raise OSError(28, "No space left on device", "somewhere.json")


def test_a_full_disk_leaves_no_half_files(capsys, parts, monkeypatch, tmp_path):
    real, count = os.replace, []

    def full(source, target):
        count.append(target)
        if len(count) > 3:
            raise OSError(28, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    status, out, err = run(capsys, "score", "anomaly", "--data", parts)
    assert (status, out) == (2, "") and "found No space left on device" in err
    left = [p for p in (tmp_path / "runs").rglob("*") if p.is_file()]
    assert len(left) == 3 and all(json.loads(p.read_text()) for p in left)


def test_a_place_that_cannot_be_written(capsys, scenes, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    status, out, err = run(capsys, "score", "retrieval", "--data", scenes, "--runs", tmp_path / "file")
    assert (status, out) == (2, "") and "file: expected to read and write here, found File exists" in err
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)
    status, _, err = run(capsys, "score", "retrieval", "--data", scenes, "--runs", tmp_path / "ro")
    assert status == 2 and "ro: expected a folder to write to, found a read-only one" in err and not CALLS


def test_verdicts_on_models(capsys, tmp_path):
    status, out, _ = run(capsys, "score", "backdoor")
    assert status == 0 and f"{SHARE:.2f}" in out and "(dev)" in out and "1 [2] 0 3" in out
    folder = tmp_path / "mine"
    for name in NAMES[1:]:
        write_json(folder / f"{name}.json", {"backdoored": 1})
    status, out, err = run(capsys, "score", "backdoor", "--predictions", folder)
    assert status == 1 and f"{NAMES[0]}.json: expected a verdict on the model, found no such file" in err
    write_json(folder / f"{NAMES[0]}.json", {"backdoored": 2})
    (folder / f"{NAMES[1]}.json").write_text("{")
    _, _, err = run(capsys, "score", "backdoor", "--predictions", folder)
    assert "'backdoored': expected 1 (backdoored) or 0 (clean), found 2" in err
    assert f"{NAMES[1]}.json: expected JSON, found" in err


def test_a_verdict_says_how_far_the_time_reached(capsys, tmp_path):
    status, out, _ = run(capsys, "score", "backdoor", "--json")
    assert status == 0
    part = json.loads(out)["results"][0]["parts"][0]
    assert (part["model"], part["p_value"], part["suspect"], part["margins"]) == (NAMES[0], 0.01, 1, [1, 2, -0.4, 3])
    folder = next((tmp_path / "runs").glob("*-score-backdoor")) / "predictions" / "backdoor"
    assert json.loads((folder / f"{NAMES[0]}.json").read_text()) == {
        "backdoored": 1, "p_value": 0.01, "suspect": 1, "margins": [1.0, 2.0, -0.4, 3.0], "kept": [0, 1, 3],
        "images": 24, "side": 32, "steps": 7, "steps_asked": 10, "seconds": 1.235}


def test_a_network_without_finite_outputs_is_named_and_the_others_are_scored(capsys, monkeypatch):
    """Bug: NaN margins cannot be written as JSON, and the whole run ended."""
    quick = backdoor_detection.detection.judge
    names = iter(NAMES)

    def judge(*given):
        found = quick(*given)
        return replace(found, margins=found.margins / 0) if next(names) == NAMES[0] else found

    monkeypatch.setattr(backdoor_detection.detection, "judge", judge)
    status, out, err = run(capsys, "score", "backdoor")
    assert status == 1 and f"{len(NAMES) - 1} models" in out
    assert err.startswith(f"left out: {NAMES[0]}: ") and len(err.splitlines()) == 1
    assert "expected a network with finite outputs, found NaN or infinity" in err


@pytest.mark.parametrize(("margins", "suspect", "cell"), [
    ([], None, ""), ([1.4, -0.4, 12.6], 2, "1 0 [13]"), ([1.0, 2.0], None, "1 2"),
    ([float(k) for k in range(10)], 9, "0 1 2 3 4 5 6 7 8 [9]"),
    ([0.0, 7.25, 3.0, -1.0, 5.0, 9.0, 1.0, 1.0, 2.0, -3.0, 8.0], 5, "5: 9.0, 10: 8.0, 1: 7.2, 4: 5.0"),
])
def test_margins_are_shown_by_class_or_the_four_largest(margins, suspect, cell):
    assert _margins(margins, suspect) == cell


def test_a_verdict_cannot_bring_its_own_truth(capsys, tmp_path):
    for name in NAMES:
        write_json(tmp_path / "mine" / f"{name}.json", {"backdoored": 1, "ground_truth": 0, "correct": True})
    _, out, _ = run(capsys, "score", "backdoor", "--predictions", tmp_path / "mine", "--json")
    assert json.loads(out)["results"][0]["value"] == pytest.approx(SHARE)


@pytest.mark.parametrize(("text", "message"), [
    ('{"backdoored": 1, "p_value": NaN}', "'p_value': expected a finite number, found nan"),
    ('{"backdoored": 1, "margins": "abc"}', "'margins': expected finite numbers, found abc"),
    ('{"backdoored": 1, "margins": 5}', "'margins': expected finite numbers, found 5"),
    ("[" * 100_000, "expected JSON, found"), ("[1]", "'backdoored': expected 1"),
])
def test_malformed_verdicts_are_named(capsys, tmp_path, text, message):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.json").write_text('{"backdoored": 1}')
    (folder / f"{NAMES[0]}.json").write_text(text)
    status, _, err = run(capsys, "score", "backdoor", "--predictions", folder)
    assert status == 1 and f"{NAMES[0]}.json" in err and message in err and len(err.splitlines()) == 1


def test_brackets_in_a_text_are_shown_as_they_are(capsys, scenes):
    (scenes / "queries.csv").write_text("query_image,query_text,target_image\na.png,add [/red] [bold] cat,b.png\n"
                                        "a.png,add pan,c.png\n")
    status, out, _ = run(capsys, "score", "retrieval", "--data", scenes)
    assert status == 0 and "add [/red] [bold] cat" in out


def test_two_runs_on_the_same_data_do_not_meet(capsys, parts, monkeypatch, tmp_path):
    quick = anomaly.predict.predict_category

    def while_another_runs(paths):
        with pytest.raises(InputError, match="expected no other run on the same data, found one at work"):
            score_task("anomaly", Path("runs"), data=parts, predictions=None, seed=0, device="cpu",
                       settings=("embedded",), progress=lambda *_: None)
        return quick(paths)

    monkeypatch.setattr(anomaly.predict, "predict_category", while_another_runs)
    status, _, err = run(capsys, "score", "anomaly", "--data", parts, "--device", "cpu")
    assert (status, err) == (0, "")


def test_a_preset_reaches_the_predict_function(capsys, parts, monkeypatch, tmp_path):
    quick, seen = anomaly.predict.predict_category, []

    def watched(paths):
        seen.append((os.environ["KIT_ANOMALY_PRESET"], os.environ["KIT_WEIGHTS"]))
        return quick(paths)

    monkeypatch.setattr(anomaly.predict, "predict_category", watched)
    folder = tmp_path / "nets" / "vit_large_patch14_clip_336"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"the double above does not read it")
    status, _, err = run(capsys, "score", "anomaly", "--data", parts, "--device", "cpu", "--preset", "musc",
                         "--weights", tmp_path / "nets")
    assert (status, err) == (0, "") and set(seen) == {("musc", str(tmp_path / "nets"))}
    run(capsys, "score", "anomaly", "--data", parts, "--device", "cpu")
    assert seen[-1] == ("embedded", "")


@pytest.mark.parametrize("options, message", [
    (("--preset", "best"), "preset: expected one of embedded, musc, report, musc-v2, found best"),
    (("--preset", "musc"), "preset musc: expected --weights DIR with vit_large_patch14_clip_336/ in it, found none; "
     + how_to_get("vit_large_patch14_clip_336")),
    (("--preset", "report", "--weights", "nowhere"), "nowhere/vit_large_patch14_dinov2/model.safetensors: expected the "
     "weights that preset report needs, found no such file; "
     + how_to_get("vit_large_patch14_dinov2 vit_large_patch14_clip_336")),
])
def test_a_preset_that_cannot_run_is_named(capsys, parts, options, message):
    status, out, err = run(capsys, "score", "anomaly", "--data", parts, *options)
    assert (status, out, err) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize(("task", "options", "message"), [
    ("retrieval", ("--preset", "musc"), "--preset: expected with anomaly or all, found retrieval"),
    ("backdoor", ("--preset", "musc"), "--preset: expected with anomaly or all, found backdoor"),
    ("backdoor", ("--weights", "nets"), "--weights: expected with retrieval, anomaly or all, found backdoor"),
    ("retrieval", ("--weights", "nets"), "nets: expected a folder encoder/ or parser/ in it, found neither; where "
     "there is a network run `python -m submit weights fetch ViTamin-L-384` and `python -m submit weights freeze "
     "ViTamin-L-384 --out DIR`, then copy DIR here and give it as --weights DIR"),
    ("anomaly", ("--explain",), "--explain: expected with retrieval or all, found anomaly"),
])
def test_an_option_of_another_task_is_refused(capsys, task, options, message):
    assert run(capsys, "score", task, *options) == (2, "", f"error: {message}\n")


def test_weights_reach_the_retrieval_task(capsys, scenes, monkeypatch, tmp_path):
    quick, seen = retrieval.predict.encode_queries, []
    monkeypatch.setattr(retrieval.predict, "encode_queries",
                        lambda df: seen.append(os.environ["KIT_RETRIEVAL_WEIGHTS"]) or quick(df))
    (tmp_path / "nets" / "encoder").mkdir(parents=True)
    for options, expected in ((("--weights", tmp_path / "nets"), str(tmp_path / "nets")), ((), "")):
        status, _, err = run(capsys, "score", "retrieval", "--data", scenes, "--runs", f"runs{len(options)}", *options)
        assert (status, err) == (0, "") and seen.pop() == expected


def test_predictions_depend_on_the_weights(tmp_path, monkeypatch):
    for name in ("KIT_RETRIEVAL_WEIGHTS", "KIT_ANOMALY_PRESET", "KIT_WEIGHTS"):
        monkeypatch.setenv(name, "of an earlier run")
    file = tmp_path / "nets" / "parser" / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"1")
    first = _use_weights(Task.retrieval, "embedded", tmp_path / "nets")
    file.write_bytes(b"12")
    assert str(file) in first[1] and _use_weights(Task.all, "embedded", tmp_path / "nets") != first
    assert os.environ["KIT_RETRIEVAL_WEIGHTS"] == str(tmp_path / "nets")
    _use_weights(Task.all, "embedded", tmp_path)  # nets of the other tasks only
    assert os.environ["KIT_RETRIEVAL_WEIGHTS"] == ""


def test_an_explanation_says_what_was_read_and_where_the_target_stands(capsys, scenes, monkeypatch):
    read = {"add cup": Modification(("cup",), ("old [pan]",)), "add pan": Modification(("pan",)), "x": Modification()}
    monkeypatch.setattr(retrieval.nets, "parse", lambda texts: [read[text] for text in texts])
    status, out, err = run(capsys, "score", "retrieval", "--data", scenes, "--explain")
    assert (status, err) == (0, "")
    record = json.loads(next(Path("runs").glob("*-score-retrieval/record.json")).read_text())["results"][0]
    parts = record["parts"]
    assert [(p["added"], p["removed"]) for p in parts] == [(["cup"], ["old [pan]"]), (["pan"], []), ([], [])]
    assert [p["rank"] for p in parts] == [1, 1, 3]  # c finds itself, then b, then a
    assert parts[2]["best"] == [{"image": f"{name}.png", "cosine": round(float(np.cos(turn)), 4)}
                                for name, turn in (("c", 0), ("b", 1), ("a", 2))]
    assert record["target_among_best_5"] == 100
    assert "worst of 1 missed" in out and "nothing" in out and "old [pan]" not in out  # that one was not missed


def test_given_embeddings_are_explained_without_objects(capsys, scenes, tmp_path, monkeypatch):
    run(capsys, "score", "retrieval", "--data", scenes)
    folder = next((tmp_path / "runs").glob("*-score-retrieval/predictions/retrieval"))
    monkeypatch.setattr(retrieval.nets, "parse", None)  # nobody knows what read the texts then
    status, out, _ = run(capsys, "score", "retrieval", "--data", scenes, "--predictions", folder, "--explain", "--json")
    parts = json.loads(out)["results"][0]["parts"]
    assert status == 0 and [p["rank"] for p in parts] == [1, 1, 3] and all("added" not in p for p in parts)


def test_the_worst_queries_come_first():
    parts = [{"row": i, "query": f"text {i}", "correct": i == 7, "rank": 1 if i == 7 else 100 - i, "target": "t.png",
              "found": "f.png", "added": ["a cup"], "removed": ["a pan"]} for i in range(20)]
    shown = _query_table(parts[::-1])
    assert list(shown.columns[0].cells) == [str(i) for i in (0, 1, 2, 3, 4, 5, 6, 8)]
    assert next(iter(shown.columns[2].cells)) == "+ a cup\n- a pan" and next(iter(shown.columns[3].cells)) == "100"


def test_all_takes_a_folder_per_task(capsys, parts, scenes, tmp_path):
    every = tmp_path / "every"
    shutil.copytree(parts, every / "anomaly")
    shutil.copytree(scenes, every / "retrieval")
    shutil.copytree(ZOO, every / "backdoor")
    status, out, err = run(capsys, "score", "all", "--data", every)
    assert (status, err) == (0, "")
    assert all(f"{task} " in out for task in ("retrieval", "anomaly", "backdoor"))
    assert "1 [2] 0 3" in out and "found instead" not in out  # of the details only the margins by class
    run_folder = next((tmp_path / "runs").glob("*-score-all"))
    assert sorted(p.name for p in (run_folder / "predictions").iterdir()) == ["anomaly", "backdoor", "retrieval"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["score"], "Missing argument"), (["score", "foo"], "'foo' is not one of"), (["score", "all", "--bar"], "--bar"),
    (["foo"], "No such command"), (["score", "backdoor", "--seed", "-1"], "--seed"),
    (["score", "backdoor", "--device", "foo"], "--device ($KIT_DEVICE): expected auto, cpu, cuda or cuda:N, found foo"),
    (["score", "backdoor", "--device", "meta"], "--device ($KIT_DEVICE): expected auto, cpu"),
    (["score", "backdoor", "--device", "cuda:9999"], "--device ($KIT_DEVICE)"),
])
def test_wrong_usage_ends_in_one_line(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("command", [["score"], ["zoo", "build"], ["zoo", "inspect"], ["weights", "train"]])
def test_help_has_an_example(capsys, command):
    status, out, _ = run(capsys, *command, "--help")
    assert status == 0 and f"Example: python -m submit {' '.join(command)}" in " ".join(out.split())


@pytest.mark.parametrize("command", [[], ["zoo"], ["weights"]])
def test_no_input_shows_the_help(capsys, command):
    status, out, err = run(capsys, *command)
    assert (status, err) == (2, "") and "Usage: " in out
    assert run(capsys, *command, "--help")[0] == 0
