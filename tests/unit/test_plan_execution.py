"""Tests of plan execution: the results of each sample follow its plan and do not depend on the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from kvcore.errors import FieldError
from kvcore.plan import CodecSpec, ImportancePool, KVPlan, Scope, Selection, Selector
from kvcore.tensors.codec import decode
from kvcore.types import Sample, Span
from teacher_server.config import ServeConfig
from teacher_server.engines.base import (
    SPAN_KINDS,
    LayerOutput,
    LayerResult,
    LayerSink,
    PlannedSample,
    SampleFailure,
    TokenizedSample,
)
from teacher_server.engines.fake import FakeEngine, FakeFaults, FakeModel
from teacher_server.plan_execution import (
    candidate_tokens,
    check_plan,
    check_sample,
    encoded_bytes,
    execute,
    pack_bytes,
    unpack_bytes,
)
from tests.support import naive_selection as naive

LAYERS, HEADS, DIM = 4, 2, 16
RAW = CodecSpec(name="raw")
R_KV = Selection(selector="r_kv", budget=3)


def by_importance(pool: ImportancePool) -> Selection:
    return Selection(selector="r_kv", budget=3, scope="head", importance_weight=1.0, importance_pool=pool)


def make_engine(faults: FakeFaults | None = None) -> FakeEngine:
    config = ServeConfig(model="fake:", engine="fake", max_sample_tokens=256)
    return FakeEngine(config, FakeModel(layers=LAYERS, heads=HEADS, dim=DIM), faults)


def make_sample(name: str, prompt: str = "ask", reasoning: str = "1+1=2", answer: str = "2") -> Sample:
    bounds = [0, len(prompt), len(prompt + reasoning), len(prompt + reasoning + answer)]
    spans = (
        Span("prompt", bounds[0], bounds[1]),
        Span("reasoning", bounds[1], bounds[2]),
        Span("answer", bounds[2], bounds[3]),
    )
    return Sample(name, text=prompt + reasoning + answer, spans=spans)


@dataclass
class Outcome:
    """All results and failures of one execution, in order."""

    results: list[LayerResult] = field(default_factory=list)
    failures: list[SampleFailure] = field(default_factory=list)

    def of(self, index: int) -> list[tuple[LayerResult, int]]:
        """The results of one sample and its row in each."""
        return [(result, result.indices.index(index)) for result in self.results if index in result.indices]


def run(samples: Sequence[tuple[Sample, KVPlan]], faults: FakeFaults | None = None) -> Outcome:
    engine, outcome = make_engine(faults), Outcome()
    batch = [PlannedSample(engine.tokenize(sample), plan) for sample, plan in samples]
    execute(engine, batch, outcome.results.append, outcome.failures.append)
    return outcome


def layers_of(sample: Sample, layers: Sequence[int]) -> list[LayerOutput]:
    """The engine's output for a batch of only this sample."""
    engine, outputs = make_engine(), list[LayerOutput]()
    engine.prefill([engine.tokenize(sample)], layers, True, outputs.append)
    return outputs


# ---------------------------------------------------------------------------------------------------- naive references


def naive_positions(plan: KVPlan, sample: Sample, layer: int) -> list[list[int]]:
    """Tokens selected in one layer by the definition: one list per head, or one list if the scope is wider."""
    selection = plan.selection
    tokens = make_engine().tokenize(sample)
    kind = -1 if selection.span == "all" else SPAN_KINDS.index(selection.span)
    candidates = [
        place
        for place, (span, end) in enumerate(zip(tokens.span_ids, tokens.byte_ends, strict=True))
        if (end >= 0 if selection.span == "all" else span == kind)
    ]
    budget = min(selection.budget, len(candidates)) if selection.budget else len(candidates)
    if selection.selector in ("full", "right"):
        return [candidates[-budget:]] * (HEADS if selection.scope == "head" else 1)
    if selection.selector == "random":
        choosers = {"head": [layer * HEADS, layer * HEADS + 1], "layer": [layer], "sample": [0]}[selection.scope]
        drawn = [naive.random_scores(selection.seed, tokens.token_ids, c, len(candidates)) for c in choosers]
        return [naive.best(scores, candidates, budget) for scores in drawn]
    scores_by_layer = [
        [naive_scores(selection, output, head, candidates) for head in range(HEADS)]
        for output in layers_of(sample, plan.layers)
    ]
    place = plan.layers.index(layer)
    score_groups = {
        "head": [[h] for h in scores_by_layer[place]],
        "layer": [scores_by_layer[place]],
        "sample": [[h for lay in scores_by_layer for h in lay]],
    }
    return [naive.best(naive.mean_scores(group), candidates, budget) for group in score_groups[selection.scope]]


