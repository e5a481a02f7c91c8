"""Patch features: which layers, which norm, which grid; weights with their preprocessing; the training."""
import json
from dataclasses import replace
from math import floor, prod

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import conv2d, gelu, normalize, scaled_dot_product_attention

from anomaly.backbone import (
    CLIP_LARGE,
    DINOV2_LARGE,
    EMBEDDED,
    Backbone,
    BackboneConfig,
    config_record,
    extract,
    extract_all,
    load_backbone,
    random_backbone,
)
from anomaly.gabor_features import gabor_energies
from anomaly.train_backbone import (
    MOST_SEEDS,
    MOST_STEPS,
    VALIDATION_SEED,
    TrainingConfig,
    _plain_scores,
    patch_share,
    ranking_loss,
    train,
)
from anomaly.training_textures import OF_PHOTOS, _distance_to_path, _painted, _pieces, photos_in, texture_set
from data.images import read_rgb, to_uint8

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
    torch.testing.assert_close(features.classes, normalize(classes, dim=-1))


# --- nets by name -----------------------------------------------------------------------------------------------------

SMALL = {"embed_dim": 16, "depth": 3, "num_heads": 2}
# name -> class and register tokens ahead of the patches, arguments beside the small ones, side of a patch
NETS = {"vit_large_patch14_dinov2": (1, {}, 14),
        "vit_small_patch14_reg4_dinov2": (5, {}, 14),
        "vit_large_patch14_clip_336": (1, {"num_classes": 8}, 14),
        "vit_small_patch16_dinov3": (5, {}, 16),
        "vit_base_patch16_siglip_256": (0, {}, 16),
        "eva02_base_patch16_clip_224": (1, {"num_classes": 8}, 16)}


def named(name, grid=(3, 2), **changes):
    """A small net of this kind with weights that are all drawn: fresh ones would make blocks do next to nothing."""
    _, more, patch = NETS[name]
    backbone = random_backbone(tiny(architecture=name, size=(grid[0] * patch, grid[1] * patch),
                                    arguments=SMALL | more, **changes), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for values in backbone.net.parameters():
            values.normal_(0, 0.3, generator=generator)
    return backbone


def pooled(net, name, tokens):
    """The class feature by hand, from the last block's tokens."""
    tokens = net.norm(tokens)
    if "siglip" not in name:
        return net.head(tokens[:, 0])
    pool = net.attn_pool
    keys, values = pool.kv(tokens).chunk(2, dim=-1)
    split = [t.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2) for t in
             (pool.q(pool.latent).expand(len(tokens), -1, -1), keys, values)]
    one = pool.proj(scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))
    return (one + pool.mlp(pool.norm(one)))[:, 0]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", NETS)
