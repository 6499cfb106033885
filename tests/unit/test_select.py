"""Selectors against an independent fp64 reference, item by item."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kvcore.errors import NonFiniteError
from kvcore.plan import SELECTORS, Selection, Selector
from kvcore.select import needs_importance, needs_keys, r_kv_scores, select, select_sample

LAYERS, HEADS, TOKENS, HEAD_DIM = 3, 2, 14, 8


def selection(selector: Selector = "r_kv", budget=3, **fields):
    return Selection(selector=selector, budget=0 if selector == "full" else budget, **fields)


def random_batch(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k_BLHTD = torch.randn(batch, LAYERS, HEADS, TOKENS, HEAD_DIM, generator=generator)
    importance_BLHT = torch.rand(batch, LAYERS, HEADS, TOKENS, generator=generator)
    starts = torch.randint(0, 5, (batch, 1), generator=generator)
    candidates_BN = starts + torch.tensor([0, 1, 2, 3, 5, 6, 7, 9])
    return candidates_BN, k_BLHTD, importance_BLHT


def cosine(a, b):
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def naive_scores(keys, importance, weight):
    """METHODS: lambda*I + (1-lambda)*softmax_i(-mean_j cos(k_i, k_j)), diagonal zeroed; keys [N][D] of one head."""
    count = len(keys)
    means = [sum(cosine(keys[i], keys[j]) for j in range(count) if j != i) / count for i in range(count)]
    exponentials = [math.exp(-mean) for mean in means]
    return [weight * importance[i] + (1 - weight) * exponentials[i] / sum(exponentials) for i in range(count)]


def naive_choice(scores, candidates, budget):
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:budget]
    return sorted(candidates[i] for i in best)


def head_scores(candidates_N, k_HTD, importance_HT, weight):
    """Of every head of one sample's layer, in fp64."""
    return [
        naive_scores(k_TD[candidates_N].double().tolist(), importance_T[candidates_N].double().tolist(), weight)
        for k_TD, importance_T in zip(k_HTD, importance_HT, strict=True)
    ]


def mean_scores(scores):
    return [sum(column) / len(scores) for column in zip(*scores, strict=True)]


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.7, 1.0])
def test_r_kv_scores_equal_the_formula(weight):
    _, k_BLHTD, importance_BLHT = random_batch(1)
    k_HTD, importance_HT = k_BLHTD[0, 0], importance_BLHT[0, 0]
    k_HTD[:, 4] = 0.0  # a zero key is alike to nothing, itself included
    k_HTD[:, 6] = 3.0 * k_HTD[:, 5]  # length does not count
    scores = r_kv_scores(k_HTD[None], importance_HT[None], weight)[0]
    expected = torch.tensor(head_scores(torch.arange(TOKENS), k_HTD, importance_HT, weight), dtype=torch.float64)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weight", [0.0, 0.02, 0.5])
def test_each_head_of_each_sample_keeps_its_own_best_tokens(weight):
    candidates_BN, k_BLHTD, importance_BLHT = random_batch(6)
    wanted = selection(scope="head", importance_weight=weight)
    positions = select(wanted, candidates_BN, k_BLHTD[:, 0], importance_BLHT[:, 0])
    for item, candidates_N in enumerate(candidates_BN):
        scores = head_scores(candidates_N, k_BLHTD[item, 0], importance_BLHT[item, 0], weight)
        expected = [naive_choice(one, candidates_N.tolist(), 3) for one in scores]
        assert positions[item].tolist() == expected


def test_a_layer_keeps_the_tokens_that_are_best_for_its_heads_together():
    candidates_BN, k_BLHTD, importance_BLHT = random_batch(6)
    positions = select(selection(scope="layer"), candidates_BN, k_BLHTD[:, 1], importance_BLHT[:, 1])
    for item, candidates_N in enumerate(candidates_BN):
        scores = head_scores(candidates_N, k_BLHTD[item, 1], importance_BLHT[item, 1], 0.1)
        assert positions[item].tolist() == [naive_choice(mean_scores(scores), candidates_N.tolist(), 3)]


def test_a_sample_keeps_the_tokens_that_are_best_for_all_its_layers_and_heads_together():
    candidates_BN, k_BLHTD, importance_BLHT = random_batch(6)
    positions = select_sample(selection(scope="sample"), candidates_BN, k_BLHTD, importance_BLHT)
    for item, candidates_N in enumerate(candidates_BN):
        scores = [
            scores
            for layer in range(LAYERS)
            for scores in head_scores(candidates_N, k_BLHTD[item, layer], importance_BLHT[item, layer], 0.1)
        ]
        assert positions[item].tolist() == [naive_choice(mean_scores(scores), candidates_N.tolist(), 3)]


def test_r_kv_drops_what_repeats():
    keys = torch.eye(4)[[0, 0, 1, 0, 2]]
    positions = select(selection(scope="head", importance_weight=0.0, budget=2), arange(5), keys[None, None], None)
    assert positions.tolist() == [[[2, 4]]]


