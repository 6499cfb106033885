"""Tests of KeyDiff, compared with its definition in fp64 for each head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcore.plan import Selection
from kvcore.tensors.select import select, select_sample
from kvcore.tensors.selectors.keydiff import keydiff_scores
from tests.support import naive_selection as naive

LAYERS, HEADS, TOKENS, HEAD_DIM = 2, 3, 12, 6


def random_batch(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k_BLHTD = torch.randn(batch, LAYERS, HEADS, TOKENS, HEAD_DIM, generator=generator)
    candidates_BN = torch.randint(0, 4, (batch, 1), generator=generator) + torch.tensor([0, 1, 2, 4, 5, 7, 8])
    return candidates_BN, k_BLHTD + 0.5


def naive_scores_by_head(candidates_N, k_HTD):
    return [naive.keydiff_scores(k_TD[candidates_N].double().tolist()) for k_TD in k_HTD]


def test_scores_match_the_definition():
    _, k_BLHTD = random_batch(1)
    k_HTD = k_BLHTD[0, 0]
    k_HTD[:, 4] = 0.0  # a zero key has similarity 0 to every key
    k_HTD[:, 6] = 9.0 * k_HTD[:, 5]  # the norm does not matter
    scores = keydiff_scores(k_HTD[None])[0]
    expected = torch.tensor(naive_scores_by_head(torch.arange(TOKENS), k_HTD), dtype=torch.float64)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(keydiff_scores(k_HTD[None].bfloat16()), keydiff_scores(k_HTD[None].bfloat16().float()))


@pytest.mark.parametrize("budget", [1, 3, 6])
def test_each_scope_keeps_the_keys_least_similar_to_the_mean(budget):
    candidates_BN, k_BLHTD = random_batch(5)
    wanted = {scope: Selection(selector="keydiff", budget=budget, scope=scope) for scope in ("head", "layer", "sample")}
    by_head = select(wanted["head"], candidates_BN, k_BLHTD[:, 1], None)
    by_layer = select(wanted["layer"], candidates_BN, k_BLHTD[:, 1], None)
    by_sample = select_sample(wanted["sample"], candidates_BN, k_BLHTD, None)
    for item, candidates_N in enumerate(candidates_BN):
        candidates = candidates_N.tolist()
        first, second = (naive_scores_by_head(candidates_N, k_BLHTD[item, layer]) for layer in range(LAYERS))
        assert by_head[item].tolist() == [naive.best(scores, candidates, budget) for scores in second]
        assert by_layer[item].tolist() == [naive.best(naive.mean_scores(second), candidates, budget)]
        assert by_sample[item].tolist() == [naive.best(naive.mean_scores(first + second), candidates, budget)]


def test_the_most_dissimilar_key_is_kept():
    keys = torch.tensor([[1.0, 0.1], [1.0, 0.0], [-0.2, 1.0], [2.0, 0.1]])
    wanted = Selection(selector="keydiff", budget=1, scope="head")
    assert select(wanted, torch.arange(4)[None], keys[None, None], None).tolist() == [[[2]]]


@given(seed=st.integers(0, 10_000), budget=st.integers(1, 7))
def test_keydiff_equals_r_kv_without_importance_in_head_scope(seed, budget):
    candidates_BN, k_BLHTD = random_batch(2, seed)
    scores = keydiff_scores(k_BLHTD[:, 0].double())
    ranked = scores.sort(dim=-1).values
    if float(ranked.diff(dim=-1).min()) < 1e-5:
        return  # rounding may reorder near ties
    keydiff = Selection(selector="keydiff", budget=budget, scope="head")
    r_kv = Selection(selector="r_kv", budget=budget, scope="head", importance_weight=0.0)
    chosen = [select(wanted, candidates_BN, k_BLHTD[:, 0], None) for wanted in (keydiff, r_kv)]
    assert torch.equal(*chosen)
