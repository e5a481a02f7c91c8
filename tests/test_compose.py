"""Composition in all its ways, against plain loops; the published arithmetic first."""
from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from torch.nn.functional import normalize

from retrieval.compose import (
    PUBLISHED,
    ComposerConfig,
    Statistics,
    compose,
    fit_statistics,
    gallery_vectors,
    onto_span,
)
from retrieval.prompts import PROMPT
from submit.scoring import best_matches

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


# ---- every switch, against one slow reference

OTHER = "one {} alone."
SWITCHES = {"prompts": ((PROMPT,), (PROMPT, OTHER)), "unit": (False, True), "centre_texts": (False, True),
            "centre_images": (False, True), "project": (False, True), "hub_sharpness": (None, 6.0)}


class MoreTexts(Texts):
    def __init__(self, d=6):
        super().__init__(d)
        names = "cat", "red mug", "boat"
        self.rows |= {OTHER.format(n): randn(d, seed=i + 11) * (i + 2) for i, n in enumerate(names)}


def statistics(d=6):
    return Statistics(randn(d, seed=21) / 3, randn(d, seed=22) / 3, normalize(randn(9, d, seed=23), dim=-1))


def text_of(name, config, texts):
    """Mean direction of the templates at their mean length, then the form the config weighs."""
    rows = [texts.rows[t.format(name)].double() for t in config.prompts]
    mean = sum(r / r.norm() for r in rows)
    t = mean / mean.norm() * sum(r.norm() for r in rows) / len(rows)
    return t / t.norm() if config.unit else t


def without_span(x, directions):
    """x minus its part in the span, by Gram and Schmidt."""
    basis = []
    for d in directions:
        for b in basis:
            d = d - (d @ b) * b
        if d.norm() > 1e-9:
            basis.append(d / d.norm())
    part = torch.zeros_like(x)
    for b in basis:
        part = part + (x @ b) * b
    return part


def slow_query(q, more, less, config, known, texts):
    q = q.double() / q.double().norm() if config.unit else q.double()
    centre = known.text_mean.double() if config.centre_texts else 0
    v = q - known.image_mean.double() if config.centre_images else q
    for name in more:
        v = v + config.add_weight * (text_of(name, config, texts) - centre)
    if config.project:
        directions = [text_of(name, config, texts) - known.text_mean.double() for name in less]
        v = v - config.remove_weight * without_span(q - known.image_mean.double(), directions)
    else:
        for name in less:
            v = v - config.remove_weight * (text_of(name, config, texts) - centre)
    return v / v.norm()


def slow_image(d, config, known):
    d = d.double() / d.double().norm() if config.unit else d.double()
    d = d - known.image_mean.double() if config.centre_images else d
    return d / d.norm()


def slow_score(v, d, config, known):
    if config.hub_sharpness is None:
        return v @ d
    s = config.hub_sharpness
    return (v @ d - torch.stack([(s * (u.double() @ d)).exp() for u in known.bank]).mean().log() / s) / 2


@pytest.mark.parametrize("chosen", list(product(*SWITCHES.values())))
def test_every_combination_of_switches_agrees_with_the_slow_reference(chosen):
    config = ComposerConfig(**dict(zip(SWITCHES, chosen, strict=True)), add_weight=1.3, remove_weight=0.6)
    queries, gallery, known, texts = randn(5, 6), randn(8, 6, seed=5) * 2, statistics(), MoreTexts()
    found = compose(queries, ADDED, REMOVED, texts, config, known) @ gallery_vectors(gallery, config, known).T
    slow = [[slow_score(slow_query(q, more, less, config, known, MoreTexts()), slow_image(d, config, known), config,
                        known) for d in gallery] for q, more, less in zip(queries, ADDED, REMOVED, strict=True)]
    torch.testing.assert_close(found.double(), torch.tensor(slow, dtype=torch.float64), atol=2e-5, rtol=0)


def test_every_switch_changes_something():
    """Else the comparison above could agree by doing nothing."""
    queries, gallery, known = randn(5, 6), randn(8, 6, seed=5), statistics()

    def scores(config):
        return compose(queries, ADDED, REMOVED, MoreTexts(), config, known) @ gallery_vectors(gallery, config, known).T

    plain = scores(PUBLISHED)
    changed = {name: values[1] for name, values in SWITCHES.items()} | {"add_weight": 2.0, "remove_weight": 2.0}
    assert changed.keys() == {field.name for field in fields(ComposerConfig)}
    assert all((scores(replace(PUBLISHED, **{name: value})) - plain).abs().max() > 0.01
               for name, value in changed.items())


def test_the_correction_for_hubs_goes_through_the_judge_as_it_is():
    config, known = replace(PUBLISHED, hub_sharpness=4.0), statistics()
    queries, gallery = randn(20, 6), randn(15, 6, seed=5)
    sides = [(ADDED * 4), (REMOVED * 4)]
    scores = [[slow_score(slow_query(q, more, less, config, known, MoreTexts()), slow_image(d, config, known), config,
                          known).item() for d in gallery] for q, more, less in zip(queries, *sides, strict=True)]
    found = best_matches(compose(queries, *sides, MoreTexts(), config, known).numpy(),
                         gallery_vectors(gallery, config, known).numpy())
    assert found.tolist() == torch.tensor(scores).argmax(1).tolist()