@torch.inference_mode()
def test_nets_by_name_give_what_their_blocks_give(name, norm):
    """The outputs of the blocks are caught in a net that timm makes by itself, on a grid that is no square."""
    backbone = named(name, final_norm=norm)
    prefix, more, _ = NETS[name]
    net = timm.create_model(name, img_size=backbone.config.size, **{"num_classes": 0} | SMALL | more).eval()
    net.load_state_dict(backbone.net.state_dict())
    seen = []
    for block in net.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    pictures = images(2, backbone.config.size)
    net(backbone.normalised(pictures))
    found = backbone(pictures)
    assert found.grid == (3, 2) and seen[0].shape == (2, prefix + 6, 16)
    for layer, block in zip(found.layers, (0, 2), strict=True):
        tokens = net.norm(seen[block]) if norm else seen[block]
        torch.testing.assert_close(layer, tokens[:, prefix:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.classes, normalize(pooled(net, name, seen[2]), dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("activation", "by_hand"), [("quick", lambda x: x * torch.sigmoid(1.702 * x)), ("erf", gelu)])
def test_the_activation_is_a_choice_of_the_config(activation, by_hand):
    backbone = named("vit_large_patch14_clip_336", activation=activation)
    x = torch.linspace(-4, 4, 50)
    for block in backbone.net.blocks:
        torch.testing.assert_close(block.mlp.act(x), by_hand(x))
    assert config_record(backbone.config)["activation"] == activation


def test_what_is_no_plain_vision_transformer_is_refused(refuses):
    for changes, message in (
            ({"architecture": "vit_enormous"}, "architecture: expected a name that timm .* knows, found vit_enormous$"),
            ({"architecture": "hf-hub:someone/net"}, "architecture: expected a name"),
            ({"architecture": "swin_tiny_patch4_window7_224", "arguments": {}, "size": (224, 224)},
             "architecture: expected a plain vision transformer, found swin_"),
            ({"architecture": "vit_small_patch16_dinov3", "arguments": SMALL, "activation": "quick"},
             "arguments: expected those of vit_small_patch16_dinov3, found .*'act_layer'$"),
            ({"architecture": "eva_giant_patch14_224", "arguments": SMALL, "size": (28, 28)},
             "final_norm: expected False where the net has no norm before its pooling, found True$")):
        with refuses(f"^BackboneConfig.{message}"):
            random_backbone(tiny(**changes), seed=0)


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


@pytest.mark.parametrize(("config", "grid", "width", "of_class"), [
    (DINOV2_LARGE, (37, 37), 1024, 1024),
    (CLIP_LARGE, (37, 37), 1024, 768),
    (replace(CLIP_LARGE, size=(336, 336)), (24, 24), 1024, 768),
    (replace(DINOV2_LARGE, architecture="vit_small_patch16_dinov3", size=(256, 512), layers=(5, 11)),
     (16, 32), 384, 384),
    (replace(DINOV2_LARGE, architecture="vit_base_patch16_siglip_256", size=(256, 256), layers=(5, 11)),
     (16, 16), 768, 768),
], ids=["DINOv2", "CLIP at 518", "CLIP at 336", "DINOv3", "SigLIP"])
def test_the_full_architectures_give_their_grids(config, grid, width, of_class):
    """On the meta device: shapes without the gigabyte of weights."""
    with torch.device("meta"):
        backbone = Backbone(config).eval()
    with torch.no_grad():
        features = backbone(torch.empty(1, 3, *config.size, device="meta"))
    assert backbone.grid == grid
    assert [tuple(layer.shape) for layer in features.layers] == [(1, prod(grid), width)] * len(config.layers)
    assert features.classes.shape == (1, of_class)


# --- several nets in one pass -----------------------------------------------------------------------------------------

def pictures_of_all_sizes():
    return [Image.effect_noise(size, 80).convert("RGB") for size in ((90, 50), (3, 2), (1, 1), (40, 41), (64, 7))]


def test_nets_share_one_pass_over_the_images():
    """Two sizes, two interpolations; the images are read when their turn is near, each once."""
    nets = [random_backbone(tiny(), seed=1), random_backbone(tiny(interpolation="bicubic"), seed=2),
            random_backbone(tiny(size=(24, 48)), seed=3)]
    pictures, read, ahead = pictures_of_all_sizes(), [], []
    nets[0].net.norm.register_forward_hook(lambda *_: ahead.append(len(read)))

    def reading(index):
        read.append(index)
        return pictures[index]

    found = extract_all(nets, range(5), batch=1, read=reading)
    assert sorted(read) == list(range(5))
    norms = len(ahead) // 5
    assert all(count <= min(step // norms + 2, 5) for step, count in enumerate(ahead))
    for net, features in zip(nets, found, strict=True):
        assert features.grid == net.grid
        for index, picture in enumerate(pictures):
            alone = net(net.prepared(picture)[None])
            for layer, expected in zip(features.layers, alone.layers, strict=True):
                torch.testing.assert_close(layer[index], expected[0])
            torch.testing.assert_close(features.classes[index], alone.classes[0])


def test_features_are_kept_as_asked():
    backbone = random_backbone(tiny(), seed=1)
    exact = extract(backbone, images(5))
    half = extract(backbone, images(5), batch=2, dtype=torch.float16, keep_on="cpu")
    assert {layer.dtype for layer in half.layers} == {torch.float16} and half.classes.dtype == torch.float32
    for one, other in zip(exact.layers, half.layers, strict=True):
        torch.testing.assert_close(one.half(), other, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(exact.classes, half.classes)


def test_features_that_are_not_finite_are_named(refuses):
    backbone, pictures = random_backbone(tiny(), seed=1), images(5).float() / 255
    pictures[3, 1, 2, 2] = torch.nan
    with refuses("^image 3 through vit_tiny_patch16_224: expected finite features, found NaN or infinity$"):
        extract(backbone, pictures, batch=2)
    with torch.no_grad():
        backbone.net.norm.bias += 1e6  # fine in float32, infinite in float16
    extract(backbone, images())
    with refuses("^image 0 through .*: expected finite features"):
        extract(backbone, images(), dtype=torch.float16)
    with refuses("^image.mode: expected RGB, found L$"):
        extract(backbone, [Image.new("L", (9, 9))])
    with refuses("^batch: expected >= 1 image, found 0$"):
        extract(backbone, images(), batch=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="repeats on a GPU what the tests above do on the CPU")
def test_a_gpu_gives_nearly_the_same():
    backbone = named("vit_large_patch14_clip_336")
    exact = extract(backbone, images(3, backbone.config.size))
    backbone.to("cuda")
    for half, atol in ((True, 0.05), (False, 0.005)):
        found = extract(backbone, images(3, backbone.config.size), keep_on="cpu", half=half)
        for one, other in zip(exact.layers, found.layers, strict=True):
            torch.testing.assert_close(one, other, rtol=0.01, atol=atol * one.abs().max().item())


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    backbone = random_backbone(tiny(), seed=2)
    (tmp_path / "config.json").write_text(json.dumps(config_record(backbone.config)))
    save_file({k: v.half() for k, v in backbone.net.state_dict().items()}, tmp_path / "model.safetensors")
    return tmp_path


def test_weights_come_back_with_their_preprocessing(folder):
    loaded = load_backbone(folder)
    assert config_record(loaded.config) == config_record(tiny()) and not loaded.training
    expected = random_backbone(tiny(), seed=2)(images()).layers[1]
    torch.testing.assert_close(loaded(images()).layers[1], expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NETS)
def test_weights_as_timm_names_them_load(tmp_path, name, kind):
    """Another grid than the stored one: only the position table may change, and only where the net has one."""
    backbone = named(name, grid=(4, 4))
    _, more, patch = NETS[name]
    net = timm.create_model(name, img_size=4 * patch, **{"num_classes": 0} | SMALL | more)
    stored = {key: backbone.net.state_dict()[key].to(kind) for key in net.state_dict()}
    save_file(stored, tmp_path / "model.safetensors")
    same = load_backbone(tmp_path, backbone.config).net.state_dict()
    other = load_backbone(tmp_path, replace(backbone.config, size=(2 * patch, 5 * patch)))
    for key, value in other.net.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(same[key], stored[key].float())
        assert torch.equal(value, same[key]) != (key == "pos_embed")
    assert other(images(2, other.config.size)).grid == (2, 5)


def cubic(distance):
    """Keys' kernel with a = -0.75."""
    t = abs(distance)
    if t <= 1:
        return 1.25 * t**3 - 2.25 * t**2 + 1
    return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0


def resized(line, length):
    """(n, D) to (length, D): pixel centres, the four nearest values, the border repeated."""
    rows = []
    for index in range(length):
        at = (index + 0.5) * len(line) / length - 0.5
        near = range(floor(at) - 1, floor(at) + 3)
        rows.append(sum(cubic(at - j) * line[min(max(j, 0), len(line) - 1)] for j in near))
    return torch.stack(rows)


@pytest.mark.parametrize("grid", [(6, 7), (3, 2)])
@pytest.mark.parametrize(("name", "extra"), [("vit_large_patch14_clip_336", 1), ("vit_base_patch16_siglip_256", 0)])
def test_positions_are_resized_as_in_the_original(tmp_path, name, extra, grid):
    backbone = named(name, grid=(4, 4))
    table = backbone.net.pos_embed.detach()
    save_file(backbone.net.state_dict(), tmp_path / "model.safetensors")
    size = tuple(side * NETS[name][2] for side in grid)
    found = load_backbone(tmp_path, replace(backbone.config, size=size)).net.pos_embed
    square = table[0, extra:].reshape(4, 4, -1)
    tall = resized(square, grid[0])
    expected = resized(tall.transpose(0, 1), grid[1]).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(found[0, extra:], expected, rtol=0, atol=1e-5)
    assert torch.equal(found[:, :extra], table[:, :extra])


def test_a_record_tells_the_grid_of_its_positions(tmp_path, refuses):
    """2 x 8 positions are as many as 4 x 4: only the record beside them says which they are."""
    backbone = random_backbone(tiny(size=(16, 64), arguments=ARGUMENTS | {"img_size": 32}), seed=1)
    save_file(backbone.net.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_record(backbone.config)))
    assert torch.equal(load_backbone(tmp_path).net.pos_embed, backbone.net.pos_embed)
    as_square = load_backbone(tmp_path, backbone.config).net.pos_embed
    assert as_square.shape == backbone.net.pos_embed.shape and not torch.equal(as_square, backbone.net.pos_embed)
    save_file(random_backbone(tiny(size=(24, 40)), seed=1).net.state_dict(), tmp_path / "model.safetensors")
    with refuses("model.safetensors: expected positions of a square grid, or of arguments.img_size, found 15 pos"):
        load_backbone(tmp_path)


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
    (folder / "model.safetensors").write_bytes(b"no weights")
    with refuses("model.safetensors: expected a whole safetensors file, found "):
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
                             ({"interpolation": "lanczos"}, "interpolation: expected"),
                             ({"activation": "tanh"}, r"activation: expected \['erf', 'quick', None\], found tanh$"),
                             ({"arguments": {"pretrained": True}}, "arguments: expected a mapping without"),
                             ({"arguments": []}, "arguments: expected a mapping")):
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
    assert card["command"] == "python -m submit weights train backbone --out FOLDER --photos FOLDER"
    figures = card["figures"]
    assert figures["validation"]["patch_auroc"] > figures["validation before training"]["patch_auroc"]
    assert load_backbone().config.final_norm


# --- the stem of convolutions -----------------------------------------------------------------------------------------

def with_stem(**changes):
    return tiny(arguments=ARGUMENTS | {"embed_layer": "convolutions"} | changes)


def normed(x, layer):
    """Group by group, each to mean 0 and deviation 1."""
    groups = x.unflatten(1, (layer.num_groups, -1))
    mean, deviation = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), correction=0, keepdim=True).sqrt()
    flat = ((groups - mean) / (deviation ** 2 + layer.eps).sqrt()).flatten(1, 2)
    return flat * layer.weight[:, None, None] + layer.bias[:, None, None]


def test_the_stem_is_its_convolutions_one_after_the_other():
    backbone = random_backbone(with_stem(), seed=0)
    stem, x = backbone.net.patch_embed.proj, torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    a, na, _, b, nb, _ = stem.halved
    small = gelu(normed(conv2d(gelu(normed(conv2d(x, a.weight, a.bias, 2, 1), na)), b.weight, b.bias, 2, 1), nb))
    c, nc, _, d, nd = stem.again
    again = normed(conv2d(gelu(normed(conv2d(small, c.weight, c.bias, 1, 1), nc)), d.weight, d.bias, 1, 1), nd)
    _, e, ne, _, f = stem.patches
    assert e.kernel_size == e.stride == (2, 2)  # 8 pixels a patch, halved twice before
    expected = conv2d(gelu(normed(conv2d(gelu(small + again), e.weight, e.bias, 2), ne)), f.weight, f.bias)
    torch.testing.assert_close(backbone.net.patch_embed(x), expected.permute(0, 2, 3, 1), rtol=0, atol=1e-5)


def test_a_net_with_a_stem_is_any_backbone(tmp_path, refuses):
    backbone, batch = random_backbone(with_stem(), seed=0), images(3)
    found = extract(backbone, batch)
    torch.testing.assert_close(found.layers[0][:1], extract(backbone, batch[:1]).layers[0], rtol=0, atol=1e-5)
    folder = tmp_path / "net"
    folder.mkdir()
    save_file(backbone.net.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_record(with_stem())))
    torch.testing.assert_close(extract(load_backbone(folder), batch).layers, found.layers)
    with refuses(r"BackboneConfig.arguments embed_layer: expected one of convolutions, found os.system$"):
        random_backbone(with_stem(embed_layer="os.system"), seed=0)
    with refuses(r"BackboneConfig.arguments embed_layer: expected one of convolutions, found \[\]$"):
        random_backbone(with_stem(embed_layer=[]), seed=0)
    with refuses(r"^embed_dim: expected a multiple of 8, found 28$"):
        random_backbone(with_stem(embed_dim=28), seed=0)
    with refuses(r"patch_size: expected multiples of 4 pixels, found \(2, 2\)$"):
        random_backbone(with_stem(patch_size=2), seed=0)


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
    assert config_record(load_backbone(tmp_path / "parts").config) == config_record(tiny())
    assert torch.equal(torch.get_rng_state(), state)


