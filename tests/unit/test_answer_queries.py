"""Tests of answer attention from queries that were collected over several prefill passes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvcore.types import Tensor
from teacher_server.engines.vllm.answer_queries import AnswerQueries, Segment

BLOCK_SIZE, QUERY_HEADS, HEADS, DIM = 4, 6, 2, 8
SCALE = DIM**-0.5
LAYERS = ("first", "second")


def answer_of(*tokens: int) -> NDArray[np.int64]:
    return np.array(tokens, dtype=np.int64)


class Request:
    """A prompt with its answer tokens, its blocks, and random queries and keys."""

    def __init__(self, name: str, length: int, answer: NDArray[np.int64], first_block: int) -> None:
        self.name, self.length, self.answer = name, length, answer
        self.layers: frozenset[str] = frozenset(LAYERS)
        count = -(-length // BLOCK_SIZE)
        # Not ascending and not adjacent.
        self.blocks = [first_block + (place * 5) % 7 for place in range(count)]
        generator = torch.Generator().manual_seed(first_block)
        self.query = {layer: torch.randn(length, QUERY_HEADS, DIM, generator=generator) for layer in LAYERS}
        self.key = {layer: torch.randn(length, HEADS, DIM, generator=generator) for layer in LAYERS}

    def segment(self, start: int, end: int) -> Segment:
        """The scheduler's segment, with the blocks of the tokens that are computed so far."""
        return Segment(self.answer, start, end, self.blocks[: -(-end // BLOCK_SIZE)], self.layers)

    def slots(self, start: int, end: int) -> list[int]:
        return [self.blocks[token // BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE for token in range(start, end)]


Part = tuple[Request, int, int]


def compute(queries: AnswerQueries, parts: Sequence[Part], ended: Sequence[str] = ()) -> None:
    """Runs one pass over tokens `start` to `end` of each part."""
    queries.begin(ended)
    for request, start, end in parts:
        if request.answer.size:
            queries.add(request.name, request.segment(start, end))
    slots_T = torch.tensor([slot for request, start, end in parts for slot in request.slots(start, end)])
    for layer in LAYERS:
        if queries.needed:
            queries.observe(layer, torch.cat([request.query[layer][start:end] for request, start, end in parts]))
        queries.keep(layer, slots_T)


def importance_of(
    queries: AnswerQueries, requests: Sequence[Request], layer: str = "first"
) -> tuple[Tensor, Tensor] | None:
    taken = queries.take(layer, [r.name for r in requests], [r.answer for r in requests])
    if taken is None:
        return None
    longest = max(request.length for request in requests)
    k_BHTD = torch.stack(
        [
            torch.cat([r.key[layer], torch.full((longest - r.length, HEADS, DIM), 50.0)]).transpose(0, 1)
            for r in requests
        ]
    )
    return taken.importance(0, k_BHTD, SCALE)


def naive(request: Request, layer: str) -> tuple[list[list[float]], list[list[float]]]:
    """Computes attention by definition in fp64: maximum and mean over query heads, per KV head and token."""
    group = QUERY_HEADS // HEADS
    largest = [[0.0] * request.length for _ in range(HEADS)]
    mean = [[0.0] * request.length for _ in range(HEADS)]
    q, k = request.query[layer].double(), request.key[layer].double()
    for head in range(HEADS):
        for token in request.answer.tolist():
            rows: list[list[float]] = []
            for query in range(head * group, (head + 1) * group):
                weights = [math.exp(SCALE * float(q[token, query] @ k[key, head])) for key in range(token + 1)]
                rows.append([weight / sum(weights) for weight in weights])
            for key in range(token + 1):
                column = [row[key] for row in rows]
                largest[head][key] += max(column) / request.answer.size
                mean[head][key] += sum(column) / group / request.answer.size
    return largest, mean


def assert_exact(queries: AnswerQueries, requests: Sequence[Request]) -> None:
    for layer in LAYERS:
        found = importance_of(queries, requests, layer)
        assert found is not None
        for row, request in enumerate(requests):
            for have_BHT, want in zip(found, naive(request, layer), strict=True):
                have = have_BHT[row]
                torch.testing.assert_close(
                    have[:, : request.length].double(), torch.tensor(want, dtype=torch.float64), atol=1e-6, rtol=0
                )
                assert have[:, request.length :].eq(0).all(), "nobody attends to what pads"


@pytest.fixture
def queries() -> AnswerQueries:
    return AnswerQueries(BLOCK_SIZE)


def test_attention_is_exact_after_one_pass(queries: AnswerQueries) -> None:
    request = Request("a", 11, answer_of(6, 7, 10), 1)
    compute(queries, [(request, 0, 11)])
    assert_exact(queries, [request])


@settings(max_examples=30)
@given(cuts=st.sets(st.integers(1, 15)), other_cuts=st.sets(st.integers(1, 8)))
def test_attention_is_exact_for_prompts_in_any_number_of_passes(cuts: set[int], other_cuts: set[int]) -> None:
    queries = AnswerQueries(BLOCK_SIZE)
    first, second = Request("a", 16, answer_of(3, 9, 10, 15), 1), Request("b", 9, answer_of(2, 8), 20)
    rest = [_parts(second, other_cuts), _parts(first, cuts)]
    while any(rest):
        compute(queries, [parts.pop(0) for parts in rest if parts])
    assert_exact(queries, [first, second])


def _parts(request: Request, cuts: set[int]) -> list[Part]:
    ends = [*sorted(cuts), request.length]
    return [(request, start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def test_requests_without_an_answer_get_zeros_in_a_mixed_batch(queries: AnswerQueries) -> None:
    with_answer, without_answer = Request("a", 7, answer_of(5, 6), 1), Request("b", 12, answer_of(), 20)
    compute(queries, [(without_answer, 0, 12), (with_answer, 0, 7)])
    found = importance_of(queries, [without_answer, with_answer])
    assert found is not None
    assert [x_BHT[0].abs().sum() for x_BHT in found] == [0.0, 0.0]
    torch.testing.assert_close(found[0][1, :, :7].double(), torch.tensor(naive(with_answer, "first")[0]).double())


def test_take_returns_none_if_no_plan_needs_queries(queries: AnswerQueries) -> None:
    without_answer = Request("b", 12, answer_of(), 20)
    compute(queries, [(without_answer, 0, 12)])
    assert not queries.needed
    assert importance_of(queries, [without_answer]) is None


def test_pass_without_answer_tokens_needs_no_queries(queries: AnswerQueries) -> None:
    request = Request("a", 12, answer_of(9), 1)
    compute(queries, [(request, 0, 8)])
    assert not queries.needed
    compute(queries, [(request, 8, 12)])
    assert queries.needed
    assert_exact(queries, [request])


def test_preempted_request_starts_over(queries: AnswerQueries) -> None:
    request = Request("a", 12, answer_of(2, 5, 9), 1)
    compute(queries, [(request, 0, 7)])
    request.blocks = [60, 50, 55]
    compute(queries, [(request, 0, 5)])
    compute(queries, [(request, 5, 12)])
    assert_exact(queries, [request])


def test_missing_queries_raise(queries: AnswerQueries) -> None:
    request = Request("a", 12, answer_of(2, 9), 1)
    # As if the prefix cache held the first tokens.
    compute(queries, [(request, 8, 12)])
    with pytest.raises(RuntimeError, match="queries of the answer are not complete"):
        importance_of(queries, [request])


def test_queries_are_removed_when_taken_and_when_their_request_ends(queries: AnswerQueries) -> None:
    first, second = Request("a", 6, answer_of(5), 1), Request("b", 6, answer_of(5), 20)
    compute(queries, [(first, 0, 6), (second, 0, 6)])
    assert importance_of(queries, [first]) is not None
    with pytest.raises(RuntimeError, match="not complete"):
        importance_of(queries, [first])
    compute(queries, [], ended=["a", "b", "never seen"])
    with pytest.raises(KeyError):
        importance_of(queries, [second])


def test_query_heads_of_other_ranks_are_included(queries: AnswerQueries) -> None:
    request = Request("a", 6, answer_of(5), 1)
    compute(queries, [(request, 0, 6)])
    taken = queries.take("first", ["a"], [request.answer])
    assert taken is not None
    both = taken.with_all_heads(lambda q_bQAD: torch.cat([q_bQAD, 2 * q_bQAD], dim=1))
    assert both.q_bQAD.shape == (1, 2 * QUERY_HEADS, 1, DIM)
    assert both.q_bQAD[0, QUERY_HEADS:, 0].tolist() == (2 * request.query["first"][5]).tolist()
    assert (both.rows, both.answers) == ([0], [[5]])


def test_no_queries_are_kept_for_layers_outside_the_plan() -> None:
    queries, request = AnswerQueries(BLOCK_SIZE), Request("a", 9, np.array([7, 8]), 3)
    request.layers = frozenset({LAYERS[0]})
    compute(queries, [(request, 0, 9)])
    assert importance_of(queries, [request], LAYERS[0]) is not None
    with pytest.raises(RuntimeError, match="not complete"):
        importance_of(queries, [request], LAYERS[1])
