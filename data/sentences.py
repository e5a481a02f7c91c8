"""Free-English requests to add and remove named objects, as text or with the place of every name.

A sentence is a template of the phrasebook, its slots filled with lists of names, sometimes with words before and
after it, in varying case and punctuation. Everything is drawn from the caller's generator.
"""
from __future__ import annotations

import itertools
import random
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from data.errors import expect
from data.phrasebook import Template, objects, phrases, templates, word_list

ADD, REMOVE = "add", "remove"
# (add, remove) -> weight; the shares of one, two and three names a side follow what free requests look like.
COUNTS = {(1, 1): 50, (1, 2): 13, (2, 1): 13, (2, 2): 4, (3, 1): 2, (1, 3): 2, (3, 2): 1, (2, 3): 1, (3, 3): 1,
          (1, 0): 3, (0, 1): 3, (2, 0): 2, (0, 2): 2, (3, 0): 1, (0, 3): 1, (0, 0): 1}
# More of what is rare above: else a parser learns that lists are split between the sides, "add a, b and c" included.
EVEN_COUNTS = {(1, 1): 40, (1, 2): 12, (2, 1): 12, (2, 2): 5, (3, 1): 4, (1, 3): 4, (3, 2): 2, (2, 3): 2, (3, 3): 2,
               (1, 0): 5, (0, 1): 5, (2, 0): 4, (0, 2): 4, (3, 0): 3, (0, 3): 3, (0, 0): 2}
_LENGTHS = {1: 20, 2: 22, 3: 31, 4: 27}  # words in a name -> weight; the last stands for four and more
_LEAD, _TAIL = 0.2, 0.15  # share of sentences with words before and after the request
_PLAIN = 0.15  # share of sentences to learn from whose wording is one of the plainest
_ONE_ARTICLE = 0.25  # of the lists to learn from have one at most: else "the cow and chair" would be a name
_QUESTION = re.compile(r"(?:could|can|would|will you|is|are|isn't|do|does|don't you|why|what|how|should|shall|might|"
                       r"may|where|who|won't|couldn't|shouldn't|wouldn't|any|which|must)\b(?!.*[.?!] )", re.IGNORECASE)
_CONNECTORS = {" and ": 60, ", ": 14, ", and ": 6, " as well as ": 4, " plus ": 3, " & ": 3, " or ": 2, "; ": 1,
               " along with ": 2, " and also ": 2, " together with ": 1, " / ": 1}  # before the last one -> weight
_LINKED = ("{} with {}", "{} with a {}", "{} of {}", "{} for {}", "{} in a {}", "{} on the {}", "{} and {} set",
           "{} ({})", "{}-{}", "{}-{} {}")  # names made of several
_PAIRS_KEPT = 0.2  # of names with "and" where words are made up, to learn from: lists of names hold many, requests few
_PLAIN_NAMES = 0.25  # of the sentences to learn from have short names only: else any two nouns with "and" seem one name
_DETERMINED = re.compile(r"\b(?:the|a|an|my|that|this|no|more) $")
_PAIR = re.compile(r" (?:and|&) ")
_VOWEL = re.compile(r"[aeiou]|8|11|18", re.IGNORECASE)


@dataclass(frozen=True)
class Span:
    """One object name in a text: text[start:end]; side is ADD or REMOVE."""

    start: int
    end: int
    side: str


@dataclass(frozen=True)
class LabelledSentence:
    """A request with the spans of its object names in reading order."""

    text: str
    spans: tuple[Span, ...]


def write_request(add: Sequence[str], remove: Sequence[str], *, split: str, generator: torch.Generator) -> str:
    """Ask in free English for exactly these objects, up to three a side and at least one in all.

    The words of a name appear as given, one blank between them; their case may differ. Raises InputError if no
    template of the split fits so many names.
    """
    return labelled_sentence(add, remove, split=split, generator=generator).text


def labelled_sentence(add: Sequence[str], remove: Sequence[str], *, split: str,
                      generator: torch.Generator) -> LabelledSentence:
    """The same as `write_request`, with the span of every name."""
    for side, names in ((ADD, add), (REMOVE, remove)):
        expect(not isinstance(names, str) and len(names) <= 3, side, "at most three names", repr(names))
        expect(all(name.strip() for name in names), side, "names with at least one word", repr(names))
    expect(add or remove, "add and remove", "at least one name", "none")
    return _sentence(tuple(add), tuple(remove), split, _local(generator))


