"""Tests of what holds for every selector, and of the selectors that use positions only."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kvcore.errors import NonFiniteError
from kvcore.plan import SELECTORS, Selection, Selector
from kvcore.tensors.select import needs_importance, needs_keys, needs_seeds, select, select_sample
from tests.support.selection_batches import HEAD_DIM, HEADS, TOKENS, random_batch


def selection(selector: Selector = "r_kv", budget=3, **fields):
    return Selection(selector=selector, budget=0 if selector == "full" else budget, **fields)


def seeds(batch):
    return torch.arange(batch) * 12345


def choose(wanted, candidates_BN, k_BLHTD, importance_BLHT, seeds_B=None):
    """Positions selected for one layer, or for all layers together if the scope is the sample."""
    if wanted.scope == "sample" and needs_keys(wanted):
        return select_sample(wanted, candidates_BN, k_BLHTD, importance_BLHT)
    seeds_B = seeds(len(candidates_BN)) if seeds_B is None else seeds_B
    return select(wanted, candidates_BN, k_BLHTD[:, 0], importance_BLHT[:, 0], seeds_B=seeds_B)


def arange(count):
    return torch.arange(count)[None]


# ---------------------------------------------------------------------------------------------------- every selector


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("scope", ["head", "layer", "sample"])
def test_only_candidates_are_read_and_selected(selector, scope):
    candidates_BN, k_BLHTD, importance_BLHT = random_batch(4)
    outside = torch.ones(4, TOKENS, dtype=torch.bool).scatter(1, candidates_BN, value=False)
    wanted = selection(selector, scope=scope)
    before = choose(wanted, candidates_BN, k_BLHTD, importance_BLHT)
    k_BLHTD = k_BLHTD.masked_fill(outside[:, None, None, :, None], math.nan)
    importance_BLHT = importance_BLHT.masked_fill(outside[:, None, None, :], math.inf)
    assert torch.equal(choose(wanted, candidates_BN, k_BLHTD, importance_BLHT), before)
    for item in range(4):
        assert set(before[item].flatten().tolist()) <= set(candidates_BN[item].tolist())


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("scope", ["head", "layer", "sample"])
def test_selection_does_not_depend_on_the_batch(selector, scope):
    candidates_BN, k_BLHTD, importance_BLHT = random_batch(5)
    wanted = selection(selector, scope=scope)
    batched = choose(wanted, candidates_BN, k_BLHTD, importance_BLHT)
    for item in range(5):
        row = slice(item, item + 1)
        alone = choose(wanted, candidates_BN[row], k_BLHTD[row], importance_BLHT[row], seeds(5)[row])
        assert torch.equal(alone, batched[row])


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(("scope", "groups"), [("head", HEADS), ("layer", 1), ("sample", 1)])
@pytest.mark.parametrize(("candidates", "budget"), [(0, 2), (1, 1), (2, 5), (8, 1), (8, 7), (8, 8)])
def test_positions_are_int32_ascending_and_up_to_the_budget(selector, scope, groups, candidates, budget):
    candidates_BN, k_BLHTD, importance_BLHT = random_batch(2)
    wanted = selection(selector, scope=scope, budget=budget)
    positions = choose(wanted, candidates_BN[:, :candidates], k_BLHTD, importance_BLHT)
    slots = candidates if selector == "full" else min(budget, candidates)
    assert positions.dtype == torch.int32
    assert positions.shape == (2, groups, slots)
    assert bool((positions.diff(dim=-1) > 0).all())


@pytest.mark.parametrize("selector", ["r_kv", "keydiff"])
def test_ties_go_to_the_earlier_token(selector):
    keys = torch.ones(1, HEADS, 64, HEAD_DIM)
    keys[:, :, 40] = -1.0
    wanted = selection(selector, scope="head", budget=5, importance_weight=0.0)
    assert select(wanted, arange(64), keys, None).tolist() == [[[0, 1, 2, 3, 40]] * HEADS]


@pytest.mark.parametrize("selector", ["r_kv", "r_kv_centred", "keydiff"])
@pytest.mark.parametrize("scope", ["head", "layer", "sample"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_keys_raise_with_their_rows(selector, scope, bad):
    candidates_BN, k_BLHTD, importance_BLHT = random_batch(4)
    k_BLHTD[1, 0, 1, candidates_BN[1, 0], 3] = bad
    with pytest.raises(NonFiniteError, match=r"batch items \[1\]") as caught:
        choose(selection(selector, scope=scope), candidates_BN, k_BLHTD, importance_BLHT)
    assert caught.value.rows == [1]


def test_required_inputs_of_each_selector():
    assert [name for name in SELECTORS if needs_keys(selection(name))] == ["r_kv", "r_kv_centred", "keydiff"]
    assert [name for name in SELECTORS if needs_importance(selection(name))] == ["r_kv", "r_kv_centred"]
    assert [name for name in SELECTORS if needs_seeds(selection(name))] == ["random"]
    assert not needs_importance(selection("r_kv", importance_weight=0.0))


# ---------------------------------------------------------------------------------------------------- by position


@pytest.mark.parametrize(
    ("selector", "budget", "expected"),
    [
        ("full", 0, [2, 3, 5, 7, 11, 13]),
        ("right", 2, [11, 13]),
        ("right", 1, [13]),
        ("uniform", 2, [2, 13]),
        ("uniform", 3, [2, 7, 13]),
        ("uniform", 5, [2, 3, 7, 11, 13]),
        ("uniform", 1, [13]),
    ],
)
def test_selection_by_position(selector, budget, expected):
    candidates_BN = torch.tensor([[2, 3, 5, 7, 11, 13]])
    positions = select(selection(selector, budget), candidates_BN, torch.randn(1, 1, TOKENS, HEAD_DIM), None)
    assert positions.tolist() == [[expected]]


@pytest.mark.parametrize("candidates", [5, 17, 64])
@pytest.mark.parametrize("budget", [2, 3, 4, 5])
def test_uniform_selects_first_and_last_with_even_gaps(candidates, budget):
    keys = torch.zeros(1, 1, candidates, 1)
    places = select(selection("uniform", budget), arange(candidates), keys, None).flatten().tolist()
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert (places[0], places[-1]) == (0, candidates - 1)
    assert max(gaps) - min(gaps) <= 1