def naive_scores(selection: Selection, output: LayerOutput, head: int, candidates: list[int]) -> list[float]:
    """Scores of the candidates by one head."""
    keys = output.k_BHTD[0, head, candidates].tolist()
    if selection.selector == "keydiff":
        return naive.keydiff_scores(keys)
    assert selection.selector == "r_kv"
    importance_BHT = {"max": output.importance_BHT, "mean": output.mean_importance_BHT}[selection.importance_pool]
    assert importance_BHT is not None
    return naive.r_kv_scores(keys, importance_BHT[0, head, candidates].tolist(), selection.importance_weight)


def assert_matches_single_sample(outcome: Outcome, index: int, sample: Sample, plan: KVPlan) -> None:
    """Checks a sample's results: the layers of its plan in order, with the naive selection and the engine's K/V."""
    found = outcome.of(index)
    assert [result.layer for result, _ in found] == list(plan.layers)
    for (result, row), output in zip(found, layers_of(sample, plan.layers), strict=True):
        positions = naive_positions(plan, sample, result.layer)
        assert result.positions.dtype == torch.int32
        assert result.positions[row].tolist() == positions
        for kind, source in (("k", output.k_BHTD), ("v", output.v_BHTD)):
            expected = [source[0, head, positions[head % len(positions)]] for head in range(HEADS)]
            parts = {name[2:]: part[row] for name, part in result.parts.items() if name.startswith(kind)}
            decoded = decode(parts, "k" if kind == "k" else "v", plan.codec)
            error = float((decoded - torch.stack(expected)).norm() / torch.stack(expected).norm())
            assert result.relative_error[kind][row] == pytest.approx(error, abs=1e-6)
            assert error == 0.0 if plan.codec.name == "raw" else error < 0.02


# ---------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("scope", ["head", "layer", "sample"])
@pytest.mark.parametrize("selector", ["full", "right", "r_kv", "random", "keydiff"])
@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_each_sample_gets_the_tokens_and_layers_of_its_plan(selector: str, scope: str, codec: str) -> None:
    selection = Selection.model_validate(
        {"selector": selector, "budget": 0 if selector == "full" else 3, "scope": scope}
    )
    plan = KVPlan(layers=(0, 2, 3), selection=selection, codec=CodecSpec.model_validate({"name": codec}))
    samples = [
        make_sample("a"),
        make_sample("b", reasoning="2*3=6 so 6"),
        make_sample("c", prompt="something longer", reasoning="7-2=5"),
        make_sample("d", reasoning="思考 ok"),
        make_sample("e", reasoning="ab"),
    ]
    outcome = run([(sample, plan) for sample in samples])
    assert not outcome.failures
    for index, sample in enumerate(samples):
        assert_matches_single_sample(outcome, index, sample, plan)


