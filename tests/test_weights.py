"""`weights list | fetch | freeze | verify` against a hub in a thread: resumed, checked, frozen, loaded."""
import hashlib
import io
import json
import re

import huggingface_hub.constants
import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save
from transformers import DistilBertConfig, DistilBertModel

from anomaly.backbone import BackboneConfig, random_backbone
from anomaly.presets import PRESETS, Preset
from retrieval.encoder import EMBEDDED, load_encoder
from submit import weights_freezing
from submit.weights_fetching import fetch, fetched
from submit.weights_freezing import freeze, load_frozen, verify
from submit.weights_registry import Weight, chosen, preprocessing_name, read_registry
from tests.fake_hub import COMMIT, FakeHub
from tests.test_score_command import run

REPO = "someone/net"
CONTENT = bytes(range(256)) * 40
PLAIN = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
TINY = BackboneConfig("vit_tiny_patch16_224", (0, 1), (32, 32), (0.5,) * 3, (0.25,) * 3,
                      arguments={"embed_dim": 8, "depth": 2, "num_heads": 2})
NET = Weight("vit_tiny_patch16_224", "a test", "timm", "vit_tiny_patch16_224", "MIT", REPO, "main",
             ("model.safetensors",), 1, PLAIN)


@pytest.fixture
def hub(monkeypatch):
    found = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", found.address)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    found.files[REPO, "model.safetensors"] = CONTENT
    found.large.add("model.safetensors")
    yield found
    found.close()


@pytest.fixture
def tiny_net(hub, monkeypatch):
    """The tiny backbone on the hub, and a preset that uses it; its weights."""
    monkeypatch.setitem(PRESETS, "tiny", Preset("tiny", TINY, TINY, PRESETS["musc"].scoring))
    state = random_backbone(TINY, seed=3).net.state_dict()
    hub.files[REPO, "model.safetensors"] = save(state)
    return state


def silent(_line):
    pass


def gets(hub):
    return [headers.get("Range", "whole") for method, _, headers in hub.requests if method == "GET"]


def test_fetching_keeps_files_commit_and_checksums(hub, tmp_path):
    lines = []
    record = fetch(NET, tmp_path, say=lines.append)
    folder = tmp_path / NET.name
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert record == fetched(NET, tmp_path) == {
        "repo": REPO, "revision": "main", "commit": COMMIT,
        "files": {"model.safetensors": {"bytes": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}}}
    assert sorted(path.name for path in folder.iterdir()) == ["fetched.json", "model.safetensors"]
    asked = len(hub.requests)
    assert fetch(NET, tmp_path, say=lines.append) == record and len(hub.requests) == asked
    assert lines == [f"{REPO}/model.safetensors@main: 0.0 MB", f"{NET.name}: fetched already, commit {COMMIT}"]


def test_a_stopped_download_goes_on_where_it_was(hub, tmp_path):
    part = tmp_path / NET.name / f"model.safetensors.part-{hub.tag('model.safetensors', CONTENT)[:16]}"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:3000])
    fetch(NET, tmp_path, say=silent)
    assert gets(hub) == ["bytes=3000-"]
    assert (tmp_path / NET.name / "model.safetensors").read_bytes() == CONTENT and not part.exists()


def test_a_broken_connection_is_gone_on_with_at_once(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)  # what is kept is whole chunks
    hub.cut["model.safetensors"] = 1000
    fetch(NET, tmp_path, say=silent)
    assert gets(hub) == ["whole", "bytes=1000-"]
    assert (tmp_path / NET.name / "model.safetensors").read_bytes() == CONTENT


def test_all_files_are_of_one_commit(hub, tmp_path):
    both = Weight("two", "a test", "transformers", "two", "MIT", REPO, "main", ("a.json", "b.txt"), 1, PLAIN)
    hub.files |= {(REPO, "a.json"): b"{}", (REPO, "b.txt"): b"text"}
    assert fetch(both, tmp_path, say=silent)["commit"] == COMMIT
    assert [path.split("/resolve/")[1] for method, path, _ in hub.requests if method == "GET"] == [
        "main/a.json", f"{COMMIT}/b.txt"]


def test_a_wrong_checksum_is_refused_and_not_kept(hub, tmp_path, refuses):
    hub.wrong_sum.add("model.safetensors")
    with refuses(r"someone/net/model.safetensors@main: expected the checksum f{64}, found another; run the same"):
        fetch(NET, tmp_path, say=silent)
    assert list((tmp_path / NET.name).iterdir()) == [] and fetched(NET, tmp_path) is None