def labelled_sentences(n: int, split: str, *, generator: torch.Generator, invented: float = 0.0,
                       words: Sequence[str] = (), bent: float | None = None,
                       counts: Mapping[tuple[int, int], int] = COUNTS) -> list[LabelledSentence]:
    """n sentences about objects of the split; in a share of the names words are made up or mixed with another name's.

    counts: (names to add, to remove) -> weight. words: English words of any kind that made-up names draw on too.
    bent: share of the sentences in which words of the frame are mistyped or others stand in for them, from `words`
    or made up, so that not every unknown word is a name. None: half of `invented`, and none from `words`.
    """
    expect(0 <= invented <= 1, "invented", "a share in [0, 1]", invented)
    expect(bent is None or 0 <= bent <= 1, "bent", "a share in [0, 1]", bent)
    rng = _local(generator)
    sentences = []
    for p, m in rng.choices(list(counts), list(counts.values()), k=n):
        names = _names(p + m, split, rng, invented, words)
        strange = rng.random() < (invented / 2 if bent is None else bent)
        sentences.append(_sentence(names[:p], names[p:], split, rng, strange, () if bent is None else words))
    return sentences


def _local(generator: torch.Generator) -> random.Random:
    """A fast source of choices, seeded by one draw."""
    return random.Random(int(torch.randint(2**62, (1,), generator=generator)))


# --- names

@lru_cache
def _by_length(split: str) -> dict[int, list[str]]:
    """Number of words (the last: and more) -> names of the split."""
    groups: dict[int, list[str]] = {length: [] for length in _LENGTHS}
    for name in objects(split):
        groups[min(len(name.split()), max(_LENGTHS))].append(name)
    return groups


def _names(n: int, split: str, rng: random.Random, invented: float, words: Sequence[str]) -> tuple[str, ...]:
    """n different names: nobody asks to add what is to go."""
    names: dict[str, None] = {}
    plain = invented > 0 and rng.random() < _PLAIN_NAMES
    while len(names) < n:
        name = rng.choice(_by_length(split)[rng.choice((1, 1, 2))]) if plain else _name(split, rng, invented, words)
        if not (invented and _PAIR.search(name) and rng.random() > _PAIRS_KEPT):
            names[name] = None
    return tuple(names)


def _name(split: str, rng: random.Random, invented: float, strange: Sequence[str]) -> str:
    """An object name; with chance `invented` some words are made up, with smaller chances two or three are mixed."""
    length, = rng.choices(list(_LENGTHS), list(_LENGTHS.values()))
    words = rng.choice(_by_length(split)[length]).split()
    if "and" in words or "&" in words:  # only what the words mean tells such a name from two
        return " ".join(words)
    if rng.random() < invented / 8:
        return " ".join(_linked(split, rng))
    if rng.random() < invented / 2:
        other = rng.choice(objects(split)).split()
        words = (words[:rng.randint(1, len(words))] + other[-rng.randint(1, len(other)):])[:6]
    if rng.random() < invented:
        chosen = rng.sample(range(len(words)), rng.randint(1, len(words)))
        words = [_strange_word(rng, strange) if i in chosen and len(word) > 3 else word for i, word in enumerate(words)]
    while len(words) > 1 and words[-1] in ("and", "&", "of", "with", "for", "in", "on", "a", "the"):
        words.pop()  # left over where a mixed name was cut
    return " ".join(words)


def _linked(split: str, rng: random.Random) -> list[str]:
    """The words of a name that holds short names, with a linking word or mark between them."""
    pattern = rng.choice(_LINKED)
    short = [*_by_length(split)[1], *_by_length(split)[2]]
    words = pattern.format(*(rng.choice(short) for _ in range(pattern.count("{}")))).split()
    return words[:6]


def _strange_word(rng: random.Random, words: Sequence[str]) -> str:
    """One of the given words or, with a smaller chance, a made-up one."""
    return rng.choice(words) if words and rng.random() < 0.65 else made_up_word(rng)


def made_up_word(rng: random.Random, ending: str = "") -> str:
    """A word of one to three syllables that no dictionary holds (or only by chance)."""
    word = rng.choice(word_list("syllable heads"))
    for i in range(rng.choice((1, 1, 2, 2, 2, 3))):
        word += (rng.choice(word_list("syllable joints")) if i else "") + rng.choice(word_list("syllable vowels"))
    word += rng.choice(word_list("syllable ends"))
    return word + ending


# --- frames

