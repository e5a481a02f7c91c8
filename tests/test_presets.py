"""The named settings: what their papers say, and nets that can be built."""
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from anomaly import presets
from anomaly.backbone import EMBEDDED, Backbone, BackboneConfig, random_backbone
from anomaly.pipeline import MuscConfig
from anomaly.presets import PRESETS, Preset, load_nets, preset, weight_files

# degrees, aggregation, windows, smoothing, image score, foreground; keep is 0.3 everywhere
PUBLISHED = {
    "musc": ((1, 3, 5), "lnamd", (1, 2, 3), "rscin", "highest", "off"),
    "report": ((1, 3), "lnamd", (1, 8, 9), "rscin", "two_highest", "on"),
    "musc-v2": ((1, 3, 5), "snamd", (1, 7), "rscon", "highest", "off"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_scoring_is_as_published(name):
    c = preset(name).scoring
    assert (c.degrees, c.aggregation, c.windows, c.smoothing, c.image_score, c.foreground) == PUBLISHED[name]
    assert c.keep == 0.3 and not c.consistent and not c.calibrated and c.maps == "first" and c.radius is None


@pytest.mark.parametrize(("name", "for_maps", "for_images"), [
    ("musc", ("vit_large_patch14_clip_336", False, "erf"), ("vit_large_patch14_clip_336", False, "erf")),
    ("report", ("vit_large_patch14_dinov2", True, None), ("vit_large_patch14_clip_336", False, "quick")),
    ("musc-v2", ("vit_base_patch8_224", True, None), ("vit_base_patch8_224", True, None)),
])
def test_nets_are_as_published_and_can_be_built(name, for_maps, for_images):
    found = preset(name)
    for config, expected in ((found.for_maps, for_maps), (found.for_images, for_images)):
        assert (config.architecture, config.final_norm, config.activation) == expected
        with torch.device("meta"):
            backbone = Backbone(config)
        large = "large" in config.architecture
        assert backbone.grid == ((37, 37) if large else (28, 28)) and len(backbone.net.blocks) == (24 if large else 12)
        assert config.layers == ((5, 11, 17, 23) if large else (3, 7, 11))


def test_the_embedded_preset_needs_no_other_nets():
    assert preset("embedded").for_maps is None and preset("embedded").for_images is None


def test_names_are_keys_and_unknown_ones_are_refused(refuses):
    assert all(found.name == name for name, found in PRESETS.items())
    with refuses("^preset: expected one of embedded, musc, report, musc-v2, found MuSc$"):
        preset("MuSc")


TINY = BackboneConfig("vit_tiny_patch16_224", (0, 1), (32, 48), (0.5,) * 3, (0.25,) * 3, arguments={
    "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2})


def test_nets_are_loaded_from_folders_of_their_names(tmp_path, refuses):
    small = replace(TINY, architecture="vit_small_patch16_224")
    both = Preset("both", TINY, small, MuscConfig())
    with refuses(r"^preset both: expected --weights DIR with vit_tiny_patch16_224/ in it, found none$"):
        weight_files(both, None)
    with refuses(r"vit_tiny_patch16_224/model.safetensors: expected the weights that preset both needs, found no such"):
        load_nets(both, tmp_path)
    saved = [random_backbone(config, seed=seed) for seed, config in enumerate((TINY, small), 1)]
    for net in saved:
        (tmp_path / net.config.architecture).mkdir()
        save_file(net.net.state_dict(), tmp_path / net.config.architecture / "model.safetensors")
    nets = load_nets(both, tmp_path)
    for net, expected in zip(nets.each, saved, strict=True):
        assert torch.equal(net.net.blocks[1].mlp.fc1.weight, expected.net.blocks[1].mlp.fc1.weight)
    alone = load_nets(Preset("alone", TINY, TINY, MuscConfig()), tmp_path)
    assert alone.for_maps is alone.for_images


def test_the_embedded_preset_needs_no_weights(tmp_path, monkeypatch):
    nets = load_nets(preset("embedded"), None)
    assert nets.for_maps is nets.for_images
    monkeypatch.setattr(presets, "IMAGE_BACKBONE", EMBEDDED)
    nets = load_nets(preset("embedded"), None)
    assert nets.for_maps is not nets.for_images
