"""What strangers may hand in to do harm, built here and given to the commands: each is refused or held, and named.

Packages that fork, hang, fill the disk or call home, a run.sh among them, are run in `test_judge_run.py`.
"""
import io
import json
import os
import re
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from submit.dev_splits import TINY_ZOO
from tests.test_score_command import picture, run

GOOD_MODEL = next(p for p in sorted(Path(TINY_ZOO).iterdir()) if p.is_dir())
MARK = "mark-of-a-call"  # of a file that only a called payload creates


class Payload:
    """Leaves a mark when it is unpickled by a reader that runs what it reads."""

    def __init__(self, folder):
        self.mark = folder / MARK

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def zoo(folder, **files):
    """A zoo of one model, some of its files replaced."""
    shutil.copytree(GOOD_MODEL, folder / "zoo" / "stranger")
    for name, content in files.items():
        (folder / "zoo" / "stranger" / f"{name}.pt").write_bytes(content)
    return folder / "zoo"


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def compressed(content):
    """The same archive, its entries packed: a few bytes may then unpack to gigabytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    return buffer.getvalue()


def scenes(folder, query="a.png", target="b.png", text="add a cup"):
    for i, name in enumerate("ab"):
        picture(folder / "scenes" / "images" / f"{name}.png", i)
    rows = ["query_image,query_text,target_image", "a.png,add a pan,b.png", f'{query},"{text}",{target}']
    (folder / "scenes" / "queries.csv").write_text("\n".join(rows) + "\n")
    return folder / "scenes"


def bomb(path):
    """A PNG of a few kilobytes that says it has 40,000 x 40,000 pixels."""
    Image.new("1", (64, 64)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 40_000, 40_000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    path.write_bytes(bytes(content))


def embeddings(folder, queries):
    """Predictions for `scenes`, the query side as given."""
    (folder / "predictions").mkdir()
    (folder / "predictions" / "query_embeddings.npy").write_bytes(queries)
    np.save(folder / "predictions" / "database_embeddings.npy", np.ones((1, 2), np.float32))
    return folder / "predictions"


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def huge_npy():
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 2), }"
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)


def verdict(folder, content):
    (folder / "verdicts").mkdir()
    (folder / "verdicts" / "stranger.json").write_text(content)
    return folder / "verdicts"


def archive(path, *entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries:
            packed.writestr(name, content)
    return path


def nested(folder):
    """A submission that holds zeros packed twice more: what lies within is not unpacked."""
    inner = archive(folder / "inner.zip", ("zeros", bytes(10**7)))
    middle = archive(folder / "middle.zip", ("inner.zip", inner.read_bytes()))
    return archive(folder / "p.zip", ("main.py", b""), ("inner.zip", middle.read_bytes()))


def linked(folder):
    """A submission with a link to a file of the judge's."""
    (folder / "mine").mkdir()
    (folder / "mine" / "main.py").write_text("def backdoor_model_detector(model, num_classes, "
                                             "test_images_folder_address, transformation):\n    return 1\n")
    (folder / "mine" / "requirements.txt").write_text("torch==2.4.0\n")
    (folder / "mine" / "secrets.txt").symlink_to("/etc/passwd")
    return folder / "mine"


def score(task, *arguments):
    return ["score", task, "--device", "cpu", *arguments]


