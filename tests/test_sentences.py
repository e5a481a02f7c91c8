"""Requests name exactly the objects they were given, and their spans say where."""
import itertools
import random
import re

import pytest
import torch

from data.phrasebook import SPLITS, Template, _choices, _sections, objects, templates
from data.sentences import (
    ADD,
    REMOVE,
    _frames,
    labelled_sentence,
    labelled_sentences,
    made_up_word,
    mistyped,
    write_request,
)

NAMES = ["red mug", "set of copper pots", "x-ray machine", "chef's hat", "12-inch ruler", "lamp"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def spanned(sentence, side):
    return [sentence.text[span.start:span.end] for span in sentence.spans if span.side == side]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("p", "n"), [pair for pair in itertools.product(range(4), repeat=2) if any(pair)])
def test_names_stand_literally_in_the_text_and_spans_find_them(split, p, n):
    generator, add, remove = seeded(p * 4 + n), NAMES[:p], NAMES[3:3 + n]
    for _ in range(30):
        sentence = labelled_sentence(add, remove, split=split, generator=generator)
        assert [name.lower() for name in spanned(sentence, ADD)] == add
        assert [name.lower() for name in spanned(sentence, REMOVE)] == remove
        assert [span.start for span in sentence.spans] == sorted(span.start for span in sentence.spans)
        assert not re.search(r"\{|\}|  |<\w", sentence.text), sentence.text


def test_write_request_is_the_text_of_the_labelled_sentence():
    for seed in range(20):
        assert (write_request(["cat"], ["dog"], split="val", generator=seeded(seed))
                == labelled_sentence(["cat"], ["dog"], split="val", generator=seeded(seed)).text)


def test_the_seed_decides_and_the_global_state_is_untouched():
    before = torch.get_rng_state()
    one, same, other = (labelled_sentences(50, "train", generator=seeded(seed), invented=0.3) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("split", SPLITS)
def test_sentences_hold_objects_of_their_split_only(split):
    known = {name.lower() for name in objects(split)}
    for sentence in labelled_sentences(500, split, generator=seeded()):
        names = [name.lower() for side in (ADD, REMOVE) for name in spanned(sentence, side)]
        assert set(names) <= known
        assert len(set(names)) == len(names)  # nobody asks to add what is to go


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_lists_with_one_article(split):
    generator = seeded()
    texts = [labelled_sentence(["cow", "chair", "lamp"], [], split=split, generator=generator).text.lower()
             for _ in range(600)]
    led = [text for text in texts if re.search(r"\b(?:the|a|an) cow\b", text)]
    once = [text for text in led if not re.search(r"\b(?!and|or|plus|also|with|as)\w+ [\"'“`]?(?:chair|lamp)\b", text)]
    assert 0.1 <= len(once) / len(led) <= 0.4


def test_the_share_of_made_up_words():
    known = {word for name in objects("train") for word in name.lower().split()}
    for share, low, high in ((0.0, 0.0, 0.0), (0.3, 0.15, 0.35), (1.0, 0.6, 1.0)):
        names = [name.lower() for sentence in labelled_sentences(1000, "train", generator=seeded(), invented=share)
                 for name in spanned(sentence, ADD)]
        strange = sum(not set(name.split()) <= known for name in names) / len(names)
        assert low <= strange <= high


def test_names_draw_on_the_words_given():
    given = ["zzyx", "qwqw"]
    shares = []
    for words in ((), given):
        names = [name.lower() for sentence in labelled_sentences(500, "train", generator=seeded(), invented=1.0,
                                                                 words=words) for name in spanned(sentence, ADD)]
        shares.append(sum(bool(set(name.split()) & set(given)) for name in names) / len(names))
    assert shares[0] == 0 and 0.4 < shares[1] < 0.9


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_names_have_one_to_six_words_and_end_in_one_that_means_something(share):
    for sentence in labelled_sentences(1500, "train", generator=seeded(2), invented=share, words=["zzyx"]):
        for name in (name.lower() for side in (ADD, REMOVE) for name in spanned(sentence, side)):
            assert 1 <= len(name.split()) <= 6, name
            assert name.split()[-1] not in ("and", "&", "of", "with", "for", "in", "on", "a", "the"), name


def test_mistyped_words_differ_by_one_slip():
    word, seen = "replace", set()
    for seed in range(200):
        typo = mistyped(word, random.Random(seed))
        assert abs(len(typo) - len(word)) <= 1
        if len(typo) == len(word):
            assert sorted(typo) == sorted(word)
        else:
            longer, shorter = sorted((typo, word), key=len, reverse=True)
            assert shorter in {longer[:i] + longer[i + 1:] for i in range(len(longer))}
        seen.add(typo)
    assert {"relpace", "rplace", "repplace"} <= seen


def test_the_training_wording_is_rich():
    assert len({template.frame for template in templates("train")}) >= 1500
    for side, slot in (("add", "{+}"), ("remove", "{-}")):
        clauses = [clause for line in _sections("train")[side]
                   for clause in _choices(line.replace("<scene>", "").replace(slot, ""))]
        assert len({clause.split()[0] for clause in clauses}) >= 200  # verbs
        assert len({" ".join(clause.split()[:2]) for clause in clauses}) >= 400  # with particles


def test_wording_varies():
    generator = seeded()
    texts = [write_request(["cat"], ["dog"], split="train", generator=generator).lower() for _ in range(1000)]
    assert len(set(texts)) > 900
    assert len({text.split()[0] for text in texts}) > 150
    assert 0.3 < sum(text[-1] in ".!?" for text in texts) / 1000 < 0.7
    first = sum(text.index("cat") < text.index("dog") for text in texts) / 1000
    assert 0.3 < first < 0.7  # either side may be named first


def test_counts_cover_one_sided_and_empty_requests():
    counts = {tuple(len(spanned(sentence, side)) for side in (ADD, REMOVE))
              for sentence in labelled_sentences(2000, "val", generator=seeded())}
    assert {(0, 0), (1, 0), (0, 1), (1, 1), (2, 1), (1, 2), (3, 3)} <= counts


def test_made_up_words_are_single_words():
    words = [made_up_word(random.Random(seed), "ing") for seed in range(200)]
    assert all(re.fullmatch(r"[a-z]{3,}ing", word) for word in words)
    assert len(set(words)) > 190


def test_bad_requests_are_refused(refuses):
    with refuses("add and remove: expected at least one name, found none"):
        write_request([], [], split="val", generator=seeded())
    with refuses("add: expected at most three names, found .*'d'"):
        write_request(list("abcd"), [], split="val", generator=seeded())
    with refuses("remove: expected at most three names, found 'lamp'"):
        write_request(["cat"], "lamp", split="val", generator=seeded())
    with refuses("add: expected names with at least one word, found "):
        write_request([" "], [], split="val", generator=seeded())
    with refuses("split: expected one of train, val, test, found 'dev'"):
        write_request(["cat"], [], split="dev", generator=seeded())
    with refuses(r"invented: expected a share in \[0, 1\], found 2"):
        labelled_sentences(1, "val", generator=seeded(), invented=2)


def test_counts_without_a_template_are_refused(refuses, monkeypatch):
    monkeypatch.setattr("data.sentences.templates", lambda split: (Template("add {+}", 0),))
    with refuses(r"templates\('val'\): expected one for 1 to add and 1 to remove, found none"):
        _frames.__wrapped__("val", 1, 1)
