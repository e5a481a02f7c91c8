"""Trunk features on file: equal to the trunk, gone on with after a break, never those of another trunk or set."""
import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from retrieval import trunk_features as module
from retrieval.encoder import build_model, load_encoder
from retrieval.trunk_features import file_names, first_of_equals, read_row, trunk_and_head, trunk_features


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(device="cpu")


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (150, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Interrupted:
    """An encoder that is cut off after some blocks, and counts those it gave."""

    def __init__(self, encoder, blocks):
        self.model, self.preprocess, self._encoder, self._blocks, self.given = (
            encoder.model, encoder.preprocess, encoder, blocks, 0)

    def inputs(self, images, *, opened):
        for block in self._encoder.inputs(images, opened=opened):
            if self.given == self._blocks:
                raise KeyboardInterrupt
            self.given += 1
            yield block


def test_features_are_what_the_head_turns_into_the_embedding(encoder, images, tmp_path):
    found = trunk_features(encoder, images, tmp_path, names=range(150))
    assert found.shape == (150, 160) and found.dtype == torch.float32
    trunk, head = trunk_and_head(encoder.model)
    torch.testing.assert_close(head(found), encoder.encode_images(images), atol=1e-5, rtol=0)
    for i in (0, 63, 64, 149):
        alone = trunk(next(iter(encoder.inputs(images[i:i + 1]))))
        torch.testing.assert_close(found[i:i + 1], alone, atol=1e-5, rtol=0)


def test_a_second_call_runs_nothing_and_the_file_does_not_change(encoder, images, tmp_path):
    first = trunk_features(encoder, images, tmp_path, names=range(150))
    first_values = first.clone()
    first.zero_()
    again = trunk_features(Interrupted(encoder, 0), images, tmp_path, names=range(150))
    assert torch.equal(again, first_values)
    assert len(list(tmp_path.glob("*.npy"))) == 1


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_an_interrupted_call_goes_on_with_the_next_block(encoder, images, tmp_path, blocks):
    with pytest.raises(KeyboardInterrupt):
        trunk_features(Interrupted(encoder, blocks), images, tmp_path, names=range(150))
    rest = Interrupted(encoder, 9)
    found = trunk_features(rest, images, tmp_path, names=range(150))
    assert rest.given == 3 - blocks
    whole = trunk_features(encoder, images, tmp_path / "other", names=range(150))
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


def test_other_images_weights_or_preprocessing_get_their_own_file(encoder, images, tmp_path):
    small = images[:3]
    first = trunk_features(encoder, small, tmp_path, names=range(3)).clone()
    trunk_features(encoder, small, tmp_path, names="abc")
    other = load_encoder(device="cpu")
    next(trunk_and_head(other.model)[0].parameters()).mul_(1.5)
    changed = trunk_features(other, small, tmp_path, names=range(3))
    assert not torch.allclose(changed, first) and len(list(tmp_path.glob("*.npy"))) == 3
    padded = load_encoder(device="cpu")
    padded.preprocess = replace(padded.preprocess, fill_color=0)
    trunk_features(padded, small, tmp_path, names=range(3))
    assert len(list(tmp_path.glob("*.npy"))) == 4
    head_only = load_encoder(device="cpu")
    trunk_and_head(head_only.model)[1].weight.zero_()
    assert torch.equal(trunk_features(head_only, small, tmp_path, names=range(3)), first)
    assert len(list(tmp_path.glob("*.npy"))) == 4  # another head changes no feature


@pytest.mark.parametrize("spoil", [
    lambda file: file.with_suffix(".json").write_text("{"),
    lambda file: file.with_suffix(".json").write_text(json.dumps({"done": 99})),
    lambda file: file.write_bytes(file.read_bytes()[:50]),
    lambda file: np.save(file, np.zeros((2, 160), np.float32)),
    lambda file: file.unlink(),
])
def test_files_that_do_not_fit_together_are_made_anew(encoder, images, tmp_path, spoil):
    small = images[:3]
    first = trunk_features(encoder, small, tmp_path, names=range(3)).clone()
    spoil(next(tmp_path.glob("*.npy")))
    assert torch.equal(trunk_features(encoder, small, tmp_path, names=range(3)), first)


def test_image_files_are_told_by_path_size_and_time(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for path in paths:
        Image.new("RGB", (4, 4)).save(path)
    first = file_names(paths)
    assert file_names(paths) == first and len(set(first)) == 2
    Image.new("RGB", (9, 9), (3, 3, 3)).save(paths[0])
    assert file_names(paths)[0] != first[0] and file_names(paths)[1] == first[1]


def test_files_are_read_and_a_broken_one_is_named_with_its_row(encoder, tmp_path, refuses):
    Image.new("RGB", (64, 64), (200, 10, 10)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    good, bad = ("row 1", str(tmp_path / "a.png")), ("row 2", str(tmp_path / "b.png"))
    found = trunk_features(encoder, [good], tmp_path / "f", names=["a"], opened=read_row)
    flat = torch.tensor([200, 10, 10], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    same = trunk_features(encoder, flat, tmp_path / "f", names=["flat"])
    torch.testing.assert_close(found, same, atol=1e-5, rtol=0)
    with refuses("row 2 .*b.png"):
        trunk_features(encoder, [good, bad], tmp_path / "f", names=["a", "b"], opened=read_row)


def test_copies_of_an_image_become_one():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [3.0, 5.0], [3.0, 4.0]])
    assert first_of_equals(rows).tolist() == [0, 1, 0, 3, 1]


def test_names_must_match_the_images(encoder, images, tmp_path, refuses):
    with refuses("names: expected one an image, 3, at least one, found 2"):
        trunk_features(encoder, images[:3], tmp_path, names="ab")
    with refuses("names: expected one an image, 0, at least one, found 0"):
        trunk_features(encoder, images[:0], tmp_path, names="")


def test_the_full_model_splits_into_trunk_and_head():
    with torch.device("meta"):
        model = build_model(open_clip.get_model_config("ViTamin-L-384"))
    trunk, head = trunk_and_head(model)
    assert head is model.visual.head.proj and head.weight.shape == (768, 1024)
    assert sum(p.numel() for p in trunk.parameters()) == 333_707_168 - 786_432


def test_a_tower_without_a_linear_head_is_refused(refuses):
    tower = nn.Module()
    tower.visual = nn.Module()
    with refuses("image tower: expected a timm trunk and a head of one linear layer without bias, found Module"):
        trunk_and_head(tower)
    tower.visual.trunk, tower.visual.head = nn.Identity(), nn.Linear(3, 4)  # its bias would move every image
    with refuses("image tower: "):
        trunk_and_head(tower)


def test_blocks_are_written_as_they_come(encoder, images, tmp_path, monkeypatch):
    """The count never runs ahead of the rows it vouches for."""
    seen = []
    real = module.write_json

    def watched(path, value):
        rows = np.load(path.with_suffix(".npy"), mmap_mode="r")
        seen.append((value["done"], bool((np.abs(rows[:value["done"]]).sum(1) > 0).all())))
        real(path, value)

    monkeypatch.setattr(module, "write_json", watched)
    trunk_features(encoder, images, tmp_path, names=range(150))
    assert seen == [(64, True), (128, True), (150, True)]
