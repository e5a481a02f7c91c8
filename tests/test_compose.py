"""Embedding arithmetic, against plain loops."""
import pytest
import torch
from torch.nn.functional import normalize

from retrieval.compose import PROMPT, compose

ADDED = [("cat",), (), ("cat", "red mug", "cat"), (), ("boat",)]
REMOVED = [("red mug",), (), ("boat",), ("cat", "boat"), ()]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Texts:
    """A text encoder of fixed random rows that remembers what it was asked."""

    def __init__(self, d=6):
        self.rows = {PROMPT.format(n): randn(d, seed=i + 1) * (i + 1) for i, n in enumerate(("cat", "red mug", "boat"))}
        self.calls = []

    def __call__(self, prompts):
        self.calls.append(list(prompts))
        return torch.stack([self.rows[p] for p in prompts])


def by_loop(queries, added, removed, texts):
    found = []
    for q, more, less in zip(queries, added, removed, strict=True):
        v = q.clone()
        for name in more:
            v = v + texts.rows[f"a photo of a {name}."]
        for name in less:
            v = v - texts.rows[f"a photo of a {name}."]
        found.append(v / v.norm())
    return torch.stack(found)


def test_compose_agrees_with_the_loop():
    queries, texts = randn(5, 6), Texts()
    torch.testing.assert_close(compose(queries, ADDED, REMOVED, texts), by_loop(queries, ADDED, REMOVED, Texts()))


def test_each_distinct_object_is_encoded_once():
    texts = Texts()
    compose(randn(5, 6), ADDED, REMOVED, texts)
    assert len(texts.calls) == 1 and sorted(texts.calls[0]) == sorted(texts.rows)


def test_a_worked_example():
    texts = {"a photo of a hat.": [0.0, 3.0], "a photo of a cup.": [1.0, 0.0]}
    found = compose(torch.tensor([[5.0, 0.0]]), [("hat",)], [("cup",)],
                    lambda prompts: torch.tensor([texts[p] for p in prompts]))
    torch.testing.assert_close(found, torch.tensor([[0.8, 0.6]]))  # (5 - 1, 3) / 5


def test_without_objects_the_query_comes_back_at_unit_length_and_no_text_is_encoded():
    queries, texts = randn(3, 6), Texts()
    torch.testing.assert_close(compose(queries, [()] * 3, [()] * 3, texts), normalize(queries, dim=-1))
    assert texts.calls == []


def test_compose_leaves_its_input_alone():
    queries = randn(5, 6)
    before = queries.clone()
    compose(queries, ADDED, REMOVED, Texts())
    assert torch.equal(queries, before)


@pytest.mark.parametrize(("side", "added", "removed"), [("added", [()], [(), ()]), ("removed", [(), ()], [()])])
def test_names_and_queries_must_match_in_number(refuses, side, added, removed):
    with refuses(f"{side}: expected 2 tuples of names, one a query, found 1"):
        compose(randn(2, 6), added, removed, Texts())