INPUTS = {
    "a call in a state dict": lambda f: (
        score("backdoor", "--data", zoo(f, model=saved({"conv1.weight": Payload(f)}))),
        r"model\.pt: expected only tensors and torchvision transforms, found posix\.system"),
    "a call in metadata": lambda f: (
        score("backdoor", "--data", zoo(f, metadata=saved({"num_classes": Payload(f)}))),
        r"metadata\.pt: expected only tensors and torchvision transforms, found posix\.system"),
    "a call in a bare pickle": lambda f: (
        score("backdoor", "--data", zoo(f, model=b"cposix\nsystem\n(S'touch " + bytes(f / MARK) + b"'\ntR.")),
        r"model\.pt: expected only tensors and torchvision transforms, found posix\.system"),
    "a packed archive of weights": lambda f: (
        score("backdoor", "--data", zoo(f, model=compressed(saved({"conv1.weight": torch.zeros(10**6)})))),
        r"model\.pt: expected an uncompressed archive"),
    "a shape far larger than its numbers": lambda f: (
        score("backdoor", "--data", zoo(f, model=saved({"conv1.weight": torch.zeros(1).expand(10**6, 10**6)}))),
        r"model\.pt 'conv1\.weight': expected at most the 4 bytes stored, found shape \(1000000, 1000000\)"),
    "a path out of the image folder": lambda f: (
        score("retrieval", "--data", scenes(f, query="../../../../../../etc/passwd"), "--predictions",
              embeddings(f, npy(np.ones((1, 2), np.float32)))),
        r"row 3 'query_image' .*: expected a name inside .*, found a path that leads out of it"),
    "an image of gigabytes": lambda f: (
        (bomb((root := scenes(f, query="c.png")) / "images" / "c.png"), score(
            "retrieval", "--data", root, "--predictions", embeddings(f, npy(np.ones((1, 2), np.float32)))))[1],
        r"row 3 'query_image' 'c\.png': expected a readable image, found Image size \(1600000000 pixels\)"),
    "an array of objects": lambda f: (
        score("retrieval", "--data", scenes(f), "--predictions", embeddings(f, npy(np.array([Payload(f)], object)))),
        r"query_embeddings\.npy: expected a NumPy array of numbers, found"),
    "an array that declares terabytes": lambda f: (
        score("retrieval", "--data", scenes(f), "--predictions", embeddings(f, huge_npy())),
        r"query_embeddings\.npy: expected a NumPy array of numbers, found mmap length is greater"),
    "a verdict nested without end": lambda f: (
        score("backdoor", "--data", zoo(f), "--predictions", verdict(f, "[" * 10**5 + "]" * 10**5)),
        r"stranger\.json: expected JSON, found"),
    "a verdict that is no number of ours": lambda f: (
        score("backdoor", "--data", zoo(f), "--predictions", verdict(f, '{"backdoored": 1, "p_value": 1e999}')),
        r"stranger\.json 'p_value': expected a finite number, found inf"),
    "a zip with a path out of it": lambda f: (
        ["check", archive(f / "p.zip", ("main.py", b""), (f"../{MARK}", b""))],
        r"p\.zip '\.\./mark-of-a-call': expected a path inside the package"),
    "a zip that unpacks to far more than it has": lambda f: (
        ["check", archive(f / "p.zip", ("main.py", b""), ("zeros", bytes(2 * 10**7)))],
        r"broken size zeros: 20000000 bytes in all"),
    "a zip in a zip in a zip": lambda f: (["check", nested(f)], r"broken unneeded inner\.zip:"),
    "a link out of a submission": lambda f: (["check", linked(f)], r"broken links secrets\.txt: a link"),
    "a record with a number for its results": lambda f: (
        ((f / "a-score-b").mkdir(), (f / "a-score-b" / "record.json").write_text('{"results": 5}'),
         ["report", f / "a-score-b"])[2], r"record\.json: expected"),
    "a record that is no record": lambda f: (
        ((f / "run").mkdir(), (f / "run" / "record.json").write_text("[" * 10**5), ["report", f / "run"])[2],
        r"record\.json: expected"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_each_is_refused_and_named(capsys, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, message = INPUTS[name](tmp_path)
    before = {p for p in tmp_path.rglob("*") if p.name != "runs"}
    runs = ["--runs", tmp_path / "runs"] if command[0] in ("score", "report") else []
    status, out, err = run(capsys, *command, *runs)
    assert status in (1, 2)
    assert re.search(message, " ".join((out + err).split())), out + err
    assert not (tmp_path / MARK).exists() and not (tmp_path.parent / MARK).exists()
    left = {p for p in tmp_path.rglob("*") if "runs" not in p.parts} - before
    assert not left, "something was written"


def test_there_are_enough():
    assert len(INPUTS) >= 12


def test_the_payload_works_on_a_careless_reader(tmp_path):
    torch.load(io.BytesIO(saved(Payload(tmp_path))), weights_only=False)
    assert (tmp_path / MARK).exists()


def test_names_and_texts_of_strangers_do_not_act_on_a_terminal_or_a_page(capsys, tmp_path):
    name = "<img src=x onerror=alert(2)>.png"
    root = scenes(tmp_path, target=name, text="<script>alert(1)</script> [red]add[/red] a cup")
    shutil.copy(root / "images" / "b.png", root / "images" / name)
    predictions = embeddings(tmp_path, npy(np.ones((2, 2), np.float32)))
    np.save(predictions / "database_embeddings.npy", np.ones((2, 2), np.float32))
    status, out, _ = run(capsys, *score("retrieval", "--data", root, "--predictions", predictions, "--json"), "--runs",
                         tmp_path / "runs")
    assert status == 0 and "<script>alert(1)</script> [red]add[/red]" in json.dumps(json.loads(out))
    (record,) = (tmp_path / "runs").glob("*/record.json")
    status, _, _ = run(capsys, "report", record.parent, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert status == 0 and "<script" not in page.lower() and "&lt;script&gt;" in page
    assert "<img src=x" not in page and "&lt;img src=x onerror=alert(2)&gt;" in page
