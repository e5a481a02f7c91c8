"""Patch features: which layers, which norm, which grid; weights with their preprocessing; the training."""
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from anomaly.backbone import (
    CLIP_LARGE,
    DINOV2_LARGE,
    EMBEDDED,
    Backbone,
    BackboneConfig,
    config_record,
    extract,
    load_backbone,
    random_backbone,
)
from anomaly.gabor_features import gabor_energies
from anomaly.train_backbone import TrainingConfig, _plain_scores, patch_share, ranking_loss, train
from anomaly.training_textures import texture_set

ARGUMENTS = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "dynamic_img_size": True}


def tiny(**changes):
    values = {"architecture": "vit_tiny_patch16_224", "layers": (0, 2), "size": (32, 32), "mean": (0.5, 0.4, 0.3),
              "std": (0.2, 0.3, 0.4), "arguments": ARGUMENTS}
    return BackboneConfig(**values | changes)


def images(n=3, size=(32, 32), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, *size), generator=generator, dtype=torch.uint8)


def by_hand(backbone, batch, norm):
    """Block by block through the net, class token apart."""
    net = backbone.net
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.config.mean, backbone.config.std))
    x = net.patch_embed((batch / 255.0 - mean) / std)
    if x.ndim == 4:
        x = x.flatten(1, 2)
    x = net.norm_pre(torch.cat([net.cls_token.expand(len(x), -1, -1), x], 1) + net.pos_embed)
    found = []
    for block in net.blocks:
        x = block(x)
        found.append((net.norm(x) if norm else x)[:, 1:])
    return [found[i] for i in backbone.config.layers], net.norm(x)[:, 0]


@pytest.mark.parametrize("norm", [True, False])
@torch.inference_mode()
def test_layers_are_block_outputs_with_or_without_the_last_norm(norm):
    backbone = random_backbone(tiny(final_norm=norm), seed=1)
    features = backbone(images())
    layers, classes = by_hand(backbone, images(), norm)
    assert features.grid == (4, 4) and len(features.layers) == 2
    for found, expected in zip(features.layers, layers, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(features.classes, torch.nn.functional.normalize(classes, dim=-1))


def test_any_grid_and_batches_change_nothing():
    backbone = random_backbone(tiny(size=(24, 48)), seed=1)
    whole, parts = extract(backbone, images(5, (24, 48))), extract(backbone, images(5, (24, 48)), batch=2)
    assert whole.grid == (3, 6) and whole.layers[0].shape == (5, 18, 16)
    torch.testing.assert_close(whole.layers[1], parts.layers[1])
    torch.testing.assert_close(whole.classes, parts.classes)


def test_images_are_squashed_and_floats_equal_bytes():
    backbone = random_backbone(tiny(), seed=1)
    picture = Image.effect_noise((90, 50), 80).convert("RGB")
    ready = backbone.prepared(picture)
    assert ready.shape == (3, 32, 32) and ready.dtype == torch.uint8
    found = extract(backbone, [picture, picture]).layers[0]
    torch.testing.assert_close(found[1], extract(backbone, ready[None].float() / 255).layers[0][0])


@pytest.mark.parametrize("config", [DINOV2_LARGE, CLIP_LARGE], ids=lambda c: c.architecture)
def test_the_full_architectures_give_their_grids(config):
    """On the meta device: shapes without the gigabyte of weights."""
    with torch.device("meta"):
        backbone = Backbone(config).eval()
    assert backbone.grid == (37, 37) and len(backbone.net.blocks) == 24
    with torch.no_grad():
        features = backbone(torch.empty(1, 3, 518, 518, device="meta"))
    assert [tuple(layer.shape) for layer in features.layers] == [(1, 1369, 1024)] * 4
    assert features.classes.shape == (1, 768 if config is CLIP_LARGE else 1024)


@pytest.fixture
def folder(tmp_path):
    backbone = random_backbone(tiny(), seed=2)
    (tmp_path / "config.json").write_text(json.dumps(config_record(backbone.config)))
    save_file({k: v.half() for k, v in backbone.net.state_dict().items()}, tmp_path / "model.safetensors")
    return tmp_path


def test_weights_come_back_with_their_preprocessing(folder):
    loaded = load_backbone(folder)
    assert loaded.config == tiny() and not loaded.training
    expected = random_backbone(tiny(), seed=2)(images()).layers[1]
    torch.testing.assert_close(loaded(images()).layers[1], expected, rtol=0, atol=0.02)


def test_seeds_decide_and_the_global_state_stays():
    state = torch.get_rng_state()
    one, same, other = (random_backbone(tiny(), seed=s).net.blocks[0].mlp.fc1.weight for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_missing_and_wrong_files_are_named(folder, tmp_path, refuses):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"more": torch.zeros(1)}, folder / "model.safetensors")
    with refuses(r"model.safetensors: expected exactly the tensors .*, found missing \[\], extra \['more'\]$"):
        load_backbone(folder)
    save_file(weights | {"norm.bias": torch.zeros(3)}, folder / "model.safetensors")
    with refuses(r"model.safetensors: expected the shapes of vit_tiny_patch16_224, found size mismatch for norm.bias"):
        load_backbone(folder)
    (folder / "model.safetensors").unlink()
    with refuses(r"model.safetensors: expected the weights of the backbone, found no such file$"):
        load_backbone(folder)
    for text, message in (("{", "expected JSON"), ("[]", "expected a JSON object, found list"),
                          ('{"sise": 3}', r"expected keys among .*, found \['sise'\]"),
                          ("{}", "expected the fields of a backbone")):
        (folder / "config.json").write_text(text)
        with refuses(f"config.json: {message}"):
            load_backbone(folder)
    with refuses("config.json: expected the description of a backbone, found no such file$"):
        load_backbone(tmp_path / "nothing")