@lru_cache
def _frames(split: str, add: int, remove: int) -> tuple[list[list[Template]], list[float]]:
    """Templates that fit these counts, grouped by frame, and running weights of the frames.

    A frame weighs the square root of its number of templates, at most 6: wide ones come more often, without
    drowning the rest.
    """
    fitting = [kind for kind in _kinds(templates(split)).values() if kind[0][1].fits(add, remove)]
    groups: dict[int, list[Template]] = {}
    for _, template in sorted(itertools.chain.from_iterable(fitting), key=lambda item: item[0]):
        groups.setdefault(template.frame, []).append(template)
    expect(groups, f"templates({split!r})", f"one for {add} to add and {remove} to remove", "none")
    return list(groups.values()), list(itertools.accumulate(min(6, len(group) ** 0.5) for group in groups.values()))


@lru_cache
def _plain(add: bool, remove: bool) -> tuple[str, ...]:
    """The plainest wordings of the training split with these sides; each slot takes all names of its side."""
    return tuple(text for text in phrases("train", "plain") if ("{+}" in text, "{-}" in text) == (add, remove))


@lru_cache
def _kinds(found: tuple[Template, ...]) -> dict[tuple[int, int], list[tuple[int, Template]]]:
    """(slots to add, to remove) -> templates of that kind with their numbers."""
    kinds: dict[tuple[int, int], list[tuple[int, Template]]] = {}
    for i, template in enumerate(found):
        kinds.setdefault((template.add, template.remove), []).append((i, template))
    return kinds


@lru_cache
def _verbs(split: str) -> frozenset[str]:
    """First words of commands, before which `could you` may stand."""
    first = {phrase.split()[0] for section in ("add", "remove") for phrase in phrases(split, section)}
    return frozenset(word_list("swapping verbs")) | first


def _frame_text(split: str, add: int, remove: int, rng: random.Random, strange: bool, others: Sequence[str]) -> str:
    """A template with what may stand before and after it; if `strange`, a word in each part is another or mistyped."""
    frames, weights = _frames(split, add, remove)
    plain = _plain(add > 0, remove > 0) if split == "train" else ()
    text = rng.choice(plain) if plain and rng.random() < _PLAIN else \
        rng.choice(rng.choices(frames, cum_weights=weights)[0]).text
    if strange and add and remove:
        text = _with_strange_word(text, rng, others)
    extras = []
    for section, share in (("lead", _LEAD), ("tail", _TAIL)):
        extra = rng.choice(phrases(split, section)) if rng.random() < share else ""
        extras.append(_with_strange_word(extra, rng, others) if strange else extra)
    lead, tail = extras
    command = text.split()[0] in _verbs(split)
    if lead and (command or lead[-1] in ",:"):
        text = f"{lead} {text}"
    return text + ("" if not tail or text[-1] in ".?!" else tail if tail[0] in ",.!" else f" {tail}")


def _with_strange_word(text: str, rng: random.Random, others: Sequence[str]) -> str:
    """Replace one longer word by a made-up one with the same ending or one of the others, or mistype it."""
    longer = list(re.finditer(r"[a-z]{4,}", text))
    if longer and rng.random() < 0.35:
        found = longer[0] if others and rng.random() < 0.4 else rng.choice(longer)  # the first one is mostly a verb
        return text[:found.start()] + mistyped(found[0], rng) + text[found.end():]
    kept = word_list("kept words")  # these say which side is which
    words = [found for found in longer if found[0] not in kept]
    if not words:
        return text
    found = rng.choice(words)
    ending = re.search(r"(?:ing|ed|ly|s)?$", found[0])[0]
    other = rng.choice(others) if others and rng.random() < 0.6 else made_up_word(rng, ending)
    return text[:found.start()] + other + text[found.end():]


def mistyped(word: str, rng: random.Random) -> str:
    """A word of at least two letters with a letter left out, doubled or in the place of its neighbour."""
    i = rng.randrange(1, len(word))
    return rng.choice((word[:i] + word[i + 1:], word[:i] + word[i] + word[i:],
                       word[:i - 1] + word[i] + word[i - 1] + word[i + 1:]))


# --- sentences