def test_r_kv_keeps_what_the_answer_looks_at():
    keys = torch.ones(1, 1, 5, 4)
    importance = torch.tensor([0.0, 0.3, 0.1, 0.4, 0.2])[None, None]
    positions = select(selection(scope="head", budget=2), arange(5), keys, importance)
    assert positions.tolist() == [[[1, 3]]]


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("scope", ["head", "layer", "sample"])
def test_only_candidates_count_and_only_they_are_chosen(selector, scope):
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
def test_a_sample_gets_the_same_tokens_alone_as_in_a_batch(selector, scope):
    candidates_BN, k_BLHTD, importance_BLHT = random_batch(5)
    wanted = selection(selector, scope=scope)
    batched = choose(wanted, candidates_BN, k_BLHTD, importance_BLHT)
    for item in range(5):
        row = slice(item, item + 1)
        assert torch.equal(choose(wanted, candidates_BN[row], k_BLHTD[row], importance_BLHT[row]), batched[row])


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(("scope", "groups"), [("head", HEADS), ("layer", 1), ("sample", 1)])
@pytest.mark.parametrize(("candidates", "budget"), [(0, 2), (1, 1), (2, 5), (8, 1), (8, 7), (8, 8)])
def test_positions_are_int32_ascending_and_as_many_as_fit(selector, scope, groups, candidates, budget):
    candidates_BN, k_BLHTD, importance_BLHT = random_batch(2)
    wanted = selection(selector, scope=scope, budget=budget)
    positions = choose(wanted, candidates_BN[:, :candidates], k_BLHTD, importance_BLHT)
    slots = candidates if selector == "full" else min(budget, candidates)
    assert positions.dtype == torch.int32
    assert positions.shape == (2, groups, slots)
    assert bool((positions.diff(dim=-1) > 0).all())


def test_equal_scores_go_to_the_earlier_token():
    keys = torch.ones(1, HEADS, 64, HEAD_DIM)
    importance = torch.zeros(1, HEADS, 64)
    importance[..., 40] = 1.0
    positions = select(selection(scope="head", budget=5), arange(64), keys, importance)
    assert positions.tolist() == [[[0, 1, 2, 3, 40]] * HEADS]


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
def test_selectors_by_place(selector, budget, expected):
    candidates_BN = torch.tensor([[2, 3, 5, 7, 11, 13]])
    positions = select(selection(selector, budget), candidates_BN, torch.randn(1, 1, TOKENS, HEAD_DIM), None)
    assert positions.tolist() == [[expected]]


@pytest.mark.parametrize("candidates", [5, 17, 64])
@pytest.mark.parametrize("budget", [2, 3, 4, 5])
def test_uniform_includes_first_and_last_and_is_even(candidates, budget):
    keys = torch.zeros(1, 1, candidates, 1)
    places = select(selection("uniform", budget), arange(candidates), keys, None).flatten().tolist()
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert (places[0], places[-1]) == (0, candidates - 1)
    assert max(gaps) - min(gaps) <= 1


def test_scores_are_computed_in_fp32_whatever_the_teachers_dtype():
    _, k_BLHTD, importance_BLHT = random_batch(2)
    k_BHTD, importance_BHT = k_BLHTD[:, 0].bfloat16(), importance_BLHT[:, 0].bfloat16()
    scores = r_kv_scores(k_BHTD, importance_BHT, 0.1)
    assert torch.equal(scores, r_kv_scores(k_BHTD.float(), importance_BHT.float(), 0.1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_name_their_rows(bad):
    candidates_BN, k_BLHTD, importance_BLHT = random_batch(4)
    importance_BLHT[2, 0, 1, candidates_BN[2, 3]] = bad
    with pytest.raises(NonFiniteError, match=r"batch items \[2\]") as caught:
        select(selection(scope="head"), candidates_BN, k_BLHTD[:, 0], importance_BLHT[:, 0])
    assert caught.value.rows == [2]


def test_keys_that_are_not_finite_name_their_rows():
    candidates_BN, k_BLHTD, _ = random_batch(4)
    k_BLHTD[1, 0, 0, candidates_BN[1, 0], 3] = math.inf
    with pytest.raises(NonFiniteError) as caught:
        select(selection(scope="layer", importance_weight=0.0), candidates_BN, k_BLHTD[:, 0], None)
    assert caught.value.rows == [1]


def test_what_a_selection_needs():
    assert [name for name in SELECTORS if needs_keys(selection(name))] == ["r_kv"]
    assert [name for name in SELECTORS if needs_importance(selection(name))] == ["r_kv"]
    assert not needs_importance(selection("r_kv", importance_weight=0.0))


def choose(wanted, candidates_BN, k_BLHTD, importance_BLHT):
    if wanted.scope == "sample":
        return select_sample(wanted, candidates_BN, k_BLHTD, importance_BLHT)
    return select(wanted, candidates_BN, k_BLHTD[:, 0], importance_BLHT[:, 0])


def arange(count):
    return torch.arange(count)[None]
