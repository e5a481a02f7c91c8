"""The cut vocabulary: known prompts keep their pieces, every other name is spelled, nothing fails."""
import open_clip
import pytest
import torch

from retrieval.vocabulary import BYTE_PIECES, Vocabulary, pieces_used

PROMPTS = ("a photo of a red star.", "a photo of a traffic light.")
STRANGE = ("Zürich cheese-fondue set (x2)", "naïve café sign", "雪だるま", "antidisestablishmentarianism", "", "🎈")


def small(length=24):
    return Vocabulary(pieces_used(PROMPTS), context_length=length)


def spelled(vocabulary, row):
    """The text of a row of ids, through the full table."""
    ids = [vocabulary.kept[i] for i in row.tolist()]
    end = ids.index(vocabulary.bpe.eot_token_id)
    return vocabulary.bpe.decode(ids[1:end]).strip()


def test_the_whole_table_gives_open_clips_own_ids():
    texts = [*PROMPTS, *STRANGE, "long " * 100]
    ours = Vocabulary(None, context_length=77).encode(texts)
    assert torch.equal(ours, open_clip.get_tokenizer("ViTamin-L-384")(texts))


def test_the_cut_table_is_small_and_keeps_the_prompts_whole():
    vocabulary, whole = small(), Vocabulary(None, context_length=24)
    assert BYTE_PIECES < len(vocabulary) < 600
    for ours, full in zip(vocabulary.encode(PROMPTS), whole.encode(PROMPTS), strict=True):
        count = int((full > 0).sum())
        assert [vocabulary.kept[i] for i in ours.tolist()[:count]] == full.tolist()[:count]
        assert not ours[count:].any()


@pytest.mark.parametrize("text", STRANGE)
def test_any_name_is_spelled_by_its_bytes(text):
    vocabulary = small(length=77)
    row = vocabulary.encode([text])[0]
    assert row.max() < len(vocabulary)
    whole = Vocabulary(None, context_length=77)
    assert spelled(vocabulary, row) == spelled(whole, whole.encode([text])[0])


def test_the_end_has_the_highest_id_once_even_when_cut_short():
    rows = small(length=8).encode(["a photo of a very long name of an object", "x"])
    assert rows.shape == (2, 8)
    assert ((rows == len(small()) - 1).sum(1) == 1).all() and rows[0, -1] == len(small()) - 1


def test_a_table_without_byte_pieces_or_ends_is_refused(refuses):
    with refuses("vocabulary: expected the byte pieces first, start and end last, found"):
        Vocabulary([1, 2, 3], context_length=8)
    with refuses("vocabulary: expected the byte pieces first, start and end last, found"):
        Vocabulary(list(range(BYTE_PIECES)), context_length=8)