@pytest.mark.parametrize(("refusal", "message"), [
    ((404, "no such repository"), "expected an answer of http://127.0.0.1:.*, found .*404"),
    ((403, "not for you"), "expected an answer of http://127.0.0.1:.*, found .*403"),
])
def test_a_refusal_of_the_hub_is_one_line(hub, tmp_path, refuses, refusal, message):
    hub.refuse = refusal
    with refuses(f"someone/net/model.safetensors@main: {message}.*; run the same command again") as caught:
        fetch(NET, tmp_path, say=silent)
    assert "\n" not in str(caught.value)


def test_offline_nothing_is_asked(hub, tmp_path, monkeypatch, refuses):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with refuses(f"expected to ask {hub.address}, found HF_HUB_OFFLINE set; run the same command again where there"):
        fetch(NET, tmp_path, say=silent)
    assert hub.requests == []


def test_no_hub_at_the_address(tmp_path, hub, refuses):
    hub.close()
    with refuses(f"expected an answer of {hub.address}, found") as found:
        fetch(NET, tmp_path, say=silent)
    assert str(found.value).count("[Errno ") == 1  # bug: the reason stood there twice


def test_what_was_fetched_from_elsewhere_does_not_count(hub, tmp_path):
    fetch(NET, tmp_path, say=silent)
    assert fetched(Weight(**{**vars(NET), "revision": "other"}), tmp_path) is None
    (tmp_path / NET.name / "model.safetensors").write_bytes(b"short")
    assert fetched(NET, tmp_path) is None
    fetch(NET, tmp_path, say=silent)
    assert (tmp_path / NET.name / "model.safetensors").read_bytes() == CONTENT


def test_freezing_without_fetching_says_what_to_run_where(tmp_path, refuses):
    with refuses(r"vit_tiny_patch16_224: expected the files model.safetensors, found not all of them; where there is a "
                 r"network run `python -m submit weights fetch vit_tiny_patch16_224` and .*freeze.*--out DIR`, then"):
        freeze([NET], tmp_path, tmp_path / "frozen")
    assert not (tmp_path / "frozen").exists()


def test_a_frozen_backbone_is_loaded_without_the_hub(hub, tiny_net, tmp_path, monkeypatch):
    fetch(NET, tmp_path / "cache", say=silent)
    hub.close()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    record = freeze([NET], tmp_path / "cache", tmp_path / "frozen")
    entry = record["weights"][NET.name]
    assert entry["commit"] == COMMIT and entry["fingerprint"] == preprocessing_name(PLAIN)
    assert list(entry["files"]) == ["vit_tiny_patch16_224/model.safetensors"]
    loaded = load_frozen(NET, tmp_path / "frozen").net.state_dict()
    for name, tensor in tiny_net.items():
        torch.testing.assert_close(loaded[name], tensor)
    assert verify(tmp_path / "frozen", {NET.name: NET}, load=True) == {NET.name: []}


@pytest.mark.parametrize(("harm", "message"), [
    (lambda f: (f / "model.safetensors").write_bytes(b"x" * 10), "expected .* bytes, found 10"),
    (lambda f: flip(f / "model.safetensors"), "expected SHA-256 .{64}, found .{64}"),
    (lambda f: (f / "model.safetensors").unlink(), "expected a file of .* bytes, found none"),
    (lambda f: (f / "more.txt").write_text(""), "more.txt: expected only files of the record, found one more"),
])
def test_verifying_finds_every_harm(hub, tiny_net, tmp_path, harm, message):
    fetch(NET, tmp_path / "cache", say=silent)
    freeze([NET], tmp_path / "cache", tmp_path / "frozen")
    harm(tmp_path / "frozen" / NET.folder)
    (fault,) = verify(tmp_path / "frozen", {NET.name: NET}, load=False)[NET.name]
    assert re.search(message, fault)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_another_preprocessing_is_refused_and_found(hub, tiny_net, tmp_path, refuses):
    fetch(NET, tmp_path / "cache", say=silent)
    other = Weight(**{**vars(NET), "preprocessing": PLAIN | {"interpolation": "bicubic"}})
    with refuses('preprocessing of vit_tiny_patch16_224: expected .*"bicubic".*, found .*"bilinear"'):
        freeze([other], tmp_path / "cache", tmp_path / "frozen")
    freeze([NET], tmp_path / "cache", tmp_path / "frozen")
    (fault,) = verify(tmp_path / "frozen", {NET.name: other}, load=False)[NET.name]
    assert f"expected {preprocessing_name(other.preprocessing)}, found {preprocessing_name(PLAIN)}" in fault
    (fault,) = verify(tmp_path / "frozen", {}, load=False)[NET.name]
    assert "expected weights of the registry, found none of that name" in fault


def test_loading_finds_weights_of_another_net(hub, tiny_net, tmp_path):
    hub.files[REPO, "model.safetensors"] = save({"other": torch.zeros(2)})
    fetch(NET, tmp_path / "cache", say=silent)
    freeze([NET], tmp_path / "cache", tmp_path / "frozen")
    assert verify(tmp_path / "frozen", {NET.name: NET}, load=False)[NET.name] == []
    (fault,) = verify(tmp_path / "frozen", {NET.name: NET}, load=True)[NET.name]
    assert "expected exactly the tensors of the architecture" in fault


