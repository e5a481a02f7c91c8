"""Which objects a request adds and which it removes: a token classifier over words, decoded by the best legal path.

Architecture: DistilBERT (Sanh et al., arXiv:1910.01108) with a token-classification head, labels O and B-/I- a side.
Departs from common practice: every word of a name is labelled, a word's score is the mean over its sub-words, illegal
label sequences are excluded by a Viterbi search, and the names of a list share a side. Names are cut out of the
original text, so hyphens, apostrophes and spelling stay as written.
"""
from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DistilBertConfig, DistilBertForTokenClassification

from data.errors import InputError, expect
from data.weight_files import read_json, read_weights
from retrieval.integer_products import IntegerTagger, supported
from retrieval.tokenizer_file import read_tokenizer

LABELS = ("O", "B-add", "I-add", "B-remove", "I-remove")
OUTSIDE = 0
FILES = ("config.json", "tokenizer.json", "model.safetensors")
_ADD, _REMOVE = LABELS.index("B-add"), LABELS.index("B-remove")  # the inside label of a side follows its begin
_EMBEDDED = Path(__file__).parent / "weights" / "parser"
_CPU_BATCH = 32  # texts a forward pass and thread: what it needs in between stays in the processor's cache
_GPU_BATCH = 256  # texts a forward pass elsewhere; at 30 tokens well under 100 MB for the embedded size
_LONGEST_WORD = 100  # characters read of a word: splitting it takes time that grows with their square
_WORD = re.compile(r"[^\W_]+|[^\w\s]|_")  # letters and digits, or one mark
_COMPOUND = re.compile(r"(?<![^\W_])[^\W_]+(?:(?:'-?|-)[^\W_]+)+")  # tried once a word: else long ones take for ever
# One character for one, so that offsets hold: apostrophes, quotes, dashes and the ellipsis as a keyboard has them.
_PLAIN = str.maketrans("‘’‚‛ʼ`´′“”„‟«»″‐‑‒–—―−…", "''''''''\"\"\"\"\"\"\"-------.")
_DETERMINERS = frozenset(("a", "an", "the", "my", "your", "our", "his", "her", "their", "its", "some", "any", "this",
                          "that", "these", "those", "another", "both", "every"))
_JOINTS = frozenset((",", "and", "or"))
_QUOTES = frozenset(("'", '"', "`"))
_POLITE = frozenset(("please", "pls", "plz", "thanks", "thx", "cheers"))
_PAIRING = frozenset(("and", "&"))
_PAIR_DOUBT = 5.0  # log-odds against "and" within a name: lists learned from hold more such names than requests do
_STROKES = frozenset(("-", "+"))
_LINKS = frozenset(("and", "or", "nor", "of", "with", "without", "for", "by", "to", "from", "into", "than", "instead"))


@dataclass(frozen=True)
class Modification:
    """What a request asks for: object names as written in the text, in reading order, each once a side.

    Lower-casing and other matching is up to the caller.
    """

    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()


@dataclass(frozen=True)
class Word:
    """One word or mark of a text: text[start:end], and how the model reads it."""

    start: int
    end: int
    plain: str  # lower case, keyboard apostrophes and dashes
    glued: bool = False  # to the word before, by a hyphen or apostrophe: `x-ray`, `chef's`


def parse(texts: list[str]) -> list[Modification]:
    """The objects each text adds and removes, by the weights in `retrieval/weights/parser`, on the CPU."""
    return _embedded().parse(texts)


@lru_cache(maxsize=1)
def _embedded() -> Parser:
    return load_parser(_EMBEDDED, torch.device("cpu"))


def load_parser(folder: Path, device: torch.device) -> Parser:
    """A parser for use; on a CPU that is fast at it, products are taken in 8-bit integers."""
    parser = read_parser(folder)
    return Parser(quickened(parser.model.to(device)), parser.tokenizer)