def test_configs_that_cannot_work_are_refused(refuses):
    for changes, message in (({"layers": (2, 0)}, r"layers: expected ascending block indices from 0, found \(2, 0\)"),
                             ({"layers": ()}, "layers: expected ascending"),
                             ({"std": (0.2, 0, 0.2)}, "std: expected positive numbers"),
                             ({"mean": (0.2,)}, "mean, std: expected 3 numbers each"),
                             ({"size": (32,)}, "size: expected height and width"),
                             ({"interpolation": "lanczos"}, "interpolation: expected")):
        with refuses(f"^BackboneConfig.{message}"):
            tiny(**changes)
    with refuses(r"^BackboneConfig.layers: expected indices below 3, found \(3,\)$"):
        random_backbone(tiny(layers=(3,)), seed=0)
    with refuses(r"^BackboneConfig.size: expected multiples of the patch \(8, 8\), found \(32, 30\)$"):
        random_backbone(tiny(size=(32, 30)), seed=0)
    backbone = random_backbone(tiny(), seed=0)
    with refuses(r"^images.shape: expected \(N, 3, 32, 32\), found \(1, 3, 16, 16\)$"):
        backbone(images(1, (16, 16)))
    with refuses("^images: expected at least one image, found 0$"):
        extract(backbone, [])


def test_the_embedded_weights_are_small_and_have_a_card():
    assert (EMBEDDED / "model.safetensors").stat().st_size < 12e6
    card = json.loads((EMBEDDED / "card.json").read_text())
    assert card["command"] == "python -m submit weights train backbone --out FOLDER"
    figures = card["figures"]
    assert figures["validation"]["patch_auroc"] > figures["validation before training"]["patch_auroc"]
    assert load_backbone().config.final_norm


# --- training ---------------------------------------------------------------------------------------------------------

QUICK = TrainingConfig(steps=4, warmup=2, checkpoint_every=2)


@pytest.fixture
def few_validation_sets(monkeypatch):
    monkeypatch.setattr("anomaly.train_backbone.validation_figures", lambda backbone: {"patch_auroc": 0.5})