def _sentence(add: tuple[str, ...], remove: tuple[str, ...], split: str, rng: random.Random, strange: bool = False,
              others: Sequence[str] = ()) -> LabelledSentence:
    """Fill a template and set its case and marks."""
    frame = _frame_text(split, len(add), len(remove), rng, strange, others)
    if rng.random() < 0.15:
        frame = frame.replace("'", "’")
    parts = re.split(r"(\{[+-]\})", frame)
    shares = {"{+}": _shared(add, frame.count("{+}"), rng), "{-}": _shared(remove, frame.count("{-}"), rng)}
    style = rng.choices(("bare", "the", "a", "mixed"), (60, 12, 13, 15))[0]
    pieces: list[tuple[str, str | None]] = []  # text, and the side if it is a name
    for part in parts:
        if part in shares:
            names = [_cased(" ".join(name.split()), rng) for name in shares[part].pop(0)]
            side = ADD if part == "{+}" else REMOVE
            article = "bare" if pieces and _DETERMINED.search(pieces[-1][0]) else style
            once = split == "train" and rng.random() < _ONE_ARTICLE
            pieces += _listed(names, side, article, rng, once)
        else:
            pieces.append((part, None))
    return _joined(_marked(pieces, rng), rng)


def _shared(names: tuple[str, ...], slots: int, rng: random.Random) -> list[tuple[str, ...]]:
    """Deal names out to slots in order, at least one to each."""
    cuts = sorted(rng.sample(range(1, len(names)), slots - 1)) if slots else []
    return [names[i:j] for i, j in itertools.pairwise([0, *cuts, len(names)])]


def _cased(name: str, rng: random.Random) -> str:
    """Most names stay as they are; a few are written Like This, Like this or LIKE THIS."""
    change = rng.choices((str, string.capwords, str.capitalize, str.upper), (88, 5, 5, 2))[0]
    return change(name) if len(change(name)) == len(name) else name


def _listed(names: list[str], side: str, style: str, rng: random.Random, once: bool) -> list[tuple[str, str | None]]:
    """Names with articles, or one before the first, and with commas and connectors between them."""
    last = rng.choices(list(_CONNECTORS), list(_CONNECTORS.values()))[0]
    inner = rng.choices((", ", last), (9, 1))[0] if last != "; " else "; "
    pieces: list[tuple[str, str | None]] = []
    if len(names) == 2 and last == " and " and rng.random() < 0.08:
        pieces.append(("both ", None))
    for i, name in enumerate(names):
        if i:
            joint = last if i == len(names) - 1 else inner
            pieces.append((", and " if joint == " and " and len(names) == 3 and rng.random() < 0.4 else joint, None))
        quote = rng.choices(("", '"', "'", "`", "“"), (192, 3, 2, 1, 2))[0]
        article = "" if i and once else _article(name, side, style, rng)
        pieces += [(article + quote, None), (name, side), (quote.replace("“", "”"), None)]
    return pieces


def _article(name: str, side: str, style: str, rng: random.Random) -> str:
    """What stands before a name, with its blank."""
    indefinite = "an " if _VOWEL.match(name) else "a "
    if style == "the":
        return "the "
    if style == "a":
        return indefinite if side == ADD else "the "
    if style == "mixed":
        return rng.choice(("", "", "", "the ", "the ", indefinite, indefinite, indefinite,
                           *(f"{word} " for word in word_list("determiners"))))
    return ""


def _marked(pieces: list[tuple[str, str | None]], rng: random.Random) -> list[tuple[str, str | None]]:
    """Put a closing mark behind the last piece, or none."""
    text = "".join(piece for piece, _ in pieces)
    if text[-1] in ".?!":
        return pieces
    asked = _QUESTION.match(text) is not None
    return [*pieces, (rng.choices(("", ".", "!", "?", "..."), (48, 42, 5, 70 * asked + 0.3, 0.5))[0], None)]


def _joined(pieces: list[tuple[str, str | None]], rng: random.Random) -> LabelledSentence:
    """Join pieces, count out the spans, set the case of the whole."""
    spans, text = [], ""
    for piece, side in pieces:
        if side:
            spans.append(Span(len(text), len(text) + len(piece), side))
        text += piece
    lead = len(text) - len(text.lstrip())
    style = rng.choices(("first", "as it is", "lower", "upper"), (84, 9, 6, 1))[0]
    if style == "first":
        text = text[:lead] + text[lead:lead + 1].upper() + text[lead + 1:]
        text = re.sub(r"(?<=[.?!] )[a-z]", lambda found: found[0].upper(), text)
    elif style != "as it is":
        changed = text.lower() if style == "lower" else text.upper()
        text = changed if len(changed) == len(text) else text
    return LabelledSentence(text, tuple(spans))