def test_training_refuses_a_taken_folder_and_a_foreign_checkpoint(tmp_path, few_validation_sets, refuses):
    with refuses("expected a path where nothing lies yet"):
        train(tmp_path, config=QUICK, backbone_config=tiny())
    torch.save({"of": [9, {}]}, tmp_path / "x.checkpoint.pt")
    with refuses("x.checkpoint.pt: expected the checkpoint of"):
        train(tmp_path / "x", config=QUICK, backbone_config=tiny())
    with refuses(r"^TrainingConfig.steps: expected >= 1, found 0$"):
        TrainingConfig(steps=0)
    with refuses(r"^TrainingConfig.warmup: expected >= 1, found 0$"):
        TrainingConfig(warmup=0)
    with refuses(r"^TrainingConfig.normal, disturbed: expected at least one"):
        TrainingConfig(normal=0)


def stop(line):
    raise KeyboardInterrupt


def test_a_checkpoint_is_whole_and_of_the_same_net(tmp_path, few_validation_sets, refuses):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "new" / "x", config=QUICK, backbone_config=tiny(), progress=stop)
    with refuses("x.checkpoint.pt: expected the checkpoint of"):
        train(tmp_path / "new" / "x", config=QUICK, backbone_config=tiny(mean=(0.5,) * 3))
    checkpoint = tmp_path / "new" / "x.checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with refuses("x.checkpoint.pt: expected a whole file written by torch.save"):
        train(tmp_path / "new" / "x", config=QUICK, backbone_config=tiny())


