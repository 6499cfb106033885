"""Tests of the vLLM engine: it meets the engine contract and matches transformers under any scheduling."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import REGISTRY

from kvcore.plan import CodecSpec, KVPlan, SamplingParams, Selection
from kvcore.tensors.select import needs_keys
from kvcore.types import Sample, Span
from teacher_server.engines.base import LayerResult, PlannedSample, TeacherEngine
from tests.support.engine_contract import *  # noqa: F403  every engine has to pass it
from tests.support.engine_contract import EVERYTHING, RAW, TOLERANCE, Outcome, close, run_plans
from tests.vllm.conftest import Pair

# Lengths around multiples of the block size 32 and the pass size 48, and the maximum.
LENGTHS = (1, 2, 31, 32, 33, 47, 48, 49, 64, 97, 250, 511, 512)


@pytest.fixture
def engine(pair: Pair) -> TeacherEngine:
    return pair.vllm


def sample_of(length: int, seed: int, name: str = "") -> Sample:
    """Random tokens in three spans of about the same length."""
    rng = random.Random(seed)
    token_ids = tuple(rng.randrange(3, 300) for _ in range(length))
    first, second = length // 3, 2 * length // 3
    spans = (Span("prompt", 0, first), Span("reasoning", first, second), Span("answer", second, length))
    return Sample(name or f"{length}-{seed}", token_ids=token_ids, spans=spans)


def assert_equal_on_both(pair: Pair, samples: list[Sample], plan: KVPlan, found: Outcome | None = None) -> None:
    """Check that selections match nearly everywhere, and that keys and values there match to 1e-4.

    `found`: what vLLM returned; by default it runs now.
    """
    same = layers = 0
    tokens = [pair.hf.tokenize(sample) for sample in samples]
    assert tokens == [pair.vllm.tokenize(sample) for sample in samples]
    expected = run_plans(pair.hf, [(one, plan) for one in tokens])
    found = found or run_plans(pair.vllm, [(one, plan) for one in tokens])
    assert not expected.failures
    assert not found.failures
    for row in range(len(samples)):
        assert len(found.of(row)) == len(plan.layers)
        for (have, at), (want, place) in zip(found.of(row), expected.of(row), strict=True):
            assert have.layer == want.layer
            chosen, expected_choice = have.positions[at].tolist(), want.positions[place].tolist()
            for one, other in zip(chosen, expected_choice, strict=True):
                # If two scores differ only by rounding, the engines may select different tokens.
                assert len(set(one) - set(other)) <= (1 if needs_keys(plan.selection) else 0)
            layers += 1
            if chosen == expected_choice:
                same += 1
                for kind in have.relative_error:
                    assert have.relative_error[kind][at] == pytest.approx(want.relative_error[kind][place], rel=0.02)
                if plan.codec.name == "raw":
                    for part in want.parts:
                        close(have.parts[part][at], want.parts[part][place])
    assert same >= 0.75 * layers


def test_both_engines_serve_the_same_teacher(pair: Pair) -> None:
    assert pair.vllm.info.same_teacher(pair.hf.info)
    assert pair.vllm.info.max_sample_tokens == pair.hf.info.max_sample_tokens == 512
    assert pair.vllm.info.selectors == pair.hf.info.selectors


def test_prompts_of_every_length_match_transformers(pair: Pair) -> None:
    samples = [sample_of(length, seed) for seed, length in enumerate(LENGTHS)]
    assert_equal_on_both(pair, samples, EVERYTHING)


@pytest.mark.parametrize("scope", ["head", "layer", "sample"])
@pytest.mark.parametrize("selector", ["right", "uniform", "random", "keydiff", "r_kv"])
def test_selections_match_transformers(pair: Pair, selector: str, scope: str) -> None:
    selection = Selection.model_validate(
        {"selector": selector, "budget": 7, "scope": scope, "span": "all" if scope == "head" else "reasoning"}
    )
    samples = [sample_of(length, 100 + length) for length in (31, 64, 97, 250)]
    for codec in (RAW, CodecSpec(name="int8", group_size=4), CodecSpec(name="int4", group_size=4)):
        assert_equal_on_both(pair, samples, KVPlan(layers=(0, 2), selection=selection, codec=codec))


def counted(name: str) -> float:
    """One of vLLM's counters, summed over all engines with statistics."""
    return sum(
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == f"vllm:{name}_total"
    )


