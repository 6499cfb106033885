"""Tests of the R-KV selector: its formula and whole plans on real models, compared with naive fp64 references."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvcore.errors import NonFiniteError
from kvcore.plan import ImportancePool, KVPlan, Selection
from kvcore.tensors.select import select, select_sample
from kvcore.tensors.selectors.r_kv import centred, r_kv_scores
from kvcore.types import Sample, Span
from teacher_server.config import ServeConfig
from teacher_server.engines import load_engine
from teacher_server.engines.base import SPAN_KINDS, LayerResult, PlannedSample, TeacherEngine, TokenizedSample
from tests.support import naive_selection as naive
from tests.support.reference_kv import PlainLayer, load_reference, plain_layers, reference_kv
from tests.support.selection_batches import LAYERS, TOKENS, random_batch
from tests.support.tiny_models import Family, save_tiny_model, tiny_spec


def selection(budget=3, **fields):
    return Selection(selector="r_kv", budget=budget, **fields)


def head_scores(candidates_N, k_HTD, importance_HT, weight):
    """Scores of every head in one layer of one sample, in fp64."""
    return [
        naive.r_kv_scores(k_TD[candidates_N].double().tolist(), importance_T[candidates_N].double().tolist(), weight)
        for k_TD, importance_T in zip(k_HTD, importance_HT, strict=True)
    ]


def arange(count):
    return torch.arange(count)[None]


# ---------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.7, 1.0])
def test_scores_equal_the_formula(weight):
    _, k_BLHTD, importance_BLHT = random_batch(1)
    k_HTD, importance_HT = k_BLHTD[0, 0], importance_BLHT[0, 0]
    k_HTD[:, 4] = 0.0  # a zero key has similarity 0 with every key, including itself
    k_HTD[:, 6] = 3.0 * k_HTD[:, 5]  # the norm does not matter
    scores = r_kv_scores(k_HTD[None], importance_HT[None], weight)[0]
    expected = torch.tensor(head_scores(torch.arange(TOKENS), k_HTD, importance_HT, weight), dtype=torch.float64)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weight", [0.0, 0.02, 0.5])
def test_head_scope_keeps_the_best_tokens_of_each_head(weight):
    candidates_BN, k_BLHTD, importance_BLHT = random_batch(6)
    wanted = selection(scope="head", importance_weight=weight)
    positions = select(wanted, candidates_BN, k_BLHTD[:, 0], importance_BLHT[:, 0])
    for item, candidates_N in enumerate(candidates_BN):
        scores = head_scores(candidates_N, k_BLHTD[item, 0], importance_BLHT[item, 0], weight)
        assert positions[item].tolist() == [naive.best(one, candidates_N.tolist(), 3) for one in scores]


def test_layer_scope_keeps_the_best_tokens_by_the_mean_over_heads():
    candidates_BN, k_BLHTD, importance_BLHT = random_batch(6)
    wanted = selection(scope="layer", importance_weight=0.1)
    positions = select(wanted, candidates_BN, k_BLHTD[:, 1], importance_BLHT[:, 1])
    for item, candidates_N in enumerate(candidates_BN):
        scores = head_scores(candidates_N, k_BLHTD[item, 1], importance_BLHT[item, 1], 0.1)
        assert positions[item].tolist() == [naive.best(naive.mean_scores(scores), candidates_N.tolist(), 3)]


def test_sample_scope_keeps_the_best_tokens_by_the_mean_over_layers_and_heads():
    candidates_BN, k_BLHTD, importance_BLHT = random_batch(6)
    wanted = selection(scope="sample", importance_weight=0.1)
    positions = select_sample(wanted, candidates_BN, k_BLHTD, importance_BLHT)
    for item, candidates_N in enumerate(candidates_BN):
        scores = [
            scores
            for layer in range(LAYERS)
            for scores in head_scores(candidates_N, k_BLHTD[item, layer], importance_BLHT[item, layer], 0.1)
        ]
        assert positions[item].tolist() == [naive.best(naive.mean_scores(scores), candidates_N.tolist(), 3)]


@pytest.mark.parametrize("scope", ["head", "layer", "sample"])
@pytest.mark.parametrize("weight", [0.0, 0.02, 0.5, 1.0])
def test_centred_keys_equal_the_formula_without_the_mean_key_of_each_head(scope, weight):
    candidates_BN, k_BLHTD, importance_BLHT = random_batch(6)
    # As in real models, the keys of a head have much in common.
    k_BLHTD = k_BLHTD + 4.0 * torch.randn(1, LAYERS, k_BLHTD.shape[2], 1, k_BLHTD.shape[4])
    wanted = Selection(selector="r_kv_centred", budget=3, scope=scope, importance_weight=weight)
    if scope == "sample":
        positions = select_sample(wanted, candidates_BN, k_BLHTD, importance_BLHT)
    else:
        positions = select(wanted, candidates_BN, k_BLHTD[:, 1], importance_BLHT[:, 1])
    for item, candidates_N in enumerate(candidates_BN):
        scores = [
            naive.r_kv_scores(naive.centred(k_TD[candidates_N].double().tolist()), importance_T.tolist(), weight)
            for layer in (range(LAYERS) if scope == "sample" else [1])
            for k_TD, importance_T in zip(
                k_BLHTD[item, layer], importance_BLHT[item, layer][:, candidates_N].double(), strict=True
            )
        ]
        choosers = scores if scope == "head" else [naive.mean_scores(scores)]
        assert positions[item].tolist() == [naive.best(one, candidates_N.tolist(), 3) for one in choosers]


def test_a_common_part_of_all_keys_changes_only_scores_that_are_not_centred():
    _, k_BLHTD, _ = random_batch(1)
    k_BHTD = k_BLHTD[:, 0]
    shifted_BHTD = k_BHTD + 10.0
    same = r_kv_scores(centred(k_BHTD), None, 0.0)
    torch.testing.assert_close(r_kv_scores(centred(shifted_BHTD), None, 0.0), same, rtol=1e-4, atol=1e-7)
    spread = r_kv_scores(shifted_BHTD, None, 0.0).std(dim=-1) / r_kv_scores(k_BHTD, None, 0.0).std(dim=-1)
    assert bool((spread < 0.2).all())


def test_identical_keys_are_a_tie_when_centred():
    wanted = Selection(selector="r_kv_centred", budget=2, scope="head", importance_weight=0.0)
    assert select(wanted, arange(5), torch.full((1, 1, 5, 4), 0.1), None).tolist() == [[[0, 1]]]


def test_redundant_tokens_are_dropped():
    keys = torch.eye(4)[[0, 0, 1, 0, 2]]
    positions = select(selection(scope="head", importance_weight=0.0, budget=2), arange(5), keys[None, None], None)
    assert positions.tolist() == [[[2, 4]]]


def test_tokens_with_the_highest_importance_are_kept():
    keys = torch.ones(1, 1, 5, 4)
    importance = torch.tensor([0.0, 0.3, 0.1, 0.4, 0.2])[None, None]
    positions = select(selection(scope="head", budget=2), arange(5), keys, importance)
    assert positions.tolist() == [[[1, 3]]]


def test_scores_are_computed_in_fp32_for_low_precision_kv():
    _, k_BLHTD, importance_BLHT = random_batch(2)
    k_BHTD, importance_BHT = k_BLHTD[:, 0].bfloat16(), importance_BLHT[:, 0].bfloat16()
    scores = r_kv_scores(k_BHTD, importance_BHT, 0.1)
    assert torch.equal(scores, r_kv_scores(k_BHTD.float(), importance_BHT.float(), 0.1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_importance_raises_with_its_rows(bad):
    candidates_BN, k_BLHTD, importance_BLHT = random_batch(4)
    importance_BLHT[2, 0, 1, candidates_BN[2, 3]] = bad
    with pytest.raises(NonFiniteError, match=r"batch items \[2\]") as caught:
        select(selection(scope="head"), candidates_BN, k_BLHTD[:, 0], importance_BLHT[:, 0])
    assert caught.value.rows == [2]


# ---------------------------------------------------------------------------------------------------- whole plans

# Scaled rotary frequencies; norms on queries and keys; a sliding window. Three query heads share a KV head.
FAMILIES: tuple[Family, ...] = ("llama", "qwen3", "mistral")
TEXTS = (
    ("3. ", "3 + 4 = 7, so 0; 0 x 2 = 0. ", "It is 2."),
    ("Größe? ", "思考 🙂 naïve. ", "二"),
    ("Add 4, then 5. ", "7, 0, 2, and so on and so on. ", "2, surely 2."),
    ("1", "2", "34"),
)
POOLS: tuple[ImportancePool, ...] = ("max", "mean")


def make_sample(index: int) -> Sample:
    ends = [0, *itertools.accumulate(map(len, TEXTS[index]))]
    kinds = ("prompt", "reasoning", "answer")
    spans = tuple(Span(kind, ends[at], ends[at + 1]) for at, kind in enumerate(kinds))
    return Sample(f"s{index}", text="".join(TEXTS[index]), spans=spans)


@dataclass(frozen=True, eq=False)
class Teacher:
    """The engine under test, and the same model in fp64."""

    engine: TeacherEngine
    model: PreTrainedModel

    def tokens(self, index: int) -> TokenizedSample:
        return self.engine.tokenize(make_sample(index))

    def places(self, index: int, kind: str) -> list[int]:
        return [at for at, span in enumerate(self.tokens(index).span_ids) if span >= 0 and SPAN_KINDS[span] == kind]

    @cache  # noqa: B019  the module's fixture bounds its lifetime
    def plain(self, index: int, pool: ImportancePool) -> list[tuple[PlainLayer, list[list[float]]]]:
        """The layers of one sample, each with its importance [H][T]."""
        answer = self.places(index, "answer")
        layers = plain_layers(self.model, self.tokens(index).token_ids)
        return [(layer, layer.importance(answer, pool, self.model.config)) for layer in layers]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Teacher]:
    """One teacher per family, created on first use."""

    @cache
    def load(family: Family) -> Teacher:
        spec = tiny_spec(family, layers=2, heads=6, kv_heads=2)
        directory = save_tiny_model(tmp_path_factory.mktemp(family), spec)
        engine = load_engine(ServeConfig(model=str(directory), device="cpu", dtype="fp32"))
        return Teacher(engine, load_reference(directory))

    return load


def run(engine: TeacherEngine, batch: list[PlannedSample]) -> list[list[Any]]:
    """Each sample's positions, layer by layer."""
    found: list[list[Any]] = [[] for _ in batch]

    def emit(result: LayerResult) -> None:
        for at, row in enumerate(result.indices):
            found[row].append(result.positions[at].tolist())

    engine.run(batch, emit, lambda failure: pytest.fail(failure.problem), lambda _row: True)
    return found


