"""`package --push`: what arrives at a hub in a thread, and what is refused before anything is sent."""
import base64
import hashlib
import json

import huggingface_hub.constants
import pytest

import submit.package
import submit.push
from submit.package import MANIFEST, Choice, Package
from submit.push import check_finished, push
from tests.fake_hub import COMMIT, FakeHub
from tests.test_score_command import run

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's library
FILES = {"main.py": b"def backdoor_model_detector(): ...\n", "requirements.txt": b"torch==2.4.0\n",
         "weights/net.pth": bytes(range(256)) * 8}

CHOICE = Choice()


@pytest.fixture
def hub(monkeypatch):
    found = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", found.address)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    found.large.add("weights/net.pth")
    yield found
    found.close()


def write_package(folder, files=FILES):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    (folder / MANIFEST).write_text(json.dumps({"task": "backdoor", "chosen": CHOICE.named(), "sha256": sums}))
    return folder


def operations(hub, kind):
    (lines,) = hub.commits.values()
    return [line["value"] for line in lines if line["key"] == kind]


def test_every_file_arrives_in_one_commit_of_a_private_repository(hub, tmp_path):
    made = push(write_package(tmp_path / "mine"), "org/name")
    assert (made.url, made.commit, made.files) == (f"{hub.address}/org/name", COMMIT, 4)
    (created,) = hub.created
    assert (created["name"], created["organization"]) == ("name", "org")
    assert created.get("private") is True or created.get("visibility") == "private"
    sent = {file["path"]: base64.b64decode(file["content"]) for file in operations(hub, "file")}
    manifest = sent.pop(MANIFEST)
    assert json.loads(manifest)["task"] == "backdoor"
    assert sent == {name: FILES[name] for name in ("main.py", "requirements.txt")}
    (large,) = operations(hub, "lfsFile")
    assert large["path"] == "weights/net.pth" and hub.stored == {large["oid"]: FILES["weights/net.pth"]}
    assert all(headers.get("Authorization", headers.get("authorization")) == "Bearer hf_of_a_test"
               for _, path, headers in hub.requests if path.startswith("/api/"))


def test_what_was_there_before_and_is_not_in_the_package_goes(hub, tmp_path):
    hub.there = ["old.py", "main.py", ".gitattributes", MANIFEST]
    push(write_package(tmp_path / "mine"), "org/name")
    assert [file["path"] for file in operations(hub, "deletedFile")] == ["old.py"]


def test_a_repository_with_something_else_in_it_is_left_alone(hub, tmp_path, refuses):
    hub.there = ["thesis.tex", ".gitattributes"]
    with refuses("--push org/name: expected an empty repository, or one with a package in it, found other files: the"):
        push(write_package(tmp_path / "mine"), "org/name")
    assert not hub.commits


def test_nothing_is_sent_to_a_repository_that_everybody_can_read(hub, tmp_path, refuses):
    hub.private = False
    with refuses("--push org/name: expected a private repository, found one that everybody can read"):
        push(write_package(tmp_path / "mine"), "org/name")
    assert not hub.commits and not hub.stored


def test_a_refusal_is_one_line_with_what_to_do(hub, tmp_path, refuses):
    hub.refuse = (403, "this token may only read")
    with refuses("--push org/name: expected an answer of http.*403.*; run the same command again: the finished folder "
                 "is taken as it is; its token has to be one that may write to org"):
        push(write_package(tmp_path / "mine"), "org/name")


def test_without_a_token_or_a_network_nothing_is_asked(hub, tmp_path, refuses, monkeypatch):
    monkeypatch.setattr(submit.push, "get_token", lambda: None)
    with refuses("--push org/name: expected a token of the hub, found none; run `hf auth login`"):
        push(tmp_path, "org/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with refuses("--push org/name: expected to ask .*, found HF_HUB_OFFLINE set"):
        push(tmp_path, "org/name")
    assert hub.requests == []


def test_the_option_packs_then_pushes_and_takes_a_finished_folder_as_it_is(capsys, hub, tmp_path, monkeypatch):
    built = []

    def build(task, out, choice):
        write_package(out)
        built.append(task)
        return Package(task, out, out.with_suffix(".zip"), tuple(FILES), 1, 1)

    monkeypatch.setattr(submit.package, "build_package", build)
    out = tmp_path / "mine"
    for _ in range(2):
        status, _, err = run(capsys, "package", "backdoor", "--out", out, "--push", "org/name")
        assert status == 0 and f"pushed: {hub.address}/org/name, private, 4 files, commit {COMMIT}" in err
    assert built == ["backdoor"]
    (out / "main.py").write_text("other")
    status, _, err = run(capsys, "package", "backdoor", "--out", out, "--push", "org/name")
    assert status == 2 and "main.py: expected the file as it was packed, found another content" in err
    status, _, err = run(capsys, "package", "backdoor", "--out", tmp_path / "new", "--push", "just-a-name")
    assert status == 2 and "--push: expected ORG/NAME, found just-a-name" in err and not (tmp_path / "new").exists()


def test_only_a_whole_package_of_the_task_counts_as_finished(tmp_path, refuses):
    (tmp_path / "empty").mkdir()
    with refuses("empty: expected a path where nothing lies yet, or a finished package to push, found another folder"):
        check_finished(tmp_path / "empty", "backdoor", CHOICE)
    folder = write_package(tmp_path / "mine")
    check_finished(folder, "backdoor", CHOICE)
    with refuses("MANIFEST.json: expected a package for anomaly, found backdoor"):
        check_finished(folder, "anomaly", CHOICE)
    with refuses("MANIFEST.json: expected a package made with .*'half': False.*, found .*'half': True"):
        check_finished(folder, "backdoor", Choice(half=False))
    (folder / "extra.txt").write_text("")
    with refuses("mine: expected the files of its MANIFEST.json, found more or fewer: extra.txt"):
        check_finished(folder, "backdoor", CHOICE)
    (folder / MANIFEST).write_text("[]")
    with refuses("MANIFEST.json: expected the list of a package, found TypeError"):
        check_finished(folder, "backdoor", CHOICE)
