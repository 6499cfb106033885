"""The tests that every teacher engine has to pass. A test module imports all of them and defines the fixture `engine`.

The engine has three layers and takes at most 512 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from kvcore.errors import FieldError
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.tensors.codec import decode
from kvcore.types import TENSORS, Sample, Span, Tensor
from teacher_server.engines.base import (
    SPAN_KINDS,
    LayerResult,
    PlannedSample,
    SampleFailure,
    TeacherEngine,
    TokenizedSample,
)
from tests.support.kv_maps import coded_map, naive_mapped, random_map

RAW = CodecSpec(name="raw")
EVERYTHING = KVPlan(layers=(0, 1, 2), selection=Selection(selector="full", span="all"), codec=RAW)
# For the same sample in two batches, in fp32.
TOLERANCE = 1e-4
TEXTS = (
    ("The start is 3. ", "3 + 4 = 7, so 0; 0 x 2 = 0. ", "The answer is 2."),
    ("Größe? ", "思考过程 🙂 naïve. ", "二"),
    (
        "Add 4, then multiply by 2 and subtract 5, all modulo 7. ",
        "7, 0, 2, and so on and so on. ",
        "Answer: 2, surely 2.",
    ),
    ("1", "2", "3"),
)


def make_sample(index: int) -> Sample:
    prompt, reasoning, answer = TEXTS[index]
    ends = [0, len(prompt), len(prompt + reasoning), len(prompt + reasoning + answer)]
    spans = tuple(
        Span(kind, start, end)
        for kind, start, end in zip(SPAN_KINDS, ends[:-1], ends[1:], strict=True)
        if kind != "all"
    )
    return Sample(f"s{index}", text=prompt + reasoning + answer, spans=spans)


def read_batch(engine: TeacherEngine) -> list[TokenizedSample]:
    return [engine.tokenize(make_sample(index)) for index in range(len(TEXTS))]


@dataclass
class Outcome:
    """The results and failures of a batch."""

    results: list[LayerResult] = field(default_factory=list)
    failures: list[SampleFailure] = field(default_factory=list)

    def of(self, row: int) -> list[tuple[LayerResult, int]]:
        """The results of one sample in the order of arrival, with its index in each."""
        return [(result, result.indices.index(row)) for result in self.results if row in result.indices]

    def tensors(self, row: int, kind: str, plan: KVPlan) -> list[Tensor]:
        """One sample's decoded keys or values [H,M,D], layer by layer."""
        return [
            decode({name[2:]: part[place] for name, part in result.parts.items() if name[0] == kind}, kind, plan.codec)  # type: ignore[arg-type]
            for result, place in self.of(row)
        ]


def run_plans(engine: TeacherEngine, batch: Sequence[tuple[TokenizedSample, KVPlan]]) -> Outcome:
    outcome = Outcome()
    samples = [PlannedSample(tokens, plan) for tokens, plan in batch]
    engine.run(samples, outcome.results.append, outcome.failures.append, lambda _row: True)
    return outcome


def run_everything(engine: TeacherEngine, batch: Sequence[TokenizedSample]) -> Outcome:
    return run_plans(engine, [(tokens, EVERYTHING) for tokens in batch])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


# ---------------------------------------------------------------------------------------------------- running plans


def test_each_sample_gets_every_layer_once_in_order_with_the_geometry_of_info(engine: TeacherEngine) -> None:
    info, batch = engine.info, read_batch(engine)
    outcome = run_everything(engine, batch)
    assert not outcome.failures
    for row, tokens in enumerate(batch):
        assert [result.layer for result, _ in outcome.of(row)] == [0, 1, 2]
        text = [place for place, end in enumerate(tokens.byte_ends) if end >= 0]
        for result, place in outcome.of(row):
            assert result.positions[place].tolist() == [text]
            for kind in ("k", "v"):
                assert result.parts[f"{kind}.data"][place].shape == (info.kv_heads, len(text), info.head_dim)
                assert result.relative_error[kind][place] == 0.0


def test_results_do_not_depend_on_the_batch(engine: TeacherEngine) -> None:
    batch = read_batch(engine)
    together = run_everything(engine, batch)
    for row, tokens in enumerate(batch):
        alone = run_everything(engine, [tokens])
        for kind in ("k", "v"):
            for mixed, single in zip(
                together.tensors(row, kind, EVERYTHING), alone.tensors(0, kind, EVERYTHING), strict=True
            ):
                close(mixed, single)


def test_kv_differ_between_layers_heads_tokens_and_kinds_of_a_sample(engine: TeacherEngine) -> None:
    outcome = run_everything(engine, read_batch(engine)[2:3])
    keys, values = (outcome.tensors(0, kind, EVERYTHING) for kind in ("k", "v"))
    assert not torch.allclose(keys[0], keys[1])
    assert not torch.allclose(keys[0], values[0])
    if engine.info.kv_heads > 1:
        assert not torch.allclose(keys[0][0], keys[0][1])
    assert not torch.allclose(keys[0][:, 1], keys[0][:, 2])


