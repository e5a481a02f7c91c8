"""ViTamin-L-384 at full size on random weights: 457 million, 1.8 GB in float32; about 16 seconds of one core."""
import gc

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image

from retrieval.compose import compose, gallery_vectors
from retrieval.encoder import Encoder, build_model
from retrieval.trunk_features import trunk_and_head
from retrieval.vocabulary import Vocabulary

NAME = "ViTamin-L-384"


@pytest.fixture
def encoder():
    """Built without weights, then filled with one block of random numbers over and over: a full draw takes longer."""
    with torch.device("meta"):
        model = build_model(open_clip.get_model_config(NAME))
    model.to_empty(device="cpu")
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:  # norms at one, offsets at zero
            parameter.data.fill_(float(name.endswith("weight")))
        else:
            for part in parameter.data.view(-1).split(len(block)):
                torch.mul(block[:len(part)], parameter[0].numel() ** -0.5, out=part)
    model.text.attn_mask = model.text.build_causal_mask()  # no parameter, so it was left empty
    yield Encoder(model, PreprocessCfg(size=384), Vocabulary(None, context_length=77), 768)
    del model
    gc.collect()  # its 1.8 GB


def test_the_full_model_encodes_composes_and_repeats_itself(encoder):
    """One image is run twice, the second time as head tuning does: trunk first, then the head."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    image = encoder.encode_images([picture])
    assert image.shape == (1, 768) and image.dtype == torch.float32 and image.isfinite().all() and image.norm() > 1
    trunk, head = trunk_and_head(encoder.model)
    with torch.no_grad():
        features = trunk(next(iter(encoder.inputs([picture]))))
        again = head(features)
    assert features.shape == (1, 1024) and torch.equal(again, image)

    texts = encoder.encode_texts(["a photo of a cat.", "a photo of a red mug.", "a photo of a cat."])
    assert texts.shape == (3, 768) and texts.dtype == torch.float32 and texts.isfinite().all()
    assert torch.equal(texts[0], texts[2]) and (texts[0] - texts[1]).norm() > 1
    composed = compose(image, [("cat",)], [("red mug",)], encoder.encode_texts)
    torch.testing.assert_close(composed * gallery_vectors(image + texts[:1] - texts[1:2]), composed.square())
