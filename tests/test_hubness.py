"""The correction for hubs, against loops and the unchanged judge: two arrays, cosine, argmax."""
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from retrieval import hubness
from retrieval.hubness import bank_bias, biased_gallery, biased_queries
from submit.scoring import best_matches


def unit(*shape, seed=0):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def bias_by_loop(gallery, bank, s):
    bank = bank.double()
    return [-math.log(sum(math.exp(s * float(u @ d)) for u in bank) / len(bank)) / s for d in gallery.double()]


@pytest.mark.parametrize("s", [0.5, 5.0, 60.0])
def test_bias_agrees_with_the_loop(s, monkeypatch):
    monkeypatch.setattr(hubness, "BLOCK", 4)  # more than one block
    gallery, bank = unit(9, 5), unit(7, 5, seed=1)
    np.testing.assert_allclose(bank_bias(gallery, bank, s), bias_by_loop(gallery, bank, s), atol=1e-5)


def test_a_very_sharp_bias_is_the_nearest_of_the_bank_and_never_overflows():
    gallery, bank = unit(9, 5), unit(7, 5, seed=1)
    torch.testing.assert_close(bank_bias(gallery, bank, 1e5), -(gallery @ bank.T).amax(1), atol=1e-3, rtol=0)


def test_hubs_are_pushed_back():
    bank = normalize(unit(50, 8) + torch.eye(8)[0] * 2, dim=-1)  # requests crowd around one direction
    hub, lone = torch.eye(8)[0], -torch.eye(8)[0]
    bias = bank_bias(torch.stack([hub, lone]), bank, 10.0)
    assert bias[0] < -0.5 and bias[1] > 0.2


def test_the_judges_cosine_orders_as_cosine_plus_bias():
    queries, gallery, bank = unit(40, 6), unit(30, 6, seed=1), unit(25, 6, seed=2)
    bias = bank_bias(gallery, bank, 8.0)
    wanted = (queries.double() @ gallery.double().T + bias.double()).argmax(1)
    plain = (queries @ gallery.T).argmax(1)
    found = best_matches(biased_queries(queries).numpy(), biased_gallery(gallery, bias).numpy())
    assert np.array_equal(found, wanted) and not np.array_equal(found, plain)


def test_both_sides_have_unit_length_and_their_cosine_is_half_the_sum():
    queries, gallery = unit(4, 6), unit(5, 6, seed=1)
    bias = torch.tensor([-1.0, -0.3, 0.0, 0.7, 1.0])  # the whole range
    q, d = biased_queries(queries), biased_gallery(gallery, bias)
    torch.testing.assert_close(q.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(d.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(q @ d.T, (queries @ gallery.T + bias) / 2)


def test_the_bias_stays_in_its_range_where_rounding_would_leave_it():
    same = unit(1, 6).expand(20, 6)
    bias = bank_bias(torch.cat([same[:1], -same[:1]]), same, 3.0)
    assert bias[0] >= -1 and bias[1] <= 1
    torch.testing.assert_close(bias, torch.tensor([-1.0, 1.0]))


def test_an_empty_bank_is_refused_and_an_empty_gallery_has_no_bias(refuses):
    with refuses("bank: expected at least one vector, found none"):
        bank_bias(unit(2, 3), torch.zeros(0, 3), 1.0)
    assert bank_bias(torch.zeros(0, 3), unit(2, 3), 1.0).shape == (0,)