def test_a_frozen_encoder_gives_the_embeddings_of_its_source(hub, tmp_path, monkeypatch):
    config = json.loads((EMBEDDED / "config.json").read_text())
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config["model_cfg"])
    buffer = io.BytesIO()
    torch.save({"state_dict": {f"module.{k}": v for k, v in load_file(EMBEDDED / "model.safetensors").items()}}, buffer)
    hub.files[REPO, "net.bin"] = buffer.getvalue()
    weight = Weight("small", "a test", "open_clip", "encoder", "MIT", REPO, "main", ("net.bin",), 1,
                    config["preprocess_cfg"])
    fetch(weight, tmp_path / "cache", say=silent)
    freeze([weight], tmp_path / "cache", tmp_path / "frozen")
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(load_frozen(weight, tmp_path / "frozen").encode_images(images),
                               load_encoder(device="cpu").encode_images(images))
    assert sorted(p.name for p in (tmp_path / "frozen" / "encoder").iterdir()) == [
        "open_clip_config.json", "open_clip_model.safetensors"]


def test_a_pickle_that_calls_is_not_frozen(hub, tmp_path, refuses, monkeypatch):
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: {})
    buffer = io.BytesIO()
    torch.save({"weight": Caller()}, buffer)
    hub.files[REPO, "net.bin"] = buffer.getvalue()
    weight = Weight("small", "a test", "open_clip", "encoder", "MIT", REPO, "main", ("net.bin",), 1, PLAIN)
    fetch(weight, tmp_path / "cache", say=silent)
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: {"embed_dim": 1})
    with refuses("net.bin: expected only tensors and torchvision transforms, found builtins.print"):
        freeze([weight], tmp_path / "cache", tmp_path / "frozen")


class Caller:
    def __reduce__(self):
        return print, ("called",)


def test_a_frozen_text_encoder_is_read_by_the_kit(hub, tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    config = DistilBertConfig(vocab_size=7, dim=8, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=8)
    state = DistilBertModel(config).state_dict()
    hub.files |= {(REPO, "config.json"): json.dumps(config.to_dict()).encode(),
                  (REPO, "vocab.txt"): "".join(f"{piece}\n" for piece in pieces).encode(),
                  (REPO, "model.safetensors"): save({f"distilbert.{k}": v for k, v in state.items()})}
    weight = Weight("text", "a test", "transformers", "text", "MIT", REPO, "main",
                    ("config.json", "vocab.txt", "model.safetensors"), 1, {"lower_case": True, "pieces": 7})
    fetch(weight, tmp_path / "cache", say=silent)
    freeze([weight], tmp_path / "cache", tmp_path / "frozen")
    assert load_frozen(weight, tmp_path / "frozen").pieces == tuple(pieces)


@pytest.mark.parametrize(("content", "message"), [
    (None, "frozen.json: expected the record of `weights freeze`, found no such file"),
    ("[]", "frozen.json: expected the record of `weights freeze`, found TypeError"),
    ('{"weights": {"a": {"files": {"../b": {}}, "folder": "a"}}}', "expected paths inside the folder, found ../b"),
    ('{"weights": {}}', "frozen.json: expected weights, found none"),
    ('{"weights": {"a": {"files": {}, "folder": "a", "fingerprint": "f"}}}', "frozen.json a: expected its files with"),
    ('{"weights": {"a": {"files": {"a/b": 5}, "folder": "a"}}}', "expected the record of `weights freeze`, found T"),
])
def test_broken_records_are_refused(tmp_path, refuses, content, message):
    if content:
        (tmp_path / "frozen.json").write_text(content)
    with refuses(re.escape(message)):
        verify(tmp_path, {}, load=False)


def test_the_registry_is_what_the_libraries_and_the_kit_say():
    registry = read_registry()
    vitamin = registry["ViTamin-L-384"]
    stated = open_clip.get_pretrained_cfg("ViTamin-L-384", "datacomp1b")
    assert stated["hf_hub"] == f"{vitamin.repo}/{vitamin.files[0]}"
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in stated.items()
            if key in vitamin.preprocessing} == {k: v for k, v in vitamin.preprocessing.items() if k != "size"}
    assert vitamin.preprocessing["size"] == open_clip.get_model_config("ViTamin-L-384")["vision_cfg"]["image_size"]
    for weight in registry.values():
        if weight.layout == "timm":
            tag = weight.repo.removeprefix("timm/")
            config = timm.get_pretrained_cfg(tag)
            assert config.hf_hub_id == weight.repo and config.license == weight.licence.lower()
            assert list(config.mean) == weight.preprocessing["mean"] and tag.startswith(weight.folder)
            assert all(found == weight.preprocessing for found in weights_freezing._of_timm(weight, None))
        assert weight.embedded == (not weight.repo)
    nets = {c.architecture for p in PRESETS.values() for c in (p.for_maps, p.for_images) if c is not None}
    assert nets == {weight.folder for weight in registry.values() if weight.layout == "timm"}


