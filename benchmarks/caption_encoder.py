"""A small encoder trained on images and captions alone, as CLIP is: the arithmetic of embeddings was not trained.

The embedded encoder was trained to add and subtract, so on it no other way of composing can show much. This one
stands for a full model before its head is tuned. About ten minutes on one thread, once; kept under .cache.
"""
from pathlib import Path

from data.files import fingerprint
from retrieval.encoder import Encoder, load_encoder
from retrieval.train_encoder import TrainingConfig, train

CONFIG = TrainingConfig(steps=500, composition_weight=0.0, caption_weight=1.0)
FOLDER = Path(".cache") / "benchmarks" / f"caption-encoder-{fingerprint(CONFIG)}"


def caption_encoder() -> Encoder:
    if not FOLDER.exists():
        train(FOLDER, cfg=CONFIG, progress=print, checks=0, dev_queries=20)
    return load_encoder(FOLDER, device="cpu")


if __name__ == "__main__":
    caption_encoder()