def read_parser(folder: Path) -> Parser:
    """Read `config.json`, `tokenizer.json` and `model.safetensors`; labels must be those of this module. On the CPU."""
    config_file, tokenizer_file, weights_file = (folder / name for name in FILES)
    for file in (config_file, tokenizer_file, weights_file):
        expect(file.is_file(), file, "a file of a trained parser", "nothing")
    try:
        config = DistilBertConfig(**read_json(config_file))
        labels = tuple(config.id2label[i] for i in range(config.num_labels))
        expect(labels == LABELS, f"{config_file} id2label", LABELS, labels)
        model = new_model(config, seed=0)
        model.load_state_dict({name: tensor.float() for name, tensor in read_weights(weights_file).items()})
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise InputError(f"{folder}: expected the configuration and the weights of one parser, found "
                         f"{str(error).splitlines()[-1].strip()}") from error
    return Parser(model, read_tokenizer(tokenizer_file))


def quickened(model: DistilBertForTokenClassification) -> DistilBertForTokenClassification | IntegerTagger:
    """The model for inference, in integers where these are faster."""
    return IntegerTagger(model) if model.device.type == "cpu" and supported() else model


def new_model(config: DistilBertConfig, *, seed: int) -> DistilBertForTokenClassification:
    """A freshly initialised model in evaluation mode; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DistilBertForTokenClassification(config).eval()


class Parser:
    """A token classifier with its tokenizer. Works on the device of the model."""

    def __init__(self, model: DistilBertForTokenClassification | IntegerTagger, tokenizer: Tokenizer) -> None:
        """tokenizer: with [CLS] and [SEP] in its template and a [PAD] token."""
        self.model = model
        self.tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()

    @torch.inference_mode()
    def parse(self, texts: list[str], *, batch: int | None = None) -> list[Modification]:
        """The objects each text adds and removes, in the order of the texts; the same in one batch or many."""
        expect(not isinstance(texts, str), "texts", "a list of texts", "one text")
        for row, text in enumerate(texts):
            expect(isinstance(text, str), f"text in row {row}", "a string", type(text).__name__)
        batch = batch or (_CPU_BATCH * torch.get_num_threads() if self.model.device.type == "cpu" else _GPU_BATCH)
        words = [split_words(text) for text in texts]
        encoded = self.encode(words)
        order = sorted((i for i, ids in enumerate(encoded) if ids), key=lambda i: len(encoded[i].ids))
        found = [Modification()] * len(texts)
        for start in range(0, len(order), batch):
            rows = order[start:start + batch]
            scores, mask = self.scores([encoded[i] for i in rows])
            scores = corrected(scores, [words[i] for i in rows])
            paths = best_paths(scores, mask, glue([words[i] for i in rows], mask))
            for i, path, own in zip(rows, paths.tolist(), scores, strict=True):
                found[i] = modification(texts[i], words[i], one_side_a_list(words[i], path, own))
        return found

    def encode(self, words: list[list[Word]]) -> list[Encoded]:
        """Sub-words of each text; one that is longer than the model's positions is cut after a whole word."""
        plain = [[word.plain[:_LONGEST_WORD] for word in row] for row in words]
        batch = self.tokenizer.encode_batch(plain, is_pretokenized=True)
        encoded = []
        for row, item in enumerate(batch):
            encoded.append(Encoded(item.ids, [-1 if word is None else word for word in item.word_ids])
                           .cut(self.model.config.max_position_embeddings, row))
        return encoded

    def scores(self, encoded: list[Encoded]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the labels of each word (B, W, 5), and which words there are (B, W)."""
        ids, attention, index = padded(encoded, self.tokenizer.token_to_id("[PAD]"), self.model.device)
        logits = self.model(input_ids=ids, attention_mask=attention).logits
        return word_scores(logits, index)


@dataclass(frozen=True)
class Encoded:
    """Sub-word ids of one text and the word each belongs to; -1 for [CLS] and [SEP]."""

    ids: list[int]
    words: list[int]

    def __bool__(self) -> bool:
        return max(self.words, default=-1) >= 0

    def cut(self, longest: int, row: int) -> Encoded:
        """At most `longest` sub-words, [SEP] kept, no word cut in two; warns if something is lost."""
        if len(self.ids) <= longest:
            return self
        warnings.warn(f"text in row {row}: {len(self.ids)} sub-words, only the first {longest} are read", UserWarning,
                      stacklevel=4)
        end = longest - 1
        while end > 1 and self.words[end] == self.words[end - 1]:
            end -= 1
        return Encoded([*self.ids[:end], self.ids[-1]], [*self.words[:end], -1])


def split_words(text: str) -> list[Word]:
    """Words and marks of a text with their places in it. Every character keeps its place."""
    plain = "".join(low if len(low := char.lower()) == 1 else char for char in text.translate(_PLAIN))
    compound = {i for found in _COMPOUND.finditer(plain) for i in range(found.start() + 1, found.end())}
    return [Word(found.start(), found.end(), found[0], found.start() in compound) for found in _WORD.finditer(plain)]


def padded(encoded: list[Encoded], pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and word of each sub-word, each (B, T); the word is -1 where there is none."""
    longest = max(len(item.ids) for item in encoded)
    ids = torch.tensor([item.ids + [pad] * (longest - len(item.ids)) for item in encoded])
    index = torch.tensor([item.words + [-1] * (longest - len(item.words)) for item in encoded])
    attention = torch.tensor([[1] * len(item.ids) + [0] * (longest - len(item.ids)) for item in encoded])
    return ids.to(device), attention.to(device), index.to(device)


def word_scores(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Mean logits over the sub-words of each word, as log-probabilities.

    logits: (B, T, K); index: (B, T), the word of each sub-word or -1. Returns (B, W, K) and (B, W) bool.
    """
    words = int(index.max()) + 1
    slot = torch.where(index < 0, words, index)  # what belongs to no word goes to a slot that is dropped
    total = logits.new_zeros(len(logits), words + 1, logits.shape[-1])
    total.scatter_add_(1, slot[..., None].expand_as(logits), logits)
    count = logits.new_zeros(len(logits), words + 1).scatter_add_(1, slot, torch.ones_like(logits[..., 0]))
    mean = total / count.clamp(min=1)[..., None]
    return mean[:, :words].log_softmax(-1), count[:, :words] > 0


def glue(words: list[list[Word]], mask: Tensor) -> Tensor:
    """Which words are glued to the one before: (B, W) bool, as `mask`."""
    width = mask.shape[1]
    rows = [[word.glued for word in row[:width]] + [False] * (width - len(row)) for row in words]
    return torch.tensor(rows, device=mask.device)


def corrected(scores: Tensor, words: list[list[Word]]) -> Tensor:
    """Scores (B, W, 5) with what is known beforehand: a dash or plus that stands apart is in no name, "and" seldom."""
    width = scores.shape[1]
    doubt = [[(torch.inf if word.plain in _STROKES and not word.glued else _PAIR_DOUBT * (word.plain in _PAIRING))
              for word in row[:width]] + [0.0] * (width - len(row)) for row in words]
    inside = torch.ones(len(LABELS), device=scores.device)
    inside[OUTSIDE] = 0
    less = torch.tensor(doubt, device=scores.device)[..., None].clamp(max=1e4) * inside
    return scores - less


def legal_steps(device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """May label j follow label i? (6, 5) bool between words, row 5 the start; and (5, 5) within a glued compound.

    I-x follows only B-x and I-x. B-x follows only O: between two names stands at least a comma. A compound is
    inside one name or outside all.
    """
    legal = torch.zeros(6, 5, dtype=torch.bool, device=device)
    legal[:, OUTSIDE] = True
    within = torch.zeros(5, 5, dtype=torch.bool, device=device)
    within[OUTSIDE, OUTSIDE] = True
    for side in ("add", "remove"):
        begin, inside = LABELS.index(f"B-{side}"), LABELS.index(f"I-{side}")
        legal[[OUTSIDE, 5], begin] = True
        legal[[begin, inside], inside] = True
        within[[begin, inside], inside] = True
    return legal, within


def best_paths(scores: Tensor, mask: Tensor, glued: Tensor) -> Tensor:
    """The label sequence of highest total score among the legal ones (Viterbi), for all texts at once.

    scores: (B, W, 5) log-probabilities; mask: (B, W) bool, True for words; glued: (B, W) bool, True for a word that
    belongs to the one before. Returns (B, W) labels, O past the end.
    """
    only_outside = scores.new_full((len(LABELS),), -torch.inf)
    only_outside[OUTSIDE] = 0
    scores = torch.where(mask[..., None], scores, only_outside)
    step, within = (torch.where(legal, 0.0, -torch.inf).to(scores) for legal in legal_steps(scores.device))
    total = scores[:, 0] + step[5]
    came_from = []
    for t in range(1, scores.shape[1]):
        cost = torch.where(glued[:, t, None, None], within, step[:5])  # (B, from, to)
        best, origin = (total[:, :, None] + cost).max(dim=1)  # -> (B, to)
        total = best + scores[:, t]
        came_from.append(origin)
    path = [total.argmax(dim=1)]
    for origin in reversed(came_from):
        path.append(origin.gather(1, path[-1][:, None])[:, 0])
    return torch.stack(path[::-1], dim=1)


def one_side_a_list(words: list[Word], path: list[int], scores: Tensor) -> list[int]:
    """The path with the names of every list on one side: the likelier one by their scores together.

    A list is names with nothing between them but commas, "and", "or" and determiners. scores: (W, 5), as `best_paths`.
    """
    path = list(path)
    for names in _lists(words, path):
        if len({side for side, _, _ in names}) > 1:
            add = scores.new_zeros(())
            for _, first, last in names:
                own = scores[first:last + 1]
                add = add + own[0, _ADD] - own[0, _REMOVE] + (own[1:, _ADD + 1] - own[1:, _REMOVE + 1]).sum()
            begin = _ADD if add >= 0 else _REMOVE
            for _, first, last in names:
                path[first:last + 1] = [begin] + [begin + 1] * (last - first)
    return path


def _lists(words: list[Word], path: list[int]) -> list[list[tuple[str, int, int]]]:
    """The names on a path, those of a list together."""
    lists: list[list[tuple[str, int, int]]] = []
    for name in _spans(path[:len(words)]):
        between = {word.plain for word in words[lists[-1][-1][2] + 1:name[1]]} if lists else set()
        if between & _JOINTS and between <= _JOINTS | _DETERMINERS | _QUOTES:
            lists[-1].append(name)
        else:
            lists.append([name])
    return lists


def modification(text: str, words: list[Word], path: list[int]) -> Modification:
    """Cut the labelled names out of the text. path: a label for each word (more are ignored)."""
    found: dict[str, dict[str, str]] = {"add": {}, "remove": {}}
    for side, first, last in _spans(path[:len(words)]):
        inner = trimmed(words[first:last + 1])
        if inner:
            name = text[inner[0].start:inner[-1].end]
            found[side].setdefault(" ".join(word.plain for word in inner), name)
    return Modification(tuple(found["add"].values()), tuple(found["remove"].values()))


def _spans(path: list[int]) -> list[tuple[str, int, int]]:
    """(side, first word, last word) of each name on a legal path."""
    spans: list[tuple[str, int, int]] = []
    for i, label in enumerate(path):
        if LABELS[label].startswith("B-"):
            spans.append((LABELS[label][2:], i, i))
        elif label != OUTSIDE:
            spans[-1] = (*spans[-1][:2], i)
    return spans


def trimmed(words: list[Word]) -> list[Word]:
    """The words of a name without determiners before it and marks, linking words, thanks and 's around it.

    A bracket stays where its partner is in the name: `lamp (small)`.
    """
    first, last = 0, len(words)
    inner = "".join(word.plain for word in words)
    before = _DETERMINERS | _LINKS | _POLITE
    while first < last and (words[first].plain in before or _is_mark(words[first].plain, inner)):
        first += 1
    while first < last and (words[last - 1].plain in _LINKS | _POLITE or _is_mark(words[last - 1].plain, inner)
                            or [word.plain for word in words[last - 2:last]] == ["'", "s"]):
        last -= 1
    return words[first:last]


def _is_mark(word: str, name: str) -> bool:
    partner = {"(": ")", ")": "(", "[": "]", "]": "["}.get(word)
    return not word.isalnum() and not (partner and partner in name)