@pytest.mark.parametrize(("text", "message"), [
    ("[a", "expected TOML, found"),
    ("a = 1", r"\[a\]: expected a table, found int"),
    ("[a]\nuse='x'\nlayout='timm'\nfolder='f'\nlicence='l'\nrepo='r/r'\nrevision='m'\nfiles=[]\nbytes=1",
     "expected the keys use, layout, folder, licence, repo, .*, found no preprocessing"),
    ("[a]\nuse='x'\nlayout='embedded'\nfolder='f'\nlicence='l'\nname='n'", "expected keys among .*, found name"),
    ("[a]\nuse='x'\nlayout='embedded'\nfolder='../f'\nlicence='l'", r"expected paths inside a folder, found \.\./f"),
    ("[a]\nuse='x'\nlayout='zip'\nfolder='f'\nlicence='l'\nrepo='r'\nrevision='m'\nfiles=[]\nbytes=1\npreprocessing={}",
     "layout: expected one of open_clip, timm, transformers, embedded, found zip"),
])
def test_a_broken_registry_is_refused(tmp_path, refuses, text, message):
    (tmp_path / "weights.toml").write_text(text)
    with refuses(message):
        read_registry(tmp_path / "weights.toml")


def test_choosing_by_name(refuses):
    registry = read_registry()
    assert [weight.name for weight in chosen(["all"], registry)] == [n for n, w in registry.items() if not w.embedded]
    assert [weight.name for weight in chosen(["parser", "parser"], registry)] == ["parser"]
    with refuses("NAME: expected all or some of ViTamin-L-384, .*, backbone, found dino"):
        chosen(["dino"], registry)


def test_the_commands(capsys, hub, tmp_path):
    cache = tmp_path / "cache"
    hub.files["timm/vit_base_patch8_224.dino", "model.safetensors"] = save({"weight": torch.zeros(2)})
    status, out, _ = run(capsys, "weights", "fetch", "vit_base_patch8_224", "--cache", cache)
    assert status == 0 and out == (f"vit_base_patch8_224: {cache}/vit_base_patch8_224, timm/vit_base_patch8_224.dino "
                                   f"commit {COMMIT}\n")
    status, out, _ = run(capsys, "weights", "list", "--cache", cache, "--json")
    states = {row["name"]: row["state"] for row in json.loads(out)["weights"]}
    assert states["vit_base_patch8_224"] == f"fetched, {COMMIT[:12]}" and states["parser"] == "embedded"
    assert states["ViTamin-L-384"] == "not fetched"
    status, out, _ = run(capsys, "weights", "list", "--cache", cache)
    assert status == 0 and "vit_large_patch14_clip_336" in out and "Apache-2.0" in out
    frozen = tmp_path / "frozen"
    assert run(capsys, "weights", "freeze", "--out", frozen, "--cache", cache)[0] == 0
    assert run(capsys, "weights", "freeze", "--out", frozen, "--cache", cache)[0] == 2  # nothing is overwritten
    status, out, _ = run(capsys, "weights", "verify", frozen)
    assert (status, out) == (0, "ok      vit_base_patch8_224: files, checksums and preprocessing\n")
    flip(frozen / "vit_base_patch8_224" / "model.safetensors")
    status, out, _ = run(capsys, "weights", "verify", frozen)
    assert status == 1 and out.startswith("broken  vit_base_patch8_224: ")
    status, _, err = run(capsys, "weights", "fetch", "parser")
    assert status == 2 and "found parser, which lies in retrieval/weights/parser" in err
    status, _, err = run(capsys, "weights", "freeze", "--out", tmp_path / "x", "--cache", tmp_path / "none")
    assert status == 2 and "expected fetched weights, found none; where there is a network" in err


def test_a_preset_without_its_weights_says_what_to_run_where(capsys, tmp_path):
    status, _, err = run(capsys, "score", "anomaly", "--preset", "report", "--weights", tmp_path)
    assert status == 2 and "expected the weights that preset report needs, found no such file" in err
    assert "`python -m submit weights fetch vit_large_patch14_dinov2 vit_large_patch14_clip_336`" in err
    status, _, err = run(capsys, "package", "anomaly", "--preset", "musc", "--weights", tmp_path, "--out",
                         tmp_path / "mine")
    assert status == 2 and "`python -m submit weights fetch vit_large_patch14_clip_336`" in err