def test_different_plans_share_a_batch() -> None:
    plans = [
        KVPlan(layers=(1,), selection=R_KV, codec=RAW),
        KVPlan(layers=(0, 3), selection=Selection(selector="right", budget=2, span="prompt"), codec=RAW),
        KVPlan(layers=(0, 1, 2, 3), selection=Selection(span="all", scope="head")),
        KVPlan(layers=(1,), selection=R_KV, codec=RAW),
        KVPlan(layers=(2, 3), selection=Selection(selector="r_kv", budget=4, scope="head"), codec=RAW),
        KVPlan(layers=(1, 2), selection=by_importance("mean"), codec=RAW),
        KVPlan(layers=(1, 2), selection=by_importance("max"), codec=RAW),
        KVPlan(layers=(1, 2), selection=Selection(selector="random", budget=3, seed=1), codec=RAW),
        KVPlan(layers=(1, 2), selection=Selection(selector="random", budget=3, seed=2), codec=RAW),
    ]
    samples = [(make_sample(f"s{index}", prompt="p" * (index + 2)), plan) for index, plan in enumerate(plans)]
    outcome = run(samples)
    for index, (sample, plan) in enumerate(samples):
        assert_matches_single_sample(outcome, index, sample, plan)


def test_importance_pooling_is_set_per_plan() -> None:
    sample = make_sample("a", reasoning="1+1=2, 2+2=4, 4+4=8")
    outcome = run([(sample, KVPlan(layers=(1,), selection=by_importance(pool), codec=RAW)) for pool in ("max", "mean")])
    largest, mean = (outcome.of(index)[0] for index in range(2))
    assert largest[0].positions[largest[1]].tolist() != mean[0].positions[mean[1]].tolist()


def test_random_selection_does_not_depend_on_the_batch() -> None:
    plan = KVPlan(layers=(0, 2), selection=Selection(selector="random", budget=3, scope="head", seed=5), codec=RAW)
    samples = [make_sample(name, reasoning=text) for name, text in (("a", "1+1=2"), ("bad", "3+3=6"), ("c", "2+2=4"))]
    outcome = run([(sample, plan) for sample in samples], FakeFaults(not_finite=frozenset({"bad"})))
    other_order = run([(samples[2], plan), (make_sample("a under another name", reasoning="1+1=2"), plan)])
    for index, other in ((0, 1), (2, 0)):
        assert_matches_single_sample(outcome, index, samples[index], plan)
        assert_matches_single_sample(other_order, other, samples[index], plan)


def test_samples_of_equal_plan_and_length_share_one_result() -> None:
    plans = [KVPlan(layers=(0, 1), selection=Selection(selector="right", budget=2)) for _ in range(4)]
    samples = [(make_sample(f"s{index}", reasoning="1" * (5 + index % 2)), plan) for index, plan in enumerate(plans)]
    assert [result.indices for result in run(samples).results] == [[0, 2], [1, 3]] * 2


def test_unwanted_samples_are_not_encoded() -> None:
    engine, results = make_engine(), list[LayerResult]()
    plan = KVPlan(layers=(0, 1), selection=Selection(selector="keydiff", budget=2, scope="layer"), codec=RAW)
    batch = [PlannedSample(engine.tokenize(make_sample(name)), plan) for name in ("a", "b")]

    def wanted(row: int) -> bool:
        return row == 1 or not results

    engine.run(batch, results.append, lambda failure: pytest.fail(failure.problem), wanted)
    assert [result.indices for result in results] == (
        [[0, 1], [1]] if plan.selection.scope != "sample" else [[0, 1]] * 2
    )