def naive_choice(teacher: Teacher, index: int, selection: Selection) -> list[list[list[int]]]:
    """Positions selected per layer by the definition: one list per head, layer or sample, depending on the scope."""
    reasoning = teacher.places(index, "reasoning")
    scores_by_layer = [
        [
            naive.r_kv_scores([k[t] for t in reasoning], [i[t] for t in reasoning], selection.importance_weight)
            for k, i in zip(layer.k, importance, strict=True)
        ]
        for layer, importance in teacher.plain(index, selection.importance_pool)
    ]
    scores_to_select_by = {
        "head": scores_by_layer,
        "layer": [[naive.mean_scores(heads)] for heads in scores_by_layer],
        "sample": [[naive.mean_scores([head for heads in scores_by_layer for head in heads])]] * len(scores_by_layer),
    }[selection.scope]
    for choosers in scores_to_select_by:
        for scores in choosers:
            assert naive.margin(scores, selection.budget) > 1e-6, "too close to call in fp32: choose other texts"
    return [
        [naive.best(scores, reasoning, selection.budget) for scores in choosers] for choosers in scores_to_select_by
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weight", [0.1, 0.8])
@pytest.mark.parametrize("scope", ["head", "layer", "sample"])
def test_padded_batch_of_mixed_plans_matches_the_definition(teachers, family, scope, weight):
    teacher = teachers(family)
    jobs = [
        (index, selection(5, scope=scope, importance_weight=weight, importance_pool=pool))
        for index, pool in itertools.product(range(len(TEXTS)), POOLS)
    ]
    batch = [PlannedSample(teacher.tokens(index), KVPlan(layers=(0, 1), selection=wanted)) for index, wanted in jobs]
    found = run(teacher.engine, batch)
    for (index, wanted), positions in zip(jobs, found, strict=True):
        assert positions == naive_choice(teacher, index, wanted)
    # The last text has fewer tokens than the budget: all are kept, and no more.
    assert found[-1][0][0] == teacher.places(len(TEXTS) - 1, "reasoning")


def test_importance_pools_select_different_tokens(teachers):
    teacher = teachers("llama")
    wanted = [selection(5, scope="head", importance_weight=1.0, importance_pool=pool) for pool in POOLS]
    largest, mean = run(
        teacher.engine, [PlannedSample(teacher.tokens(0), KVPlan(layers=(0, 1), selection=one)) for one in wanted]
    )
    assert largest != mean


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pool", POOLS)
def test_plain_reference_matches_the_models_attention(teachers, family, pool):
    teacher = teachers(family)
    own = reference_kv(teacher.model, teacher.tokens(0).token_ids)
    by_model = own.importance(teacher.places(0, "answer"), pool)
    for index, (layer, importance) in enumerate(teacher.plain(0, pool)):
        by_hand = torch.tensor(importance, dtype=torch.float64)
        # transformers keeps its rotary tables in fp32.
        torch.testing.assert_close(by_hand, by_model[index], rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.tensor(layer.k, dtype=torch.float64), own.k_LHTD[index], rtol=0, atol=1e-5)


def test_plan_without_importance_needs_no_answer(teachers):
    teacher = teachers("qwen3")
    tokens = teacher.engine.tokenize(Sample("q", text="3 + 4 = 7, so 0; 0 x 2", spans=(Span("reasoning", 0, 22),)))
    plan = KVPlan(layers=(0, 1), selection=selection(4, scope="head", importance_weight=0.0))
    (found,) = run(teacher.engine, [PlannedSample(tokens, plan)])
    reasoning = list(range(len(tokens.token_ids)))
    for layer, positions in zip(plain_layers(teacher.model, tokens.token_ids), found, strict=True):
        scores = [naive.r_kv_scores(keys, [0.0] * len(reasoning), 0.0) for keys in layer.k]
        assert positions == [naive.best(one, reasoning, 4) for one in scores]