def test_plans_of_all_kinds_share_a_batch(engine: TeacherEngine) -> None:
    tokens = read_batch(engine)[2]
    plans = [
        KVPlan(layers=(1,), selection=Selection(selector="right", budget=3, span="prompt"), codec=RAW),
        KVPlan(layers=(0, 2), selection=Selection(selector="uniform", budget=4, scope="head"), codec=RAW),
        KVPlan(layers=(2,), selection=Selection(selector="random", budget=4, scope="layer", seed=7)),
        KVPlan(layers=(0, 1, 2), selection=Selection(selector="keydiff", budget=4, scope="head"), codec=RAW),
        KVPlan(layers=(0, 1, 2), selection=Selection(selector="keydiff", budget=4, scope="sample")),
        KVPlan(layers=(1, 2), selection=Selection(selector="r_kv", budget=4, scope="head"), codec=RAW),
        KVPlan(layers=(0, 2), selection=Selection(selector="r_kv", budget=4, scope="layer"), codec=RAW),
        EVERYTHING,
    ]
    outcome = run_plans(engine, [(tokens, plan) for plan in plans])
    assert not outcome.failures
    text = [place for place, end in enumerate(tokens.byte_ends) if end >= 0]
    whole = {kind: outcome.tensors(len(plans) - 1, kind, EVERYTHING) for kind in ("k", "v")}
    for row, plan in enumerate(plans):
        found = outcome.of(row)
        assert [result.layer for result, _ in found] == list(plan.layers)
        for kind in ("k", "v"):
            for (result, place), tensor in zip(found, outcome.tensors(row, kind, plan), strict=True):
                chosen = result.positions[place].tolist()
                for head in range(engine.info.kv_heads):
                    at = [text.index(token) for token in chosen[head % len(chosen)]]
                    expected = whole[kind][result.layer][head, at]
                    close(tensor[head], expected) if plan.codec.name == "raw" else torch.testing.assert_close(
                        tensor[head], expected, atol=0.02 * float(expected.abs().max()), rtol=0
                    )


@pytest.mark.parametrize("scope", ["layer", "sample"])
@pytest.mark.parametrize("selector", ["full", "right", "r_kv", "r_kv_centred", "uniform", "random", "keydiff"])
def test_a_map_is_applied_to_what_the_plan_selects(engine: TeacherEngine, selector: str, scope: str) -> None:
    info, batch = engine.info, read_batch(engine)[:3]
    assert info.max_map_bytes > 0
    selection = Selection.model_validate(
        {"selector": selector, "scope": scope, "budget": 0 if selector == "full" else 4}
    )
    unmapped = KVPlan(layers=(0, 2), selection=selection, codec=RAW)
    kv_map = random_map(unmapped.layers, info.kv_heads * info.head_dim, heads=2, head_dim=3)
    mapped = unmapped.with_map(kv_map.named)
    outcome = Outcome()
    planned = [*(PlannedSample(tokens, mapped, kv_map) for tokens in batch)]
    planned += [PlannedSample(tokens, unmapped) for tokens in batch]
    engine.run(planned, outcome.results.append, outcome.failures.append, lambda _row: True)
    assert not outcome.failures
    for row in range(len(batch)):
        whole = outcome.of(row + len(batch))
        for (result, place), (other, at) in zip(outcome.of(row), whole, strict=True):
            assert (result.layer, result.positions[place].tolist()) == (other.layer, other.positions[at].tolist())
            for kind in TENSORS:
                expected = naive_mapped(kv_map, other.parts[f"{kind}.data"][at], result.layer, kind)
                found = result.parts[f"{kind}.data"][place].double()
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("selector", ["full", "right", "r_kv"])
def test_the_codec_pca_rounds_what_its_map_makes_of_the_plans_selection(engine: TeacherEngine, selector: str) -> None:
    info, batch = engine.info, read_batch(engine)[:3]
    selection = Selection.model_validate({"selector": selector, "budget": 0 if selector == "full" else 4})
    unmapped = KVPlan(layers=(0, 2), selection=selection, codec=RAW)
    kv_map = coded_map(unmapped.layers, info.kv_heads, info.head_dim, step=0.02)
    coded = unmapped.with_map(kv_map.named, CodecSpec(name="pca"))
    outcome = Outcome()
    planned = [*(PlannedSample(tokens, coded, kv_map) for tokens in batch)]
    planned += [PlannedSample(tokens, unmapped) for tokens in batch]
    engine.run(planned, outcome.results.append, outcome.failures.append, lambda _row: True)
    assert not outcome.failures
    for row in range(len(batch)):
        for (result, place), (other, at) in zip(outcome.of(row), outcome.of(row + len(batch)), strict=True):
            assert result.positions[place].tolist() == other.positions[at].tolist()
            for kind in TENSORS:
                exact = naive_mapped(kv_map, other.parts[f"{kind}.data"][at], result.layer, kind)
                codes = result.parts[f"{kind}.codes"][place]
                assert codes.dtype == torch.int16
                # Half a unit, and what fp32 loses of numbers of this size.
                assert float((codes.double() - exact).abs().max()) <= 0.5 + 1e-4 * float(exact.abs().max())
                assert 0 < result.relative_error[kind][place] < 0.1