def test_no_seed_of_a_training_meets_the_validation(tmp_path, refuses):
    last = MOST_STEPS * (MOST_SEEDS - 1) + MOST_STEPS - 1
    assert last < VALIDATION_SEED and VALIDATION_SEED + 24 <= 2 ** 32
    for seed in (-1, MOST_SEEDS):
        with refuses(rf"^seed: expected 0 to 42948, found {seed}$"):
            train(tmp_path / "x", seed=seed)
    with refuses(r"^TrainingConfig.steps: expected <= 100000, found 100001$"):
        TrainingConfig(steps=100_001)


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


@pytest.fixture
def photos(tmp_path):
    """Two photographs that will do, one below the other, and what will not."""
    folder = tmp_path / "photos"
    (folder / "walls").mkdir(parents=True)
    red, blue = (torch.zeros(200, 240, 3, dtype=torch.uint8) for _ in range(2))
    red[:, :120, 0], red[:, 120:, 2] = 255, 255
    blue[..., 2] = 200
    Image.fromarray(red.numpy()).save(folder / "z.png")
    Image.fromarray(blue.numpy()).save(folder / "walls" / "a.png")
    Image.new("RGB", (400, 199)).save(folder / "small.png")
    Image.new("RGB", (400, 400)).save(folder / ".hidden.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_photographs_are_found_in_folders_below(photos, tmp_path, refuses):
    assert photos_in(photos) == [photos / "z.png", photos / "walls" / "a.png"]
    with refuses(r"nowhere: expected a folder of photographs, found no such folder$"):
        photos_in(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with refuses(r"empty: expected images of at least 200 pixels a side, found none$"):
        photos_in(tmp_path / "empty")
    (photos / "broken.png").write_bytes(b"no image")
    with refuses(r"broken.png: expected an image, found cannot identify"):
        photos_in(photos)


def test_pieces_of_photographs_are_cut_and_not_made_up(photos):
    photo = to_uint8(read_rgb(photos / "z.png")).float() / 255
    seen = set()
    for seed in range(10):
        pieces = _pieces(photo, 3, 32, torch.Generator().manual_seed(seed))
        assert pieces.shape == (3, 3, 32, 32)
        torch.testing.assert_close(pieces[:, 0] + pieces[:, 2], torch.ones(3, 32, 32))  # red beside blue, nothing else
        assert pieces[:, 1].abs().max() == 0
        seen |= set(pieces[:, 0].round().unique().tolist())
    assert seen == {0, 1}


def test_a_share_of_the_materials_is_photographed(photos, monkeypatch):
    cut = []
    monkeypatch.setattr("anomaly.training_textures._photographed",
                        lambda count, size, files, generator: cut.append(files) or torch.zeros(count, 3, size, size))
    for seed in range(200):
        _painted(1, 8, [photos / "z.png"], torch.Generator().manual_seed(seed))
    assert abs(len(cut) / 200 - OF_PHOTOS) < 0.1
    cut.clear()
    _painted(1, 8, [], torch.Generator().manual_seed(0))
    assert not cut


def test_the_way_to_a_crack_is_measured_to_its_nearest_piece():
    path = torch.tensor([[5.0, 5.0], [20.0, 9.0], [20.0, 9.0], [18.0, 40.0]])
    found = _distance_to_path(path, 32)
    along = torch.cat([path[k] + torch.linspace(0, 1, 101)[:, None] * (path[k + 1] - path[k]) for k in range(3)])
    for y in range(32):
        for x in range(32):
            nearest = float((along - torch.tensor([x, y])).norm(dim=1).min())
            assert found[y, x] == pytest.approx(nearest, abs=0.1) if nearest < 10 else found[y, x] > 9


def test_a_training_with_photographs_says_so_and_keeps_to_them(photos, tmp_path, few_validation_sets, refuses):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "x", config=QUICK, backbone_config=tiny(), photos=photos, progress=stop)
    with refuses("x.checkpoint.pt: expected the checkpoint of"):
        train(tmp_path / "x", config=QUICK, backbone_config=tiny())
    card = train(tmp_path / "x", config=QUICK, backbone_config=tiny(), photos=photos)
    assert card["data"].endswith("pieces of 2 photographs among them")
    train(tmp_path / "without", config=QUICK, backbone_config=tiny())
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("x", "without"))
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_scores_in_training_are_the_mutual_scores():
    patches = normalize(torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
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
