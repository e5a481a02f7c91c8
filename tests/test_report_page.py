"""`python -m submit report`: what the page shows, what it escapes, what it does without; a browser reads it."""
import base64
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from anomaly.score_files import write_scores
from data.anomaly_tree import read_tree
from data.files import npy_bytes, write_json
from submit.pixel_curves import level_counts
from submit.report import fixed, printable, seconds, write_report
from submit.report_parts import backdoor_part, defense_part, unlearnable_part
from submit.report_parts.anomaly_part import rank_errors
from submit.report_parts.charts import POINTS, line, precision_recall, roc
from submit.report_parts.pictures import Album, heat
from submit.report_parts.run_records import read_run
from submit.unlearnable_sweeps import unlearnable_summaries
from tests.test_score_command import mask, picture, run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>alert('x')</script> & \"add\" \u202egnp.exe"
HERE = {"python": "3.10.11", "versions": {"torch": "2.4.0"}, "system": "Linux", "cpu": "a <b>fast</b> one", "cores": 2,
        "gpu": None}
VOID = {"meta", "link", "img", "br", "path", "rect", "line", "polyline", "circle"}


def result(task, value, parts, **more):
    return {"task": task, "metric": "of the test, %", "value": value, "interval_95": [value - 5, value + 5], "n": 3,
            "counted": "things", "seconds": 2.5, "place_in_top_10": 2, "dev_split": False, "predictions": None,
            "notes": [], "problems": [], "parts": parts} | more


@pytest.fixture
def scored(tmp_path):
    """A run of all three tasks on data of a few pictures."""
    folder = tmp_path / "runs" / "20260102-101500-1-score-all"
    results = [retrieval_result(tmp_path, folder), anomaly_result(tmp_path, folder), backdoor_result(folder)]
    write_json(folder / "record.json", {"command": f"python -m submit score all {HOSTILE}", "seed": 0, "device": "cpu",
                                        "results": results, "environment": HERE, "peak_memory_gib": {"host": 0.5}})
    return folder


def retrieval_result(root, folder):
    for i, name in enumerate("qabc"):
        picture(root / "scenes" / "images" / f"{name}.png", i)
    rows = "".join(f'q.png,"{text}",{name}.png\n' for name, text in
                   (("a", "add cup"), ("b", HOSTILE.replace('"', '""')), ("c", "add pan")))
    (root / "scenes" / "queries.csv").write_text("query_image,query_text,target_image\n" + rows, encoding="utf-8")
    embeddings = {"query": np.eye(3)[[0, 2, 2]] + 0.1, "database": np.eye(3)}
    for side, rows in embeddings.items():
        (folder / "predictions" / "retrieval").mkdir(parents=True, exist_ok=True)
        (folder / "predictions" / "retrieval" / f"{side}_embeddings-000000.npy").write_bytes(npy_bytes(rows))
    parts = [{"row": 2 + i, "query": text, "target": f"{'abc'[i]}.png", "found": f"{found}.png", "correct": right}
             for i, (text, found, right) in enumerate((("add cup", "a", True), (HOSTILE, "c", False),
                                                       ("add pan", "c", True)))]
    return result("retrieval", 66.7, parts, data=str(root / "scenes"), dev_split=True)


def anomaly_result(root, folder):
    tree = root / "parts" / "bolt"
    for i in range(2):
        picture(tree / "test" / "good" / f"{i}.png", i)
        picture(tree / "test" / "bent" / f"{i}.png", 10 + i)
        mask(tree / "ground_truth" / "bent" / f"{i}.png")
    category = read_tree(root / "parts").categories[0]
    maps = np.random.default_rng(0).random((4, 1, 224, 224))
    write_scores(folder / "predictions" / "anomaly" / "output_scores", "bolt", category.images,
                 np.array([0.9, 0.2, 0.1, 0.4]), maps)
    metrics = {name: 50.0 for name in ("image_auroc", "image_f1", "image_ap", "pixel_auroc", "pixel_f1", "pixel_ap",
                                       "pixel_aupro")}
    parts = [{"category": "bolt", "images": 4, "defective": 2, **metrics, "leaderboard_score": 50.0,
              "intervals": {name: [40.0, 61.0] for name in metrics}, "images_only": False, "undefined": []}]
    return result("anomaly", 50.0, parts, data=str(root / "parts"), notes=["a note of the run"])


