"""The encoder of this submission: an open_clip model, its tensors in weights.pth."""
from __future__ import annotations

import json
from pathlib import Path

import torch
from open_clip.transform import PreprocessCfg

from retrieval.encoder import EMBEDDED, Encoder, build_model, load_strictly
from retrieval.vocabulary import Vocabulary

WEIGHTS = Path(__file__).with_name("weights.pth")


def load_model(*, device: torch.device | str) -> Encoder:
    """The encoder in evaluation mode on `device`; its description and vocabulary lie beside the code."""
    config = json.loads((EMBEDDED / "config.json").read_text())
    model = build_model(config["model_cfg"])
    load_strictly(model, torch.load(WEIGHTS, map_location="cpu", weights_only=True), WEIGHTS)
    kept = EMBEDDED / "vocabulary.json"
    vocabulary = Vocabulary(json.loads(kept.read_text()) if kept.exists() else None,
                            context_length=config["model_cfg"]["text_cfg"].get("context_length", 77))
    return Encoder(model.to(device), PreprocessCfg(**config["preprocess_cfg"]), vocabulary,
                   config["model_cfg"]["embed_dim"])