def test_an_interrupted_training_ends_the_same(tmp_path, few_validation_sets, monkeypatch):
    state = torch.get_rng_state()
    train(tmp_path / "whole", config=QUICK, backbone_config=tiny())

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", config=QUICK, backbone_config=tiny(), progress=stop)
    assert not (tmp_path / "parts").exists() and (tmp_path / "parts.checkpoint.pt").is_file()
    lines = []
    card = train(tmp_path / "parts", config=QUICK, backbone_config=tiny(), progress=lines.append)
    assert lines[0].startswith("step 4 of 4") and not (tmp_path / "parts.checkpoint.pt").exists()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[k], two[k]) for k in one) and card["training"]["steps"] == 4
    assert load_backbone(tmp_path / "parts").config == tiny()
    assert torch.equal(torch.get_rng_state(), state)


def test_training_refuses_a_taken_folder_and_a_foreign_checkpoint(tmp_path, few_validation_sets, refuses):
    with refuses("expected a path where nothing lies yet"):
        train(tmp_path, config=QUICK, backbone_config=tiny())
    torch.save({"of": [9, {}]}, tmp_path / "x.checkpoint.pt")
    with refuses("x.checkpoint.pt: expected the checkpoint of"):
        train(tmp_path / "x", config=QUICK, backbone_config=tiny())
    with refuses(r"^TrainingConfig.steps: expected >= 1, found 0$"):
        TrainingConfig(steps=0)
    with refuses(r"^TrainingConfig.normal, disturbed: expected at least one"):
        TrainingConfig(normal=0)


def test_sets_of_textures_follow_their_seed_and_mark_what_changed():
    def drawn(seed):
        return texture_set(2, 3, 64, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    changed_pixels = 0
    for seed in range(3):
        pictures, changed = drawn(seed)
        assert pictures.shape == (5, 3, 64, 64) and pictures.min() >= 0 and pictures.max() <= 1
        assert not changed[:2].any()
        assert torch.equal(pictures, drawn(seed)[0]) and not torch.equal(pictures, drawn(seed + 100)[0])
        changed_pixels += int(changed.sum())
    assert changed_pixels > 50 and torch.equal(torch.get_rng_state(), state)


def test_scores_in_training_are_the_mutual_scores():
    patches = torch.nn.functional.normalize(torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    expected = []
    for i in range(6):
        found = torch.stack([torch.cdist(patches[i], patches[j]).amin(1) for j in range(6) if j != i])
        expected.append(found.sort(0).values[:2].mean(0))
    torch.testing.assert_close(_plain_scores(patches), torch.stack(expected), rtol=0, atol=1e-5)


def test_the_loss_prefers_disturbed_patches_on_top():
    changed = torch.zeros(2, 16, 16, dtype=torch.bool)
    changed[1, :8, :8] = True
    share = patch_share(changed, (2, 2))
    assert share.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]
    good = ranking_loss(torch.tensor([[0.1, 0.2, 0.1, 0.1], [0.9, 0.1, 0.1, 0.1]]), share)
    bad = ranking_loss(torch.tensor([[0.8, 0.9, 0.8, 0.8], [0.1, 0.8, 0.8, 0.8]]), share)
    assert good < 0.01 < 1 < bad
    assert ranking_loss(torch.ones(2, 4), torch.zeros(2, 4)) == 0


# --- the yardstick ----------------------------------------------------------------------------------------------------

def test_gabor_energies_tell_direction_and_ignore_light_and_shift():
    line = torch.arange(64.0)
    upright = (torch.sin(2 * torch.pi * line / 8) / 4 + 0.5)[None, None, None, :].expand(1, 3, 64, 64)
    found = gabor_energies(upright, (2, 4))
    assert found.shape == (1, 8, 21)
    lying = gabor_energies(upright.transpose(2, 3), (2, 4))
    assert (found - lying).norm() > 5 * (found - gabor_energies(upright.roll(3, 3), (2, 4))).norm()
    torch.testing.assert_close(gabor_energies(upright + 0.1, (2, 4))[..., 3:], found[..., 3:], rtol=0, atol=1e-4)
    assert gabor_energies(torch.full((1, 3, 64, 64), 0.3), (2, 2))[..., 3:].abs().max() < 1e-4