def backdoor_result(folder):
    write_json(folder / "predictions" / "backdoor" / "units.json", {"one": 1.5, "two": 70.0})
    parts = [{"model": name, "attack": attack, "ground_truth": truth, "backdoored": verdict,
              "correct": verdict != truth, "p_value": p, "suspect": 1, "margins": [1.0, 8.0, -2.0]}
             for name, attack, truth, verdict, p in (("one", "clean", 1, 0, 0.7), ("two", "badnets", 0, 0, 0.4),
                                                     ("three", "blended", 0, 1, 0.01))]
    return result("backdoor", 66.7, parts, data=str(folder), auroc=100.0)


def spread(acc, asr, der, std=None):
    return {name: {"mean": value, "std": std} for name, value in
            (("ACC", acc), ("ASR", asr), ("RA", acc - 1), ("DER", der))}


@pytest.fixture
def defended(tmp_path):
    """A sweep over two shares of clean images."""
    def row(name, figures, **more):
        return {"defense": name, "runs": 2, "failed": 0, "seconds": 3.25, "all": figures,
                "attacks": {"badnets": figures, "sig": figures}} | more

    tables = [{"set": "digits", "ratio": 0.1, "clean": clean, "rows": [
        row("no defense", spread(98.0, 99.0, 50.0)), row("tsbd", spread(97.25, 1.5, 80 + 100 * clean, std=0.75))]}
        for clean in (0.05, 0.1)]
    unit = {"victim": "digits-badnets", "defense": "tsbd", "failed": "<b>no</b> clean images"}
    folder = tmp_path / "runs" / "20260102-101501-1-defend-sweep"
    write_json(folder / "record.json", {"command": "python -m submit defend sweep", "seed": None, "device": "cpu",
                                        "tables": tables, "units": [unit], "problems": ["a network: expected one"],
                                        "environment": HERE, "peak_memory_gib": {"host": 0.5}})
    return folder


@pytest.fixture
def purified(tmp_path):
    """A sweep of two countermeasures over two attacks, the second of which never gave a poisoned set."""
    def unit(attack, defense, seed, accuracy, **more):
        return {"set": "digits", "images": 100, "attack": attack, "attack_method": attack, "ratio": 0.5 * bool(attack),
                "seed": seed, "defense": defense, "accuracy": accuracy, "failed": "", "seconds": 2.0} | more

    lost = {"failed": "no set", "seconds": 0.0}
    losses = {"stage 1 image": [4.0, 2.0, 1.0], "stage 1 rate": [1.0, None, 0.0]}
    units = [unit("", "none", 0, 0.9), unit("", "none", 1, 0.8), unit("lsp", "none", 0, 0.25),
             unit("lsp", "none", 1, 0.25), unit("lsp", "gray", 0, 0.7), unit("lsp", "gray", 1, 0.8),
             unit("lsp", "dvae", 0, 0.85, losses=losses), unit("lsp", "dvae", 1, 0.25, failed=HOSTILE),
             *(unit("tap", defense, 0, None, **lost) for defense in ("none", "gray"))]
    folder = tmp_path / "runs" / "20260102-101503-1-defend-sweep"
    write_json(folder / "record.json", {"command": "python -m submit defend sweep", "seed": None, "device": "cpu",
                                        "accuracies": unlearnable_summaries(units), "problems": ["tap: no set"],
                                        "units": units, "environment": HERE, "peak_memory_gib": {"host": 0.5}})
    return folder


@pytest.fixture
def profiled(tmp_path):
    stages = [{"stage": "read", "units": "4 images", "on": "host", "seconds_here": 2.0, "seconds": [2.0, 3.0],
               "peak_bytes": 0.0},
              {"stage": "compare", "units": "4 images", "on": "device", "seconds_here": None, "seconds": [1.0, 6.0],
               "peak_bytes": 2.0**31}]
    folder = tmp_path / "runs" / "20260102-101502-1-profile-anomaly"
    write_json(folder / "record.json", {
        "command": "python -m submit profile anomaly", "task": "anomaly", "workload": "two categories",
        "gpu": "rtx4090", "rates": "assumed", "stages": stages, "chart": [], "seconds": [3.0, 9.0], "limit_s": 10800,
        "peak_gib": 2.0, "memory_gib": 24.0, "verdict": "fits", "largest_images": 609, "notes": ["a remark"],
        "environment": HERE})
    return folder


