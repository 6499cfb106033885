"""Tests of the random selector: uniform, and determined by the seed, the sample's tokens, the layer and the head."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcore.plan import Scope, Selection
from kvcore.tensors.select import select
from kvcore.tensors.selectors.random import draw_scores, sample_seed
from tests.support import naive_selection as naive

HEADS, TOKENS = 3, 20
IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8)


def draw(token_ids, *, seed=0, scope: Scope = "head", layer=0, budget=4, candidates=range(2, 14), keys=0.0):
    """Positions selected for each sample, given its token ids. All samples have the same candidates."""
    candidates_BN = torch.tensor([list(candidates)] * len(token_ids))
    k_BHTD = torch.full((len(token_ids), HEADS, TOKENS, 4), keys)
    seeds_B = torch.tensor([sample_seed(seed, ids) for ids in token_ids])
    wanted = Selection(selector="random", budget=budget, scope=scope, seed=seed)
    return select(wanted, candidates_BN, k_BHTD, None, layer=layer, seeds_B=seeds_B).tolist()


def naive_draw(ids, *, seed, scope, layer, budget, candidates):
    choosers = {"head": [layer * HEADS + head for head in range(HEADS)], "layer": [layer], "sample": [0]}[scope]
    scores = [naive.random_scores(seed, ids, chooser, len(candidates)) for chooser in choosers]
    return [naive.best(one, list(candidates), budget) for one in scores]


def test_generator_matches_published_splitmix64_outputs():
    # The first published outputs of SplitMix64 with seed 0.
    assert naive.splitmix64(0, 3) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    found = draw_scores(torch.zeros(1, dtype=torch.int64), torch.arange(2), 3)
    for chooser in range(2):
        expected = naive.splitmix64(naive.splitmix64(0, 2)[chooser], 3)
        assert [word % naive.WORD for word in found[0, chooser].tolist()] == expected


@given(IDS, st.integers(0, 2**63 - 1), st.sampled_from(["head", "layer", "sample"]), st.integers(0, 90))
def test_selection_is_determined_by_seed_tokens_layer_and_head(ids, seed, scope, layer):
    expected = naive_draw(ids, seed=seed, scope=scope, layer=layer, budget=4, candidates=range(2, 14))
    assert draw([ids], seed=seed, scope=scope, layer=layer) == [expected]


@pytest.mark.parametrize("scope", ["head", "layer", "sample"])
def test_selection_does_not_depend_on_batch_order_or_keys(scope):
    samples = [[1, 2, 3], [4, 5], [1, 2, 4], [3, 2, 1]]
    together = draw(samples, scope=scope)
    assert draw(samples[::-1], scope=scope) == together[::-1]
    assert [draw([ids], scope=scope, keys=1.0)[0] for ids in samples] == together
    assert len({str(positions) for positions in together}) == len(samples)


def test_layers_and_heads_draw_independently_within_their_scope():
    by_scope = {
        scope: [draw([[7, 8]], scope=scope, layer=layer)[0] for layer in range(4)] for scope in ("head", "layer")
    }
    assert [len(positions) for positions in by_scope["layer"]] == [1] * 4
    for layers in by_scope.values():
        drawn = [str(positions) for layer in layers for positions in layer]
        assert len(set(drawn)) == len(drawn)
    by_sample = [draw([[7, 8]], scope="sample", layer=layer)[0] for layer in range(4)]
    assert by_sample == [by_sample[0]] * 4


def test_different_seeds_draw_different_tokens():
    assert len({str(draw([[7, 8]], seed=seed)) for seed in range(20)}) == 20


@pytest.mark.parametrize("scope", ["head", "layer", "sample"])
def test_all_pairs_of_tokens_are_equally_likely(scope):
    samples = [[sample] for sample in range(3000)]
    drawn = draw(samples, scope=scope, budget=2, candidates=range(6))
    heads = len(drawn[0])
    for head in range(heads):
        counts = Counter(tuple(positions[head]) for positions in drawn)
        assert set(counts) == set(itertools.combinations(range(6), 2))
        expected = len(samples) / len(counts)
        chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
        assert chi_square < 36.1  # 14 degrees of freedom, p = 0.001


def test_heads_draw_independently():
    drawn = draw([[sample] for sample in range(3000)], budget=1, candidates=range(4))
    counts = Counter((positions[0][0], positions[1][0]) for positions in drawn)
    expected = 3000 / 16
    assert (
        sum((count - expected) ** 2 / expected for count in counts.values()) < 37.7
    )  # 15 degrees of freedom, p = 0.001
    assert len(counts) == 16