class RecordingEngine(FakeEngine):
    """Records in `events` when each layer is computed."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(ServeConfig(model="fake:", engine="fake"), FakeModel(LAYERS, HEADS, DIM))
        self._events = events

    def prefill(
        self, batch: Sequence[TokenizedSample], layers: Sequence[int], with_importance: bool, sink: LayerSink
    ) -> None:
        def record_layer(output: LayerOutput) -> None:
            self._events.append(f"computed {output.layer}")
            sink(output)

        super().prefill(batch, layers, with_importance, record_layer)


@pytest.mark.parametrize(
    ("selector", "scope", "expected"),
    [
        ("r_kv", "head", ["computed 0", "emitted 0", "computed 1", "emitted 1"]),
        ("r_kv", "layer", ["computed 0", "emitted 0", "computed 1", "emitted 1"]),
        ("r_kv", "sample", ["computed 0", "computed 1", "emitted 0", "emitted 1"]),
        ("keydiff", "sample", ["computed 0", "computed 1", "emitted 0", "emitted 1"]),
        ("random", "sample", ["computed 0", "emitted 0", "computed 1", "emitted 1"]),
    ],
)
def test_layer_is_emitted_as_soon_as_its_tokens_can_be_selected(
    selector: Selector, scope: Scope, expected: list[str]
) -> None:
    events: list[str] = []
    engine = RecordingEngine(events)
    plan = KVPlan(layers=(0, 1), selection=Selection(selector=selector, budget=2, scope=scope))
    batch = [PlannedSample(engine.tokenize(make_sample("a")), plan)]
    execute(
        engine,
        batch,
        lambda result: events.append(f"emitted {result.layer}"),
        lambda failure: pytest.fail(failure.problem),
    )
    assert events == expected


def test_encoded_bytes_equals_the_size_of_the_result() -> None:
    selections = [R_KV, Selection(span="all", scope="head"), Selection(selector="uniform", budget=99, scope="layer")]
    for selection in selections:
        for codec in (RAW, CodecSpec(name="bf16"), CodecSpec(group_size=3)):
            plan = KVPlan(layers=(0, 2), selection=selection, codec=codec)
            engine = make_engine()
            predicted = encoded_bytes(plan, engine.tokenize(make_sample("a")), engine.info)
            results = run([(make_sample("a"), plan)]).results
            sent = [tensor for result in results for tensor in (*result.parts.values(), result.positions)]
            assert predicted == sum(tensor.nbytes for tensor in sent)


def test_packed_copy_does_not_change_tensors() -> None:
    tensors = {
        "codes": torch.randint(-127, 127, (2, 3, 5), dtype=torch.int8),
        "error": torch.rand(2, dtype=torch.float64),
        "scale": torch.rand(2, 3, 1).to(torch.bfloat16),
        "positions": torch.arange(6, dtype=torch.int32).view(2, 3),
        "strided": torch.rand(4, 3).T,
    }
    packed, order = pack_bytes(tensors)
    unpacked = unpack_bytes(packed, order, tensors)
    assert list(unpacked) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(unpacked[name], tensor)


# ---------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("scope", ["head", "layer", "sample"])
@pytest.mark.parametrize("selector", ["right", "r_kv"])
def test_only_the_sample_with_non_finite_kv_fails(selector: str, scope: str) -> None:
    selection = Selection.model_validate({"selector": selector, "budget": 3, "scope": scope})
    plan = KVPlan(layers=(0, 1, 2), selection=selection, codec=RAW)
    samples = [make_sample("a", reasoning="11111"), make_sample("bad"), make_sample("c", reasoning="33333")]
    outcome = run([(sample, plan) for sample in samples], FakeFaults(not_finite=frozenset({"bad"})))
    assert [failure.index for failure in outcome.failures] == [1]
    assert "not finite" in outcome.failures[0].problem
    assert not outcome.of(1)
    for index in (0, 2):
        assert_matches_single_sample(outcome, index, samples[index], plan)


def test_batch_in_which_all_samples_fail_has_no_results() -> None:
    plan = KVPlan(layers=(0, 1), selection=R_KV)
    outcome = run([(make_sample("bad"), plan)], FakeFaults(not_finite=frozenset({"bad"})))
    assert [failure.index for failure in outcome.failures] == [0]
    assert not outcome.results


@pytest.mark.parametrize("scope", ["layer", "sample"])
def test_sample_over_max_relative_error_fails_with_error_and_limit(scope: Scope) -> None:
    selection = Selection(selector="r_kv", budget=3, scope=scope)
    samples = [make_sample(f"s{index}", reasoning=f"{index}+{index}={2 * index}") for index in range(4)]
    unlimited = KVPlan(layers=(0, 1), selection=selection)
    worst = [
        max(
            result.relative_error[kind][row]
            for result, row in run([(s, unlimited) for s in samples]).of(index)
            for kind in "kv"
        )
        for index, s in enumerate(samples)
    ]
    limit = sorted(worst)[1]
    tight = KVPlan(layers=(0, 1), selection=selection, codec=CodecSpec(max_relative_error=limit))
    outcome = run([(sample, tight) for sample in samples])
    failed = {failure.index: failure.problem for failure in outcome.failures}
    assert sorted(failed) == [index for index, error in enumerate(worst) if error > limit]
    for index, sample in enumerate(samples):
        if index not in failed:
            assert_matches_single_sample(outcome, index, sample, tight)
    for problem in failed.values():
        assert f"plan.codec.max_relative_error is {limit:.3g}" in problem
        assert "has a relative error of 0.0" in problem


def test_model_errors_propagate_to_the_caller() -> None:
    with pytest.raises(RuntimeError, match="injected fault"):
        run([(make_sample("a"), KVPlan(layers=(0,)))], FakeFaults(fail=frozenset({"a"})))


# ---------------------------------------------------------------------------------------------------- refusals


def test_plan_with_unknown_layers_is_refused() -> None:
    info = make_engine().info
    check_plan(KVPlan(layers=(0, LAYERS - 1), selection=R_KV), info)
    with pytest.raises(FieldError, match=r"plan\.layers: got 4; this teacher's layers are 0 to 3"):
        check_plan(KVPlan(layers=(0, LAYERS)), info)


def test_unknown_selector_or_codec_is_refused_with_the_known_ones() -> None:
    config = ServeConfig(model="fake:", engine="fake")
    info = FakeEngine(config, FakeModel()).info
    limited = type(info)(
        **{**{name: getattr(info, name) for name in info.__slots__}, "selectors": ("full",), "codecs": ("raw",)}
    )
    with pytest.raises(FieldError, match=r"plan\.selection\.selector: got 'r_kv'; known: full"):
        check_plan(KVPlan(layers=(0,), selection=R_KV), limited)
    with pytest.raises(FieldError, match=r"plan\.codec\.name: got 'int8'; known: raw"):
        check_plan(KVPlan(layers=(0,)), limited)


def test_sample_without_candidate_tokens_is_refused() -> None:
    tokens = make_engine().tokenize(make_sample("q1", reasoning=""))
    with pytest.raises(FieldError, match=r"samples\[q1\]\.spans: no token lies in the span 'reasoning'"):
        check_sample(tokens, KVPlan(layers=(0,)))
    check_sample(tokens, KVPlan(layers=(0,), selection=Selection(span="prompt")))


def test_r_kv_needs_an_answer_unless_importance_weight_is_zero() -> None:
    tokens = make_engine().tokenize(make_sample("q1", answer=""))
    with pytest.raises(FieldError, match=r"samples\[q1\]\.spans: .*no token lies in the span 'answer'"):
        check_sample(tokens, KVPlan(layers=(0,), selection=R_KV))
    by_keys = Selection(selector="r_kv", budget=3, importance_weight=0.0)
    check_sample(tokens, KVPlan(layers=(0,), selection=by_keys))


def test_span_all_excludes_tokens_without_text() -> None:
    plan = KVPlan(layers=(0,), selection=Selection(span="all"))
    tokens = make_engine().tokenize(Sample("a", text="abc"))
    assert candidate_tokens(tokens, plan).tolist() == [1, 2, 3]
    unknown = TokenizedSample(tokens.sample, tokens.token_ids, (-1,) * 4, tokens.span_ids)
    assert candidate_tokens(unknown, plan).tolist() == [0, 1, 2, 3]