def test_a_projection_takes_nothing_for_an_object_that_is_not_there():
    known = Statistics(torch.zeros(2), torch.zeros(2))
    texts = {PROMPT.format("cup"): [0.0, 2.0]}
    found = compose(torch.tensor([[3.0, 0.0], [3.0, 4.0]]), [()] * 2, [("cup",)] * 2,
                    lambda prompts: torch.tensor([texts[p] for p in prompts]), replace(PUBLISHED, project=True), known)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))  # no cup; the cup's share gone


def test_centred_texts_cancel_the_gap_where_sides_are_unequal():
    """Each text = gap + its own direction: centring leaves only the direction, whatever the numbers of objects."""
    gap, own = torch.tensor([0.0, 0.0, 5.0]), torch.tensor([1.0, 0.0, 0.0])
    found = compose(torch.tensor([[0.0, 1.0, 0.0]]), [("hat",)], [()], lambda prompts: (gap + own)[None],
                    replace(PUBLISHED, centre_texts=True), Statistics(text_mean=gap))
    torch.testing.assert_close(found, normalize(torch.tensor([[1.0, 1.0, 0.0]]), dim=-1))


def test_names_that_mean_the_same_span_one_direction():
    same = torch.tensor([[[1.0, 0.0, 0.0], [1.0, 1e-5, 0.0]]])
    torch.testing.assert_close(onto_span(torch.tensor([[3.0, 4.0, 5.0]]), same), torch.tensor([[3.0, 0.0, 0.0]]),
                               atol=1e-3, rtol=0)
    assert torch.equal(onto_span(torch.ones(2, 3), torch.zeros(2, 0, 3)), torch.zeros(2, 3))


def test_one_batch_or_many_compose_alike():
    queries, known = randn(5, 6), statistics()
    config = ComposerConfig(unit=True, centre_texts=True, centre_images=True, project=True, hub_sharpness=3.0)
    whole = compose(queries, ADDED, REMOVED, MoreTexts(), config, known)
    parts = [compose(queries[i:i + 1], ADDED[i:i + 1], REMOVED[i:i + 1], MoreTexts(), config, known) for i in range(5)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [PUBLISHED, ComposerConfig(project=True, hub_sharpness=3.0)])
def test_nothing_composes_to_nothing(config):
    assert compose(torch.zeros(0, 6), [], [], Texts(), config, statistics()).shape == (0, 6 + 2 * (config != PUBLISHED))
    assert gallery_vectors(torch.zeros(0, 6), config, statistics()).shape == (0, 6 + 2 * (config != PUBLISHED))


@pytest.mark.parametrize("unit", [False, True])
def test_statistics_are_means_and_composed_requests_of_the_training_data(unit):
    config = ComposerConfig(unit=unit, hub_sharpness=5.0, centre_texts=True, centre_images=True)
    images, texts, names = randn(5, 6), MoreTexts(), ["cat", "boat"]
    found = fit_statistics(config, images, names, ADDED, REMOVED, texts)
    torch.testing.assert_close(found.text_mean.double(), sum(text_of(n, config, texts) for n in names) / 2)
    torch.testing.assert_close(found.image_mean, (normalize(images, dim=-1) if unit else images).mean(0))
    slow = [slow_query(*row, config, found, texts) for row in zip(images, ADDED, REMOVED, strict=True)]
    torch.testing.assert_close(found.bank.double(), torch.stack(slow), atol=1e-5, rtol=0)
    assert fit_statistics(replace(config, hub_sharpness=None), images, names, ADDED, REMOVED, texts).bank is None


@pytest.mark.parametrize(("config", "missing"), [
    (ComposerConfig(centre_texts=True), "centre_texts: expected a text_mean"),
    (ComposerConfig(centre_images=True), "centre_images: expected a image_mean"),
    (ComposerConfig(project=True), "project: expected a text_mean"),
])
def test_a_config_without_its_statistics_is_refused(refuses, config, missing):
    with refuses(f"statistics of the composer, {missing} from training data, found none"):
        compose(randn(5, 6), ADDED, REMOVED, Texts(), config)


def test_a_gallery_without_its_bank_is_refused(refuses):
    with refuses("statistics of the composer, hub_sharpness: expected a bank from training data, found none"):
        gallery_vectors(randn(5, 6), ComposerConfig(hub_sharpness=2.0))


@pytest.mark.parametrize(("settings", "message"), [
    ({"prompts": ()}, r"prompts: expected templates with one \{\} each, found \(\)"),
    ({"prompts": ("a photo",)}, r"prompts: expected templates with one \{\} each, found \('a photo',\)"),
    ({"add_weight": -1.0}, "add_weight: expected a finite number >= 0, found -1.0"),
    ({"remove_weight": float("nan")}, "remove_weight: expected a finite number >= 0, found nan"),
    ({"hub_sharpness": 0.0}, "hub_sharpness: expected a finite number > 0, or None, found 0.0"),
])
def test_senseless_settings_are_refused(refuses, settings, message):
    with refuses(f"ComposerConfig.{message}"):
        ComposerConfig(**settings)