def test_a_sample_over_its_error_budget_fails_alone(engine: TeacherEngine) -> None:
    first, second = read_batch(engine)[1:3]
    strict = KVPlan(
        layers=(0, 1), selection=Selection(span="all"), codec=CodecSpec(name="int8", max_relative_error=1e-6)
    )
    outcome = run_plans(engine, [(first, strict), (second, EVERYTHING)])
    (failure,) = outcome.failures
    assert failure.index == 0
    assert "plan.codec.max_relative_error is 1e-06" in failure.problem
    assert not outcome.of(0)
    assert len(outcome.of(1)) == 3


def test_an_error_in_emit_ends_the_batch_and_the_engine_still_works(engine: TeacherEngine) -> None:
    batch = read_batch(engine)
    samples = [PlannedSample(tokens, EVERYTHING) for tokens in batch]

    def broken(_result: LayerResult) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.run(samples, broken, lambda failure: pytest.fail(failure.problem), lambda _row: True)
    assert not run_everything(engine, batch).failures


def test_a_cancelled_batch_ends(engine: TeacherEngine) -> None:
    outcome = Outcome()
    samples = [PlannedSample(tokens, EVERYTHING) for tokens in read_batch(engine)]
    engine.run(samples, outcome.results.append, outcome.failures.append, lambda row: row == 1)
    assert [result.layer for result, _ in outcome.of(1)] == [0, 1, 2]
    assert not outcome.failures


# ---------------------------------------------------------------------------------------------------- reading


def test_a_token_belongs_to_the_span_of_its_last_byte(engine: TeacherEngine) -> None:
    for index in range(len(TEXTS)):
        sample = make_sample(index)
        tokens = engine.tokenize(sample)
        assert sample.text is not None
        data = sample.text.encode()
        assert len(tokens.token_ids) == len(tokens.byte_ends) == len(tokens.span_ids)
        assert max(tokens.byte_ends) == len(data)
        for end, span_id in zip(tokens.byte_ends, tokens.span_ids, strict=True):
            if end < 0:
                assert span_id == -1
                continue
            character = len(data[: end - 1].decode(errors="ignore"))
            expected = [span.kind for span in sample.spans if span.start <= character < span.end]
            assert [SPAN_KINDS[span_id]] == expected


def test_token_ids_of_a_text_give_the_same_sample(engine: TeacherEngine) -> None:
    for index in range(len(TEXTS)):
        read = engine.tokenize(make_sample(index))
        given = Sample("ids", token_ids=read.token_ids, spans=(Span("answer", 1, len(read.token_ids)),))
        tokens = engine.tokenize(given)
        assert tokens.token_ids == read.token_ids
        assert tokens.byte_ends == read.byte_ends
        assert tokens.span_ids == (-1, *[SPAN_KINDS.index("answer")] * (len(read.token_ids) - 1))


LONG = "a b c d e f g h i j k l m n o p " * 64


@pytest.mark.parametrize(
    ("sample", "field", "problem"),
    [
        (Sample("x", text=""), "samples[x].text", "empty"),
        (Sample("x", token_ids=()), "samples[x].token_ids", "empty"),
        (Sample("x"), "samples[x]", "exactly one"),
        (Sample("x", text="a", token_ids=(1,)), "samples[x]", "exactly one"),
        (Sample("x", text="\ud800"), "samples[x].text", "surrogate"),
        (Sample("x", text=LONG), "samples[x].text", "at most 512"),
        (Sample("x", token_ids=(1,) * 513), "samples[x].token_ids", "has 513 tokens"),
        (Sample("x", token_ids=(1, 9999)), "samples[x].token_ids", "9999"),
        (Sample("x", token_ids=(-1,)), "samples[x].token_ids", "-1"),
        (Sample("x", text="abc", spans=(Span("answer", 0, 4),)), "samples[x].spans[0]", "3 characters"),
        (Sample("x", text="abc", spans=(Span("answer", 2, 1),)), "samples[x].spans[0]", "2 to 1"),
        (Sample("x", text="abc", spans=(Span("answer", -1, 1),)), "samples[x].spans[0]", "-1 to 1"),
        (Sample("x", token_ids=(1, 2), spans=(Span("prompt", 0, 3),)), "samples[x].spans[0]", "2 tokens"),
        (Sample("x", text="abc", spans=(Span("prompt", 0, 1), Span("prompt", 1, 2))), "samples[x].spans[1]", "second"),
        (
            Sample("x", text="abc", spans=(Span("prompt", 0, 2), Span("answer", 1, 3))),
            "samples[x].spans[1]",
            "overlaps",
        ),
    ],
)
def test_invalid_samples_are_refused_by_field(engine: TeacherEngine, sample: Sample, field: str, problem: str) -> None:
    with pytest.raises(FieldError) as caught:
        engine.tokenize(sample)
    assert caught.value.field == field
    assert problem in caught.value.problem
