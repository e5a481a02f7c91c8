"""Templates of requests and names of objects, written for this project, in splits that share nothing.

The word lists are plain text in `data/phrases/`: one line is one frame, `[a|b]` is a choice, `<name>` any line of
the section of that name, `{+}` a slot for what is to come and `{-}` for what is to go.
"""
from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from data.errors import expect

SPLITS = ("train", "val", "test")
_FOLDER = Path(__file__).parent / "phrases"
_REQUESTS = ("both", "add only", "remove only", "none")  # the sections that hold whole requests
_PER_FRAME = 250  # a frame with more fillings than this gives a fixed sample of them
_SECTION = re.compile(r"<([^>]*)>")
_CHOICE = re.compile(r"\[([^\]]*)\]")
_APART = re.compile(r" ([,;.?!:])(?= |$)")  # a mark that clings to the word before it
_NO_GERUND = ("let's", "don't", "do not", "also ", "never ", "no longer ", "kindly ", "just ", "go get ", "go fetch ",
              "go find ")
_DOUBLES = {  # longer verbs that double their last letter; short ones follow a rule
    "admit", "allot", "begin", "commit", "corral", "debug", "derez", "dispel", "embed", "enrol", "equip", "expel",
    "forbid", "forget", "input", "inset", "instil", "inter", "offset", "omit", "outfit", "permit", "photoshop",
    "prefer", "readmit", "recrop", "repel", "rerun", "reset", "sidestep", "thanos-snap", "transfer", "typeset",
    "uncrop", "underpin", "unpin", "unplug", "unset", "unwrap", "unzip"}
_IRREGULAR = {"be": "being", "die": "dying", "lie": "lying", "tie": "tying", "untie": "untying", "magic": "magicking",
              "mimic": "mimicking", "panic": "panicking"}


@dataclass(frozen=True)
class Template:
    """A request with slots `{+}` (add) and `{-}` (remove); every slot takes one name or a list of names."""

    text: str
    frame: int  # number of the line it comes from: templates of one frame differ in a word or two

    @property
    def add(self) -> int:
        """Number of add slots."""
        return self.text.count("{+}")

    @property
    def remove(self) -> int:
        """Number of remove slots."""
        return self.text.count("{-}")

    def fits(self, add: int, remove: int) -> bool:
        """True if that many names fill every slot and none is left over."""
        return all(slots <= names and (slots > 0) == (names > 0)
                   for slots, names in ((self.add, add), (self.remove, remove)))


@lru_cache
def templates(split: str) -> tuple[Template, ...]:
    """All request templates of a split, distinct, in a fixed order."""
    book = _sections(split)
    found: dict[str, Template] = {}
    sizes: dict[str, int] = {}
    for frame, line in enumerate(line for name in _REQUESTS for line in book[name]):
        for text in _fillings(line, sizes, book, random.Random(frame)):
            found.setdefault(text, Template(text, frame))
    return tuple(found.values())


@lru_cache
def objects(split: str) -> tuple[str, ...]:
    """All object names of a split, distinct, one to six words each, in a fixed order."""
    lines = _lines(f"objects_{_checked(split)}.txt")
    return tuple(dict.fromkeys(name for line in lines for name in _choices(line)))


@lru_cache
def phrases(split: str, section: str) -> tuple[str, ...]:
    """The phrases of one section, such as `lead` and `tail`: what may stand before and after a request."""
    book = _sections(split)
    expect(section in book, "section", f"one of {sorted(book)}", repr(section))
    return tuple(dict.fromkeys(text for line in book[section] for text in _fillings(line, {}, book, random.Random(0))))


@lru_cache
def word_list(name: str) -> tuple[str, ...]:
    """One of the lists in words.txt that serve all splits; `~` there stands for a blank inside an entry."""
    lists = _read_sections("words.txt")
    return tuple(word.replace("~", " ") for line in lists[name] for word in line.split())


def _checked(split: str) -> str:
    expect(split in SPLITS, "split", f"one of {', '.join(SPLITS)}", repr(split))
    return split


def _lines(name: str) -> list[str]:
    lines = (_FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _read_sections(name: str) -> dict[str, list[str]]:
    """Heading (`== name`) -> the lines below it."""
    book: dict[str, list[str]] = {}
    for line in _lines(name):
        if line.startswith("=="):
            lines = book.setdefault(line.strip("= "), [])
        else:
            lines.append(line)
    return book


@lru_cache
def _sections(split: str) -> dict[str, tuple[str, ...]]:
    """Section name -> its lines; `adding` and `removing` are made from `add` and `remove`."""
    book = _read_sections(f"{_checked(split)}.txt")
    for verb, gerund in (("add", "adding"), ("remove", "removing")):
        book[gerund] = [_gerund(line) for line in book[verb] if not line.startswith(_NO_GERUND)]
    return {name: tuple(lines) for name, lines in book.items()}


def _gerund(clause: str) -> str:
    """`swap {-} out` -> `swapping {-} out`: the -ing form of the first word."""
    verb, blank, rest = clause.partition(" ")
    if verb in _IRREGULAR:
        return f"{_IRREGULAR[verb]}{blank}{rest}"
    if re.search(r"[^aeiouy]e$|[aiou][^aeiou]e$|ue$", verb):
        verb = verb[:-1]
    elif verb in _DOUBLES or re.fullmatch(r"[^aeiou]*(?:qu)?[aeiou][^aeiouwxy]", verb):
        verb += verb[-1]
    return f"{verb}ing{blank}{rest}"


def _choices(line: str) -> list[str]:
    """All readings of a line's `[a|b]`."""
    parts = _CHOICE.split(line)
    options = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return [_tidy("".join(chosen)) for chosen in itertools.product(*options)]


def _tidy(text: str) -> str:
    """One blank between words, none before a mark that clings to its word."""
    return _APART.sub(r"\1", " ".join(text.split()))


def _fillings(line: str, sizes: dict[str, int], book: dict[str, tuple[str, ...]], rng: random.Random) -> list[str]:
    """All texts a line stands for, or a sample of `_PER_FRAME` of them."""
    if _count(line, sizes, book) <= _PER_FRAME:
        return _all_fillings(line, book)
    chosen = dict.fromkeys(_filling(line, book, rng.choice) for _ in range(_PER_FRAME))
    return list(chosen)


def _count(line: str, sizes: dict[str, int], book: dict[str, tuple[str, ...]]) -> int:
    """Number of texts a line stands for, doubles included. sizes: the same of whole sections, filled in here."""
    for name in (names := _SECTION.findall(line)):
        if name not in sizes:
            sizes[name] = sum(_count(inner, sizes, book) for inner in book[name])
    choices = math.prod(part.count("|") + 1 for part in _CHOICE.findall(line))
    return choices * math.prod(sizes[name] for name in names)


def _all_fillings(line: str, book: dict[str, tuple[str, ...]]) -> list[str]:
    found = _SECTION.search(line)
    if not found:
        return _choices(line)
    before, after = line[:found.start()], line[found.end():]
    return [text for inner in book[found[1]] for text in _all_fillings(before + inner + after, book)]


def _filling(line: str, book: dict[str, tuple[str, ...]], choice: Callable) -> str:
    """One text a line stands for, drawn with `choice`."""
    while found := _SECTION.search(line):
        line = line[:found.start()] + choice(book[found[1]]) + line[found.end():]
    return _tidy(_CHOICE.sub(lambda found: choice(found[1].split("|")), line))
