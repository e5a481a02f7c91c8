"""The word lists: how many there are, and that the splits share nothing."""
import itertools
import re

import pytest

from data.phrasebook import SPLITS, Template, _choices, _gerund, _sections, objects, phrases, templates, word_list


def test_there_are_enough_distinct_templates_and_frames():
    texts = {template.text for split in SPLITS for template in templates(split)}
    assert len(texts) == sum(len(templates(split)) for split in SPLITS)  # distinct, also between splits
    assert len(texts) >= 600
    frames = [len({template.frame for template in templates(split)}) for split in SPLITS]
    assert sum(frames) >= 600
    assert all(frame >= 100 for frame in frames)


def test_there_are_enough_distinct_objects_of_one_to_six_words():
    names = [name for split in SPLITS for name in objects(split)]
    assert len(set(names)) == len(names) >= 1000
    assert {len(name.split()) for name in names} == {1, 2, 3, 4, 5, 6}
    assert all(name == " ".join(name.split()) for name in names)
    for mark in ("-", "'", "’", "(", " of ", " with ", " and "):
        assert sum(mark in name for name in names) >= 10, mark
    assert sum(any(char.isdigit() for char in name) for name in names) >= 20


def plain(text):
    """Words without case and marks, so that a template does not hide in another split by a comma."""
    return " ".join(re.findall(r"[a-z0-9'+{}-]+", text.lower()))


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SPLITS, 2)))
def test_splits_share_no_template_and_no_object(one, other):
    for kind in (lambda split: [template.text for template in templates(split)], objects):
        assert not {plain(text) for text in kind(one)} & {plain(text) for text in kind(other)}


HELD_OUT = ("val", "test")


@pytest.mark.parametrize("split", HELD_OUT)
def test_the_plainest_wordings_to_learn_from_are_not_held_out(split):
    plainest = {plain(text) for text in phrases("train", "plain")}
    assert len(plainest) >= 50
    assert not plainest & {plain(template.text) for template in templates(split)}


@pytest.mark.parametrize("split", HELD_OUT)
def test_held_out_splits_are_large_enough_to_be_told_apart(split):
    frames = {template.frame: template for template in templates(split)}.values()
    assert len(frames) >= 300
    assert sum(frame.add > 0 and frame.remove > 0 for frame in frames) >= 200
    assert sum(frame.remove == 0 < frame.add for frame in frames) >= 30
    assert sum(frame.add == 0 < frame.remove for frame in frames) >= 30
    assert len(objects(split)) >= 300


@pytest.mark.parametrize("split", HELD_OUT)
def test_names_held_out_are_as_long_as_in_free_requests(split):
    lengths = [min(len(name.split()), 5) for name in objects(split)]
    for length, share in {1: 0.19, 2: 0.21, 3: 0.31, 4: 0.24, 5: 0.05}.items():
        assert lengths.count(length) / len(lengths) == pytest.approx(share, abs=0.05), length


def spelling(name):
    """A name without marks: `tea-light` and `tea light`, `Chef’s` and `chef's` are one name."""
    return " ".join(re.findall("[a-z0-9]+", re.sub("['’]", "", name.lower())))


def test_no_name_stands_in_two_splits_under_another_spelling():
    for one, other in itertools.combinations(SPLITS, 2):
        assert not {spelling(name) for name in objects(one)} & {spelling(name) for name in objects(other)}


def skeletons(split):
    """Lines that join whole clauses with words of their own, as `<add> and then <remove>`."""
    lines = [line.lower() for name in ("both", "add only", "remove only") for line in _sections(split)[name]]
    words = {line: re.sub(r"<[^>]*>", "", line) for line in lines}
    return {" ".join(re.findall(r"<\w+>|[a-z0-9'+{}-]+", line)) for line in lines
            if words[line] != line and re.search("[a-z]{2}", words[line])}


def test_no_skeleton_stands_in_two_splits():
    assert all(len(skeletons(split)) >= 20 for split in HELD_OUT)
    for one, other in itertools.combinations(SPLITS, 2):
        assert not skeletons(one) & skeletons(other)


@pytest.mark.parametrize("split", HELD_OUT)
def test_a_slot_takes_one_thing_many_things_or_a_list(split):
    """No article that wants one thing before a slot, and no verb after it that does."""
    for text in [template.text for template in templates(split)]:
        assert not re.search(r"\b(an?|any|every|some|these|those|another|both|each|one) \{", text), text
        assert not re.search(r"\} (isn't|has|doesn't|needs|becomes|looks|goes|comes|was|stands|gets)\b", text), text


@pytest.mark.parametrize("section", ["add", "remove", "lead", "tail"])
def test_clauses_differ_between_splits_and_not_only_their_filling(section):
    for one, other in itertools.combinations(SPLITS, 2):
        assert not set(phrases(one, section)) & set(phrases(other, section))


@pytest.mark.parametrize("split", SPLITS)
def test_every_template_is_resolved(split):
    for template in templates(split):
        rest = template.text.replace("{+}", "").replace("{-}", "")
        assert not re.search(r"[\[\]{}]|<\w", rest), template.text
        assert "  " not in template.text
        assert template.add + template.remove <= 6


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("add", "remove"), [pair for pair in itertools.product(range(4), repeat=2) if any(pair)])
def test_every_split_fits_every_count(split, add, remove):
    assert sum(template.fits(add, remove) for template in templates(split)) >= 5


def test_a_template_fits_if_every_slot_gets_a_name():
    template = Template("add {+}, {+} and drop {-}", 0)
    assert (template.add, template.remove) == (2, 1)
    fitting = {(p, n) for p in range(4) for n in range(4) if template.fits(p, n)}
    assert fitting == {(p, n) for p in (2, 3) for n in (1, 2, 3)}


def test_choices_are_all_read():
    assert _choices("[a|b] x [c|]") == ["a x c", "a x", "b x c", "b x"]
    assert _choices("take {-} [out|] .") == ["take {-} out.", "take {-}."]


@pytest.mark.parametrize(("clause", "expected"), [
    ("swap {-} out", "swapping {-} out"), ("erase {-}", "erasing {-}"), ("free it", "freeing it"),
    ("add {+}", "adding {+}"), ("unplug {-}", "unplugging {-}"), ("throw {-} out", "throwing {-} out"),
    ("break up", "breaking up"), ("greet {+}", "greeting {+}"), ("equip it", "equipping it"),
    ("see to it", "seeing to it"), ("fix {+}", "fixing {+}"), ("be rid of it", "being rid of it"),
    ("tie {+} on", "tying {+} on"), ("unwrap {+}", "unwrapping {+}")])
def test_gerunds(clause, expected):
    assert _gerund(clause) == expected


def test_unknown_names_are_refused(refuses):
    with refuses("split: expected one of train, val, test, found 'dev'"):
        templates("dev")
    with refuses("split: expected one of train, val, test, found 'dev'"):
        objects("dev")
    with refuses(r"section: expected one of \['add', .*\], found 'head'"):
        phrases("val", "head")


def test_a_blank_can_stand_in_a_listed_word():
    assert "all the" in word_list("determiners")