def test_tokens_from_the_prefix_cache_are_sent_too(pair: Pair) -> None:
    before = counted("prefix_cache_hits")
    shared = sample_of(250, 1).token_ids
    assert shared is not None
    samples = [Sample(f"p{end}", token_ids=(*shared[:200], *range(10, 10 + end))) for end in (1, 40, 90)]
    for _ in range(2):
        assert_equal_on_both(pair, [*samples, Sample("again", token_ids=shared)], EVERYTHING)
    batch = [PlannedSample(pair.vllm.tokenize(Sample("more", token_ids=shared)), EVERYTHING)]
    timings = pair.vllm.run(
        batch, lambda _result: None, lambda failure: pytest.fail(failure.problem), lambda _row: True
    )
    assert timings.cached_tokens >= 128
    assert timings.prefill_s > 0.0
    if pair.counts:
        assert counted("prefix_cache_hits") > before + 3 * 32


def test_answers_in_the_prefix_cache_are_recomputed_for_attention(pair: Pair) -> None:
    plan = KVPlan(layers=(0, 1, 2), selection=Selection(selector="r_kv", budget=5, scope="layer"), codec=RAW)
    for _ in range(2):
        assert_equal_on_both(pair, [sample_of(120, 5, "once"), sample_of(90, 6, "more")], plan)


def test_preempted_requests_match_transformers(pairs: Callable[[str], Pair]) -> None:
    pair, before = pairs("llama"), counted("num_preemptions")
    samples = [sample_of(300 + 20 * number, 40 + number) for number in range(8)]
    for selector in ("full", "r_kv"):
        budget = 0 if selector == "full" else 9
        selection = Selection.model_validate({"selector": selector, "budget": budget, "span": "all"})
        assert_equal_on_both(pair, samples, KVPlan(layers=(0, 1, 2), selection=selection, codec=RAW))
    assert counted("num_preemptions") > before


def test_batches_that_run_at_the_same_time_match_transformers(pair: Pair) -> None:
    assert pair.vllm.concurrent_batches > 1
    batches = [[sample_of(20 + 30 * number, 100 * each + number) for number in range(6)] for each in range(4)]
    short = KVPlan(layers=(1,), selection=Selection(selector="right", budget=5, span="all"), codec=RAW)
    plans = [EVERYTHING, short] * 2

    def run(samples: list[Sample], plan: KVPlan) -> Outcome:
        return run_plans(pair.vllm, [(pair.vllm.tokenize(sample), plan) for sample in samples])

    with ThreadPoolExecutor(len(batches)) as pool:
        found = list(pool.map(run, batches, plans))
    for samples, plan, outcome in zip(batches, plans, found, strict=True):
        assert_equal_on_both(pair, samples, plan, outcome)


def test_a_cancelled_sample_ends_and_the_others_continue(pair: Pair) -> None:
    samples = [sample_of(400, 70 + number) for number in range(4)]
    batch = [PlannedSample(pair.vllm.tokenize(sample), EVERYTHING) for sample in samples]
    outcome, given_up = Outcome(), threading.Event()

    def emit(result: LayerResult) -> None:
        outcome.results.append(result)
        given_up.set()

    pair.vllm.run(batch, emit, outcome.failures.append, lambda row: row != 3 or not given_up.is_set())
    assert not outcome.failures
    assert all(len(outcome.of(row)) == 3 for row in range(3))
    assert_equal_on_both(pair, samples[3:], EVERYTHING)


def test_generated_texts_match_transformers(pair: Pair) -> None:
    prompts = [Sample("a", text="The start is 3. "), Sample("b", text="Add 4, then multiply by 2")]
    greedy = SamplingParams(max_new_tokens=10)
    written = [
        engine.generate([engine.tokenize(prompt) for prompt in prompts], greedy, lambda _row: True)
        for engine in (pair.vllm, pair.hf)
    ]
    assert written[0] == written[1]


def test_the_tolerance_equals_that_of_the_self_test() -> None:
    assert TOLERANCE <= 1e-4