def page(tmp_path, *folders):
    made = write_report(folders, tmp_path / "page.html", force=True)
    return (tmp_path / "page.html").read_text(encoding="utf-8"), made


class Elements(HTMLParser):
    """Start tags with their attributes; complains about tags that do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag


def test_the_page_of_every_kind_of_run(tmp_path, scored, defended, purified, profiled):
    text, made = page(tmp_path, scored, defended, purified, profiled)
    shown = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))
    for expected in ("66.70", "61.7 – 71.7", "place 2 of the top 10", "practice data", "a note of the run",  # results
                     "row 3, target at place 3", "1 missed", "2 found", "1 · 0.9",  # retrieval
                     "image auroc", "40.0 – 61.0", "images, AUROC 50.0 %", "4 images, worst first",  # anomaly
                     "truth: badnets", "verdict: clean", "1 - p, AUROC 100.0 %",  # backdoor
                     "97.2 ± 0.8", "97.2 / 1.5 / 90.0", "digits, 10 % poisoned: DER", "left out: a network",  # defense
                     "digits, 100 images, 50 % of them poisoned", "poisoned 25.0", "left out: tap: no set",
                     "no countermeasure 85.0 ± 7.1 25.0 ± 0.0 - - - 1/5 2.0",  # unlearnable examples
                     "3 s – 9 s", "here 2 s", "609 images", "a remark"):  # profile
        assert expected in shown, expected
    assert made.bytes == len((tmp_path / "page.html").read_bytes()) and made.path == tmp_path / "page.html"
    assert page(tmp_path, scored, defended, purified, profiled)[0] == text  # the same runs, the same bytes


def test_nothing_is_loaded_and_nothing_runs(tmp_path, scored, defended, purified, profiled):
    found = Elements(page(tmp_path, scored, defended, purified, profiled)[0]).found
    policy = next(a["content"] for tag, a in found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert {tag for tag, _ in found} & {"script", "iframe", "object", "embed", "form", "base"} == set()
    for tag, attributes in found:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    pictures = [a for tag, a in found if tag == "img"]
    assert len(pictures) == 3 * 5 + 4 + 4 + 2  # of queries, images, maps and masks
    assert all(a["src"].startswith("data:image/webp;base64,") and a["loading"] == "lazy" for a in pictures)
    anchors = {a["id"] for _, a in found if "id" in a}
    assert all(a["href"][1:] in anchors for tag, a in found if tag == "a")


def test_texts_of_strangers_are_escaped(tmp_path, scored, defended, purified):
    text, _ = page(tmp_path, scored, defended, purified)
    assert "<script" not in text and "<b>no</b>" not in text and "<b>fast</b>" not in text and "\u202e" not in text
    assert text.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;add&#34; \\u202egnp.exe") == 3


def test_moved_folders_are_named_and_the_page_is_made(tmp_path, scored):
    shutil.rmtree(tmp_path / "scenes")
    shutil.rmtree(scored / "predictions")
    text, made = page(tmp_path, scored)
    assert f"{tmp_path}/scenes: expected the images of this run, found no such folder" in "\n".join(made.notes)
    for task in ("retrieval", "anomaly"):
        expected = f"{scored}/predictions/{task}: expected the predictions of this run, found no such folder"
        assert expected in "\n".join(made.notes) and expected in text
    assert "no picture" in text and "<img" not in text and "66.70" in text
    assert [limit.what for limit in made.limits] == ["retrieval, whole run", "anomaly, whole run"]


def test_a_record_without_its_data_folder_says_so(tmp_path, scored):
    record = json.loads((scored / "record.json").read_text())
    del record["results"][0]["data"]
    write_json(scored / "record.json", record)
    assert "the record does not say where its images lie" in page(tmp_path, scored)[1].notes[0]


def test_other_queries_than_those_scored_are_not_shown(tmp_path, scored):
    table = tmp_path / "scenes" / "queries.csv"
    table.write_text(table.read_text().replace("add pan", "add pot"))
    assert "expected the 3 queries that were scored, found others" in page(tmp_path, scored)[1].notes[0]


def test_other_predictions_than_those_scored_are_not_shown(tmp_path, scored):
    file = scored / "predictions" / "retrieval" / "database_embeddings-000000.npy"
    file.write_bytes(npy_bytes(np.eye(4)))
    assert "expected 3 and 3 embeddings, found 3 and 4" in "\n".join(page(tmp_path, scored)[1].notes)


def test_what_an_explanation_recorded_is_shown_as_it_is(tmp_path, scored):
    record = json.loads((scored / "record.json").read_text())
    for part in record["results"][0]["parts"]:
        part |= {"rank": 3, "best": [{"image": "b.png", "cosine": 0.25}, {"image": "gone.png", "cosine": 0.125}],
                 "added": ["cup <i>"], "removed": []}
    write_json(scored / "record.json", record)
    shutil.rmtree(scored / "predictions" / "retrieval")
    text, made = page(tmp_path, scored)
    assert not any("retrieval" in note for note in made.notes)
    assert "target at place 3" in text and "1 · 0.250" in text and "+ cup &lt;i&gt;" in text


def test_limits_say_what_is_over(tmp_path, scored, profiled):
    limits = page(tmp_path, scored, profiled)[1].limits
    assert [(limit.what, limit.seconds, limit.verdict) for limit in limits] == [
        ("retrieval, whole run", (2.5, 2.5), "within"), ("anomaly, whole run", (2.5, 2.5), "within"),
        ("backdoor, slowest sample", (70.0, 70.0), "over"), ("anomaly, predicted", (3.0, 9.0), "fits")]


def test_a_run_as_the_judge_shows_its_verdicts(tmp_path, scored):
    record = json.loads((scored / "record.json").read_text())
    verdicts = [{"ok": True, "rule": "time", "text": "2.5 s"}, {"ok": False, "rule": "writes", "text": HOSTILE}]
    record |= {"results": [], "judge": {"package": "mine", "tier": "audit", "python": "3.10", "verdicts": verdicts}}
    write_json(scored / "record.json", record)
    text, made = page(tmp_path, scored)
    shown = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))
    assert "mine , held by audit" in shown and "1 broken" in shown and "writes broken &lt;script&gt;" in shown
    assert made.limits == () and "<script" not in text


def test_rows_of_several_runs_say_of_which(tmp_path, scored):
    other = shutil.copytree(scored, scored.with_name("20260102-101509-2-score-all"))
    alone, together = (page(tmp_path, *runs)[0] for runs in ([scored], [scored, other]))
    for one in (scored, other):
        row = f'<tr><td>anomaly<br><span class="soft">{one.name}</span></td>'
        assert row not in alone and row in together


def test_nothing_is_overwritten_unasked(tmp_path, scored, refuses):
    out = tmp_path / "page.html"
    out.write_text("mine")
    with refuses(r"page.html: expected a path where nothing lies yet \(--force overwrites\), found an existing file"):
        write_report([scored], out, force=False)
    assert out.read_text() == "mine"


@pytest.mark.parametrize(("content", "message"), [
    (None, "record.json: expected the record of a run, found no such file"),
    ("{", "record.json: expected JSON, found"),
    ("[1]", "record.json: expected a JSON object, found list"),
    ('{"a": 1}', "expected the record of score, defend, profile, defend --attack, found the keys a"),
    ('{"results": [{"task": "retrieval"}]}', "expected a whole record of score, found KeyError: 'interval_95'"),
    ('{"results": [{"task": "chess"}]}', "results task: expected one of retrieval, anomaly, backdoor, found chess"),
])
def test_broken_records_are_refused(tmp_path, refuses, content, message):
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "record.json").write_text(content)
    with refuses(re.escape(message)):
        write_report([tmp_path / "run"], tmp_path / "page.html", force=False)
    assert not (tmp_path / "page.html").exists()


def test_a_record_file_stands_for_its_folder(scored):
    assert read_run(scored / "record.json") == read_run(scored)


def test_the_command(capsys, tmp_path, monkeypatch, scored):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "report")
    assert (status, err) == (0, "") and (scored / "report.html").is_file()
    assert "backdoor, slowest sample: 70 s of 60 s on a <b>fast</b> one: over" in out
    status, out, err = run(capsys, "report", scored)
    assert status == 2 and "--force overwrites" in err
    status, out, err = run(capsys, "report", scored, "--force", "--json")
    assert status == 0 and json.loads(out)["limits"][0]["limit_s"] == 600
    status, out, err = run(capsys, "report", "--runs", tmp_path / "scenes")
    assert status == 2 and "expected a run of `python -m submit score` (or name a RUN), found none" in err


def test_rank_errors_against_a_double_loop():
    generator = np.random.default_rng(1)
    truth, scores = generator.random(30) < 0.4, generator.integers(0, 8, 30) / 8
    expected = [np.mean([(other > own) + (other == own) / 2 if defect else (other < own) + (other == own) / 2
                         for other, kind in zip(scores, truth, strict=True) if kind != defect])
                for own, defect in zip(scores, truth, strict=True)]
    np.testing.assert_allclose(rank_errors(truth, scores), expected)
    assert np.isnan(rank_errors(np.ones(3, bool), np.arange(3.0))).all()


def test_curves_against_scikit_learn():
    generator = np.random.default_rng(2)
    truth, scores = generator.random(50) < 0.5, generator.integers(0, 12, 50) / 12
    counts = level_counts(truth, scores)
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    np.testing.assert_allclose(roc(*counts), (false, true))
    precision, recall, _ = precision_recall_curve(truth, scores)
    own_recall, own_precision = precision_recall(*counts)
    np.testing.assert_allclose(own_recall[1:], recall[:-1][::-1])
    np.testing.assert_allclose(own_precision[1:], precision[:-1][::-1])
    steps = (np.diff(own_recall) * own_precision[1:]).sum()
    assert steps == pytest.approx(average_precision_score(truth, scores))


def test_long_lines_keep_their_ends_and_their_shape():
    x = np.linspace(0, 1, 5000)
    points = np.array([point.split(",") for point in line("half", x, x >= 0.5).points.split()], float)
    assert len(points) <= POINTS
    assert points[0].tolist() == [0, 100] and points[-1].tolist() == [100, 0]
    np.testing.assert_allclose(points[:, 1], np.where(points[:, 0] >= 50, 0, 100))


def test_an_album_has_a_limit(tmp_path):
    picture(tmp_path / "a.png", 1, size=(300, 200))
    one = Album(10**6, 64)
    size = len(one.file(tmp_path / "a.png"))
    album = Album(2 * size, 64)
    assert [album.file(tmp_path / "a.png") is None for _ in range(3)] == [False, False, True]
    assert album.bytes == 2 * size and "1 pictures are left out" in album.notes()[0]
    (tmp_path / "b.png").write_text("no picture")
    assert album.file(tmp_path / "b.png") is None and "b.png: expected a readable image" in album.notes()[0]


def test_heat_is_dark_at_zero_and_light_at_one():
    gray = np.asarray(heat(np.linspace(0, 1, 32)[None]).convert("L"), int)[0]
    assert (np.diff(gray) > 0).all() and gray[0] < 20 and gray[-1] > 240
    assert heat(np.array([[0.5]])).getpixel((0, 0)) == (208, 80, 70)  # halfway between the third and the fourth colour


def test_margins_hang_from_zero():
    part = {"model": "m", "attack": "clean", "backdoored": 0, "correct": True, "margins": [6.0, -2.0], "suspect": 0}
    model = backdoor_part._model(part)
    assert [(bar.bottom, bar.height, bar.suspect) for bar in model.bars] == [(25, 75, True), (0, 25, False)]
    assert backdoor_part._model(part | {"margins": [0.0, 0.0]}).bars[1].height == 0


def test_curves_of_a_sweep_follow_what_varies(defended):
    charts = defense_part.section(read_run(defended)).charts
    assert [(chart.title, chart.across_ends) for chart in charts] == [("digits, 10 % poisoned: DER", ("5 %", "10 %"))]
    assert [one.points for one in charts[0].lines] == ["0,50 100,50", "0,15 100,10"]


def test_accuracies_of_countermeasures_are_bars_beside_the_clean_one(purified):
    found = unlearnable_part.section(read_run(purified))
    lsp, tap = found.tables[0].charts
    assert [(bar.name, bar.value, bar.style) for bar in lsp.bars] == [
        ("clean set", pytest.approx(85), "host"), ("poisoned", 25, "over"), ("gray", pytest.approx(75), ""),
        ("dvae", pytest.approx(55), "")]
    assert lsp.clean == pytest.approx(85) and [bar.value for bar in tap.bars[1:]] == [None] * 3
    assert found.failed == (("lsp, ratio 0.5, dvae, seed 1", HOSTILE),)


def test_what_is_restored_is_in_percent(purified):
    record = json.loads((purified / "record.json").read_text())
    units = [unit for unit in record["units"] if unit["attack"] != "tap"]
    write_json(purified / "record.json", record | {"accuracies": unlearnable_summaries(units)})
    rows = unlearnable_part.section(read_run(purified)).tables[0].rows
    assert [row.restored for row in rows] == [None, pytest.approx(100 * 50 / 60), pytest.approx(100 * 30 / 60)]


def test_losses_are_curves_from_zero_to_the_largest(purified):
    chart, = unlearnable_part.section(read_run(purified)).curves
    assert chart.title == "lsp, ratio 0.5, dvae, seed 0: stage 1"
    assert (chart.across_ends, chart.up_ends) == (("1", "3"), ("0", "4"))
    assert [(one.name, one.points) for one in chart.lines] == [("image", "0,0 50,50 100,75"), ("rate", "0,75 100,100")]


@pytest.mark.parametrize(("edit", "message"), [
    (lambda record: record["accuracies"].clear(), "record.json accuracies: expected at least one table, found none"),
    (lambda record: record.update(accuracies=7), "expected a whole record of defend --attack, found TypeError"),
    (lambda record: record["accuracies"][0]["rows"].clear(), "a whole record of defend --attack, found IndexError"),
    (lambda record: record["accuracies"][0]["rows"][1]["attacks"].pop("lsp"), "found KeyError: 'lsp'"),
    (lambda record: record["accuracies"][0].update(ratio="half"), "a number from 0 to 1, found half"),
    (lambda record: record["accuracies"][0]["rows"][0]["clean"].update(mean=101), "from 0 to 100, found 101"),
    (lambda record: record["accuracies"][0]["rows"][0]["clean"].update(std=math.nan), "from 0 to 100, found nan"),
    (lambda record: record["accuracies"][0]["rows"][0].update(restored=math.inf), r"to 1e\+09, found inf"),
    (lambda record: record["units"][6]["losses"].update({"stage 1 rate": ["a"]}), "record.json losses: .* found a"),
    (lambda record: record["units"][0].pop("failed"), "found KeyError: 'failed'"),
])
def test_edited_records_of_countermeasures_end_in_one_line(tmp_path, purified, refuses, edit, message):
    record = json.loads((purified / "record.json").read_text())
    edit(record)
    (purified / "record.json").write_text(json.dumps(record))
    with refuses(message):
        page(tmp_path, purified)


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.0412, "0.041 s"), (2.5, "2.5 s"), (60, "60 s"),
                                             (119.4, "119 s"), (600, "10 min"), (10800, "3 h")])
def test_seconds_in_the_unit_that_fits(value, text):
    assert seconds(value) == text


def test_figures_and_texts():
    assert (fixed(None), fixed(2.345, 2), printable("a\u0007\nb"), printable(3)) == ("-", "2.35", "a\\x07\nb", 3)
    assert math.isnan(printable(math.nan))


BROWSER_PAGE = """<body><script>
const results = [];
for (const width of [1280, 360]) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 800; frame.src = "page.html";
  frame.onload = () => {
    const page = frame.contentDocument, images = [...page.images], root = page.documentElement;
    page.querySelectorAll("details").forEach(e => e.open = true);
    images.forEach(e => e.loading = "eager");
    setTimeout(() => {
      results.push({images: images.length, broken: images.filter(e => !e.complete || !e.naturalWidth).length,
                    beyond: root.scrollWidth - root.clientWidth});
      if (results.length == 2) document.body.innerText = "found " + JSON.stringify(results);
    }, 500);
  };
  document.body.append(frame);
}
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian's package)")
def test_a_browser_loads_every_picture_without_a_complaint(tmp_path, scored, defended, purified, profiled):
    page(tmp_path, scored, defended, purified, profiled)
    (tmp_path / "outer.html").write_text(BROWSER_PAGE)
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
         "--dump-dom", (tmp_path / "outer.html").as_uri()], capture_output=True, text=True, timeout=120, check=False)
    assert ":CONSOLE" not in done.stderr  # errors, and what the page's own policy refused
    found = json.loads(re.search(r"found (\[.*\])", done.stdout)[1])
    assert found == 2 * [{"images": 25, "broken": 0, "beyond": 0}]  # on a desk and on a phone


def test_picture_of_a_wide_image_keeps_its_shape(tmp_path):
    picture(tmp_path / "a.png", 1, size=(40, 400))
    album = Album(10**6, 64)
    content = base64.b64decode(album.file(tmp_path / "a.png").split(",")[1])
    assert Image.open(io.BytesIO(content)).size == (64, 6)
