"""Object embeddings from prompts, against loops; texts that are encoded once."""
import pytest
import torch
from torch.nn.functional import cosine_similarity

from retrieval.encoder import load_encoder
from retrieval.prompts import ENSEMBLE, PROMPT, TextCache, object_embeddings


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Texts:
    """A text encoder that gives any prompt a fixed random row of its own, and remembers what it was asked."""

    def __init__(self, d=6, salt=0):
        self.d, self.salt, self.calls = d, salt, []

    def row(self, prompt):
        seed = sum(ord(c) * 31**i for i, c in enumerate(prompt)) % 2**31 + self.salt
        return randn(self.d, seed=seed) * (1 + len(prompt) % 5)

    def __call__(self, prompts):
        self.calls.append(list(prompts))
        return torch.stack([self.row(p) for p in prompts]) if prompts else torch.zeros(0, self.d)


def test_one_template_gives_the_raw_embedding_itself():
    texts = Texts()
    found = object_embeddings(["cat", "red mug"], texts)
    assert torch.equal(found, torch.stack([texts.row("a photo of a cat."), texts.row("a photo of a red mug.")]))


def test_an_ensemble_is_the_mean_direction_at_the_mean_length():
    texts, names = Texts(), ["cat", "red mug", "boat"]
    found = object_embeddings(names, texts, ENSEMBLE)
    assert len(texts.calls) == 1
    for name, vector in zip(names, found, strict=True):
        rows = [texts.row(t.format(name)).double() for t in ENSEMBLE]
        mean = sum(r / r.norm() for r in rows) / len(rows)
        length = sum(r.norm() for r in rows) / len(rows)
        torch.testing.assert_close(vector.double(), mean / mean.norm() * length, atol=1e-5, rtol=1e-5)


def test_templates_that_agree_change_nothing():
    torch.testing.assert_close(object_embeddings(["cat"], Texts(), [PROMPT] * 3), object_embeddings(["cat"], Texts()))


def test_no_names_give_no_rows():
    assert object_embeddings([], Texts()).shape == object_embeddings([], Texts(), ENSEMBLE).shape == (0, 6)


def test_the_ensemble_has_different_templates_with_one_place_for_the_name():
    assert 5 <= len(set(ENSEMBLE)) == len(ENSEMBLE) <= 10 and PROMPT in ENSEMBLE
    assert all(t.count("{}") == 1 for t in ENSEMBLE)


def test_each_prompt_is_encoded_once_across_calls_and_new_ones_together():
    texts = Texts()
    cache = TextCache(texts)
    first = cache(["a", "b", "a"])
    second = cache(["c", "b", "d", "c"])
    assert texts.calls == [["a", "b"], ["c", "d"]]
    assert torch.equal(first, torch.stack([texts.row(p) for p in "aba"]))
    assert torch.equal(second, torch.stack([texts.row(p) for p in "cbdc"]))
    cache(["a", "d"])
    assert len(texts.calls) == 2
    assert cache([]).shape == (0, 6)


def test_the_memory_is_bounded_and_forgets_what_was_asked_longest_ago():
    texts = Texts()
    cache = TextCache(texts, limit=3)
    cache(["a", "b", "c"])
    cache(["a"])
    assert torch.equal(cache(["d"])[0], texts.row("d")) and len(cache) == 3
    cache(["a", "c", "d"])
    assert texts.calls == [["a", "b", "c"], ["d"]]  # b was forgotten, the others not
    cache(["b"])
    assert texts.calls[-1] == ["b"]


@pytest.mark.parametrize("limit", [0, 1, 4])
def test_a_call_for_more_than_the_memory_holds_is_answered_all_the_same(limit):
    texts = Texts()
    cache = TextCache(texts, limit=limit)
    assert torch.equal(cache(list("abcdef")), torch.stack([texts.row(p) for p in "abcdef"]))
    assert len(cache) == limit


def test_two_encoders_never_share_a_row():
    one, other = TextCache(Texts()), TextCache(Texts(salt=1))
    assert not torch.equal(one(["a"]), other(["a"])) and torch.equal(other(["a"])[0], Texts(salt=1).row("a"))


def test_what_is_kept_is_not_what_was_given_out():
    cache = TextCache(Texts())
    cache(["a"]).zero_()
    assert torch.equal(cache(["a"])[0], Texts().row("a"))


def test_a_forgotten_batch_leaves_the_memory():
    cache = TextCache(Texts(), limit=1)
    cache(list("abcdef"))
    assert all(row.untyped_storage().nbytes() == row.nbytes for row in cache._rows.values())


def test_a_negative_limit_is_refused(refuses):
    with refuses("TextCache.limit: expected >= 0, found -1"):
        TextCache(Texts(), limit=-1)


def test_the_embedded_encoder_through_the_memory_gives_what_it_gives_alone():
    encoder = load_encoder(device="cpu")
    cache = TextCache(encoder.encode_texts)
    prompts = [PROMPT.format(n) for n in ("red star", "blue ball", "red star")]
    cache(prompts[:1])  # another batch than the one compared with
    torch.testing.assert_close(cache(prompts), encoder.encode_texts(prompts), atol=1e-5, rtol=0)
    assert cosine_similarity(*cache(prompts)[:2], dim=0) < 0.999
