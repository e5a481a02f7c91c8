"""The dual encoder: one path for the small and the full model, raw embeddings, refused files."""
import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image
from safetensors.torch import save_file

from retrieval.encoder import EMBEDDED, Encoder, build_model, in_order, load_encoder, load_strictly
from retrieval.vocabulary import Vocabulary

PREPROCESS = {"size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "resize_mode": "longest"}
TINY = {"embed_dim": 12, "custom_text": True,
        "vision_cfg": {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An encoder folder with random weights, as `load_encoder` expects it."""
    folder = tmp_path_factory.mktemp("encoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(TINY)
    (folder / "config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": PREPROCESS}))
    save_file({name: w.contiguous() for name, w in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return load_encoder(folder, device="cpu")


def pictures(n, height=32, width=32):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(n)]


def uint8(images):
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2)


def test_images_one_by_one_in_blocks_and_as_a_tensor_agree(encoder):
    images = pictures(70)  # more than one block
    found = encoder.encode_images(images)
    assert found.shape == (70, 12) and found.dtype == torch.float32
    for i in (0, 63, 64, 69):
        torch.testing.assert_close(found[i:i + 1], encoder.encode_images([images[i]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode_images(uint8(images)), found, atol=1e-5, rtol=0)


def test_images_agree_with_the_model_on_inputs_normalised_by_hand(encoder):
    image = pictures(1)[0]
    mean, std = np.array(PREPROCESS["mean"]), np.array(PREPROCESS["std"])
    pixels = (np.asarray(image) / 255 - mean) / std
    raw = encoder.model.visual(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None])
    torch.testing.assert_close(encoder.encode_images([image]), raw, atol=1e-5, rtol=1e-5)


def test_texts_agree_with_open_clips_own_tokens_and_are_raw(encoder):
    texts = ["a photo of a red star.", "a photo of a Zürich cheese-fondue set (x2)."]
    tokens = open_clip.SimpleTokenizer(context_length=16)(texts)
    found = encoder.encode_texts(texts)
    torch.testing.assert_close(found, encoder.model.text(tokens))
    assert not torch.allclose(found.norm(dim=-1), torch.ones(2))
    many = encoder.encode_texts(texts * 200)
    torch.testing.assert_close(many, found.repeat(200, 1), atol=1e-5, rtol=0)


def test_nothing_gives_nothing_of_the_right_width(encoder):
    assert encoder.encode_images([]).shape == encoder.encode_texts([]).shape == (0, 12)


def test_a_wide_image_is_padded_not_cut(encoder):
    wide = Image.new("RGB", (64, 32), (10, 200, 30))
    marked = wide.copy()
    marked.paste((250, 0, 0), (0, 0, 6, 32))  # at the edge: a centre crop would lose it
    assert not torch.allclose(encoder.encode_images([wide]), encoder.encode_images([marked]))


def test_opened_turns_items_into_images(encoder):
    images = dict(enumerate(pictures(3)))
    found = encoder.encode_images(images, opened=images.__getitem__)
    torch.testing.assert_close(found, encoder.encode_images(list(images.values())))


def test_in_order_keeps_the_order_and_never_runs_far_ahead():
    started = []
    results = in_order(lambda i: started.append(i) or i * i, iter(range(1000)), ahead=5)
    assert [next(results) for _ in range(10)] == [i * i for i in range(10)]
    assert len(started) <= 15
    assert list(results) == [i * i for i in range(10, 1000)]


@pytest.mark.parametrize("batch", [torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(2, 3, 32, 32)])
def test_a_batch_of_another_size_or_type_is_refused(encoder, batch, refuses):
    with refuses(r"images: expected \(N, 3, 32, 32\) torch.uint8, found \(2, 3, "):
        encoder.encode_images(batch)


def test_loading_leaves_the_global_generator_alone(folder):
    before = torch.get_rng_state()
    load_encoder(folder, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_hubs_own_file_names_are_read_too(folder, encoder, tmp_path):
    for ours, hub in (("config.json", "open_clip_config.json"), ("model.safetensors", "open_clip_model.safetensors")):
        (tmp_path / hub).write_bytes((folder / ours).read_bytes())
    found = load_encoder(tmp_path, device="cpu").encode_texts(["a cat"])
    assert torch.equal(found, encoder.encode_texts(["a cat"]))


def test_missing_files_and_misfitting_weights_are_named(folder, tmp_path, refuses):
    with refuses("expected a file config.json or open_clip_config.json, found neither"):
        load_encoder(tmp_path, device="cpu")
    model = build_model(TINY)
    state = model.state_dict()
    with refuses("w: expected a weight logit_scale, found none of that name"):
        load_strictly(model, {k: v for k, v in state.items() if k != "logit_scale"}, "w")
    with refuses("w: expected only weights of the model, found stranger"):
        load_strictly(model, state | {"stranger": torch.zeros(1)}, "w")
    with refuses(r"w logit_scale: expected \(\), found \(2,\)"):
        load_strictly(model, state | {"logit_scale": torch.zeros(2)}, "w")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("config.json", "{", r"config.json: expected JSON, found"),
    ("config.json", "[]", r"config.json: expected a table model_cfg, found none"),
    ("config.json", '{"model_cfg": {"embed_dim": 3}, "preprocess_cfg": {}}',
     r"config.json: expected settings of an open_clip model, found TypeError"),
    ("model.safetensors", "zz", r"model.safetensors: expected a whole safetensors file, found"),
    ("vocabulary.json", "{", r"vocabulary.json: expected JSON, found")])
def test_spoiled_files_are_named(folder, tmp_path, refuses, name, content, message):
    shutil.copytree(folder, tmp_path / "mine")
    (tmp_path / "mine" / name).write_text(content)
    with refuses(message):
        load_encoder(tmp_path / "mine", device="cpu")


def test_the_full_model_is_the_one_open_clip_builds():
    """ViTamin-L-384 by the same function, shapes only: names, shapes and the published number of weights."""
    with torch.device("meta"):
        ours = build_model(open_clip.get_model_config("ViTamin-L-384"))
    assert isinstance(ours, open_clip.CustomTextCLIP)
    assert sum(p.numel() for p in ours.parameters()) == 457_357_473
    assert ours.visual.head.proj.weight.shape == (768, 1024) and ours.visual.head.proj.bias is None
    assert ours.text.text_projection.shape == (768, 768)


def test_small_classic_models_take_the_same_path():
    """Without `custom_text` open_clip's plain CLIP is built; it encodes through the same class."""
    cfg = {k: v for k, v in TINY.items() if k != "custom_text"}
    with torch.random.fork_rng(devices=[]):
        model = build_model(cfg)
    encoder = Encoder(model, PreprocessCfg(**PREPROCESS), Vocabulary(None, context_length=16), 12)
    assert type(model) is open_clip.CLIP
    assert encoder.encode_images(pictures(2)).shape == encoder.encode_texts(["a", "b"]).shape == (2, 12)


def test_embedded_weights_are_small_and_carry_their_card():
    files = {p.name: p.stat().st_size for p in EMBEDDED.iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "card.json", "vocabulary.json"}
    assert sum(files.values()) <= 6_000_000
    card = json.loads((EMBEDDED / "card.json").read_text())
    assert {"command", "seed", "steps", "seconds", "figures", "versions", "data"} <= card.keys()


def test_the_embedded_encoder_takes_any_english_name():
    names = "red star", "Zürich fondue-set (x2)", "a very long name of more than six words " * 5
    found = load_encoder(device="cpu").encode_texts([f"a photo of a {name}." for name in names])
    assert found.isfinite().all() and (found[0] - found[1]).norm() > 0.1
