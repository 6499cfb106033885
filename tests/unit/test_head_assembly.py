"""Tests that results assembled from tensor-parallel ranks and pipeline stages equal those of one process."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from align.rope_scale import RoPEScaler
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.tensors.codec import decode
from kvcore.types import TENSORS, Sample, Span, Tensor
from teacher_server.config import ServeConfig
from teacher_server.engines.base import LayerOutput, LayerResult, LayerSink, PlannedSample, TokenizedSample
from teacher_server.engines.fake import FakeEngine, FakeModel
from teacher_server.engines.vllm.answer_queries import BatchQueries
from teacher_server.engines.vllm.assembly import Assembly
from teacher_server.engines.vllm.message_queue import FailureMessage, LayerMessage, pack, unpack
from teacher_server.engines.vllm.worker_step import HeadShare, WorkerRow, WorkerStep, worker_row
from teacher_server.plan_execution import execute
from tests.support.engine_contract import Outcome
from tests.support.kv_maps import naive_mapped, random_map

LAYERS, HEADS, QUERY_HEADS, DIM = 3, 8, 16, 16
RAW, INT8 = CodecSpec(name="raw"), CodecSpec(name="int8", group_size=4)
SELECTORS = ("full", "right", "uniform", "random", "keydiff", "r_kv")
SCALE = DIM**-0.5
MAPS = {kv_map.named.digest: kv_map for kv_map in (random_map((0, 2), HEADS * DIM, seed=seed) for seed in range(2))}
TOLERANCES = {"data": (1e-6, 1e-5), "codes": (1.0, 0.0), "scale": (0.0, 0.01)}
# Samples with equal plans and lengths share messages.
TEXTS = (("ask", "1+1=2, so", "2"), ("how", "3*3=9, so", "9"), ("why?", "because it is so", "so"), ("a", "b", "c"))


@cache
def rope() -> RoPEScaler:
    return RoPEScaler.from_config(LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=DIM))


def plan_of(selector: str, scope: str, codec: CodecSpec = RAW, layers: tuple[int, ...] = (0, 2)) -> KVPlan:
    fields = {"selector": selector, "scope": scope, "budget": 0 if selector == "full" else 4, "importance_weight": 0.5}
    return KVPlan(layers=layers, selection=Selection.model_validate(fields), codec=codec)


@cache
def samples() -> list[TokenizedSample]:
    engine = FakeEngine(ServeConfig(model="fake:", engine="fake"), FakeModel())
    read: list[TokenizedSample] = []
    for prompt, reasoning, answer in TEXTS:
        ends = [0, *itertools.accumulate(map(len, (prompt, reasoning, answer)))]
        spans = (
            Span("prompt", ends[0], ends[1]),
            Span("reasoning", ends[1], ends[2]),
            Span("answer", ends[2], ends[3]),
        )
        read.append(engine.tokenize(Sample(prompt, text=prompt + reasoning + answer, spans=spans)))
    return read


@dataclass(frozen=True)
class Model:
    """A model's output for all samples: rotated keys and values [B,H,T,D] and queries [B,Q,T,D] by layer."""

    keys: list[Tensor]
    values: list[Tensor]
    queries: list[Tensor]

    @classmethod
    def random(cls) -> Model:
        generator = torch.Generator().manual_seed(0)
        longest = max(len(tokens.token_ids) for tokens in samples())

        def draw(heads: int) -> list[Tensor]:
            # Heads of very different norms, so that their weights in the error over all heads differ.
            size_H11 = torch.logspace(-1, 1, heads)[:, None, None]
            shape = (len(TEXTS), heads, longest, DIM)
            return [torch.randn(shape, generator=generator) * size_H11 for _ in range(LAYERS)]

        return cls(draw(HEADS), draw(HEADS), draw(QUERY_HEADS))

    def importance(self, layer: int, heads: slice) -> tuple[Tensor, Tensor]:
        """Importance by the query heads of these KV heads."""
        answers = [[place for place, span in enumerate(tokens.span_ids) if span == 2] for tokens in samples()]
        longest = max(map(len, answers))
        index_BA = torch.tensor([[*answer, *[0] * (longest - len(answer))] for answer in answers])
        q_BQTD = self.queries[layer].unflatten(1, (HEADS, -1))[:, heads].flatten(1, 2)
        q_BQAD = q_BQTD.gather(2, index_BA[:, None, :, None].expand(-1, q_BQTD.shape[1], -1, DIM))
        queries = BatchQueries(q_BQAD, list(range(len(answers))), answers)
        return queries.importance(layer, self.keys[layer][:, heads], SCALE)

    @cached_property
    def content(self) -> list[Tensor]:
        """Keys before rotation."""
        position_BT = torch.arange(self.keys[0].shape[2]).expand(len(TEXTS), -1)
        return [rope().unrotate(k_BHTD, position_BT) for k_BHTD in self.keys]

    def prefill(
        self, batch: Sequence[TokenizedSample], layers: Sequence[int], with_importance: bool, sink: LayerSink
    ) -> None:
        """All heads at once, as in `LayerwiseModel`."""
        for layer in layers:
            importance = self.importance(layer, slice(None)) if with_importance else (None, None)
            sink(LayerOutput(layer, self.content[layer], self.values[layer], *importance))


def one_process_outcome(model: Model, plans: Sequence[KVPlan]) -> Outcome:
    outcome = Outcome()
    batch = [planned(row, plan) for row, plan in enumerate(plans)]
    execute(model, batch, outcome.results.append, outcome.failures.append)
    return outcome


def messages_of_rank(model: Model, share: HeadShare, plans: Sequence[KVPlan], layers: Sequence[int]) -> list[bytes]:
    """The messages of one rank for the layers of its pipeline stage."""
    batch = [planned(row, plan) for row, plan in enumerate(plans)]
    rows = [WorkerRow.unpack(worker_row(f"tag {row}", sample).pack()) for row, sample in enumerate(batch)]
    gathered = any(share.needs_others(plan) for plan in plans)
    step = WorkerStep(rows, [len(tokens.token_ids) for tokens in samples()], rope(), share, gathered=gathered)
    heads = slice(None) if gathered else slice(share.first, share.first + share.count)
    sent: list[bytes] = []
    for layer in sorted(step.layers & set(layers)):
        index = step.needed_BT[:, None, :, None]
        k_BHND, v_BHND = (
            x[:, heads].gather(2, index.expand(-1, x[:, heads].shape[1], -1, DIM))
            for x in (model.keys[layer], model.values[layer])
        )
        wants = any(row.answer_A.size for row in rows)
        importance = _importance_of_rank(model, layer, share, gathered=gathered) if wants else (None, None)
        sent += [pack(message) for message in step.messages(LayerOutput(layer, k_BHND, v_BHND, *importance))]
    return sent


def _importance_of_rank(model: Model, layer: int, share: HeadShare, *, gathered: bool) -> tuple[Tensor, Tensor]:
    assert gathered or share.copies == 1, "a copy of a head has but some of its query heads"
    return model.importance(layer, slice(None) if gathered else slice(share.first, share.first + share.count))


def ranks_of(count: int) -> list[HeadShare]:
    return [HeadShare.of(rank, count, HEADS) for rank in range(count)]


def planned(row: int, plan: KVPlan) -> PlannedSample:
    return PlannedSample(samples()[row], plan, MAPS[plan.map.digest] if plan.map else None)


def assembly_of(*plans: KVPlan) -> Assembly:
    numbered = list(enumerate(plans))
    return Assembly([f"tag {row}" for row, _ in numbered], [planned(row, plan) for row, plan in numbered], HEADS)


def assemble(plans: Sequence[KVPlan], payloads: Sequence[bytes]) -> Outcome:
    assembly, outcome = assembly_of(*plans), Outcome()
    for payload in payloads:
        results, failures = assembly.take(unpack(payload))
        outcome.results += results
        outcome.failures += failures
    assert not assembly.open_rows()
    return outcome


def assert_same(found: Outcome, expected: Outcome, model: Model, plans: Sequence[KVPlan]) -> None:
    assert sorted(f.index for f in found.failures) == sorted(f.index for f in expected.failures)
    for row, plan in enumerate(plans):
        if row in {failure.index for failure in found.failures}:
            continue
        assert [result.layer for result, _ in found.of(row)] == list(plan.layers)
        for (have, at), (want, place) in zip(found.of(row), expected.of(row), strict=True):
            assert have.positions[at].tolist() == want.positions[place].tolist()
            assert have.parts.keys() == want.parts.keys()
            for name, part in want.parts.items():
                assert have.parts[name].dtype == part.dtype
                # If cosines differ in the last bit, codes and the rounding of scales may differ.
                atol, rtol = TOLERANCES[name.partition(".")[2]]
                torch.testing.assert_close(have.parts[name][at].float(), part[place].float(), atol=atol, rtol=rtol)
            for kind in TENSORS:
                assert have.relative_error[kind][at] == pytest.approx(error_of(have, at, kind, plan, model), abs=1e-6)
                assert have.relative_error[kind][at] == pytest.approx(want.relative_error[kind][place], abs=1e-6)


def error_of(result: LayerResult, place: int, kind: str, plan: KVPlan, model: Model) -> float:
    """Relative error by its definition, in fp64."""
    row = result.indices[place]
    x_HTD = (model.content if kind == "k" else model.values)[result.layer][row]
    index_HMD = result.positions[place].long()[..., None].expand(HEADS, -1, DIM)
    parts = {name[2:]: part[place] for name, part in result.parts.items() if name[0] == kind}
    exact = x_HTD.gather(1, index_HMD).double()
    if plan.map is not None:
        exact = naive_mapped(MAPS[plan.map.digest], exact, result.layer, "k" if kind == "k" else "v")
    decoded = decode(parts, "k" if kind == "k" else "v", plan.codec).double()
    return float((decoded - exact).norm() / exact.norm())


# ---------------------------------------------------------------------------------------------------- whole batches


@pytest.mark.parametrize("codec", [RAW, INT8], ids=["raw", "int8"])
@pytest.mark.parametrize("scope", ["head", "layer", "sample"])
@pytest.mark.parametrize("selector", SELECTORS)
def test_assembled_ranks_equal_one_process(selector: str, scope: str, codec: CodecSpec) -> None:
    model, plans = Model.random(), [plan_of(selector, scope, codec)] * len(TEXTS)
    expected = one_process_outcome(model, plans)
    for ranks in (1, 4, 8, 16) if selector == "r_kv" and codec == INT8 else (2,) if codec == RAW else (16,):
        sent = [messages_of_rank(model, share, plans, range(LAYERS)) for share in ranks_of(ranks)]
        assert sum(map(bool, sent)) == min(ranks, HEADS), "copies of a head are sent once"
        assert_same(assemble(plans, list(itertools.chain(*sent))), expected, model, plans)


@pytest.mark.parametrize("codec", [RAW, INT8], ids=["raw", "int8"])
@pytest.mark.parametrize("selector", ["full", "r_kv", "keydiff"])
def test_maps_are_applied_where_all_heads_meet(selector: str, codec: CodecSpec) -> None:
    model, unmapped = Model.random(), plan_of(selector, "sample", codec)
    first, second = (unmapped.with_map(kv_map.named) for kv_map in MAPS.values())
    plans = [first, second, first, unmapped]
    expected = one_process_outcome(model, plans)
    for ranks in (1, 4, 16):
        sent = [messages_of_rank(model, share, plans, range(LAYERS)) for share in ranks_of(ranks)]
        found = assemble(plans, list(itertools.chain(*sent)))
        assert not found.failures
        assert_same(found, expected, model, plans)


def test_a_mapped_sample_that_is_over_its_budget_fails_alone() -> None:
    model, codec = Model.random(), INT8.model_copy(update={"max_relative_error": 1e-9})
    mapped = plan_of("right", "sample", INT8).with_map(next(iter(MAPS.values())).named)
    plans = [mapped, mapped.model_copy(update={"codec": codec}), mapped, mapped]
    sent = [messages_of_rank(model, share, plans, range(LAYERS)) for share in ranks_of(4)]
    found = assemble(plans, list(itertools.chain(*sent)))
    assert [failure.index for failure in found.failures] == [1]
    assert_same(found, one_process_outcome(model, plans), model, plans)


@cache
def mixed() -> tuple[Model, list[KVPlan], Outcome, list[list[bytes]]]:
    """Four ranks in each of two stages, mixed plans in one pass, and one sample that exceeds its error budget."""
    wide = KVPlan(layers=(0, 1, 2), selection=Selection(selector="full"), codec=INT8)
    strict = wide.model_copy(update={"codec": INT8.model_copy(update={"max_relative_error": 1e-9})})
    plans = [wide, strict, plan_of("r_kv", "layer", layers=(0, 1, 2)), plan_of("right", "head", layers=(1, 2))]
    model = Model.random()
    sent = [messages_of_rank(model, share, plans, stage) for share in ranks_of(4) for stage in ([0], [1, 2])]
    return model, plans, one_process_outcome(model, plans), sent


@settings(max_examples=40)
@given(data=st.data())
def test_messages_of_workers_may_arrive_in_any_order(data: st.DataObject) -> None:
    model, plans, expected, sent = mixed()
    queues = [iter(payloads) for payloads in sent]
    owners = [worker for worker, payloads in enumerate(sent) for _ in payloads]
    order = data.draw(st.permutations(owners))
    found = assemble(plans, [next(queues[worker]) for worker in order])
    assert [failure.index for failure in found.failures] == [1]
    assert not any(len(result.indices) == 0 for result in found.results)
    assert_same(found, expected, model, plans)


def test_duplicates_and_messages_of_other_batches_are_ignored() -> None:
    model, plans, expected, sent = mixed()
    payloads = list(itertools.chain(*sent))
    other = message(["kv-of-before"], layer=0)
    doubled = [pack(other), *(one for payload in payloads for one in (payload, payload)), pack(other), *payloads]
    assert_same(assemble(plans, doubled), expected, model, plans)


def test_only_the_sample_that_a_rank_cannot_encode_fails() -> None:
    model = Model.random()
    model.values[2][1, 5] = torch.nan
    plans = [plan_of("right", "layer")] * len(TEXTS)
    sent = [messages_of_rank(model, share, plans, range(LAYERS)) for share in ranks_of(4)]
    found = assemble(plans, list(itertools.chain(*sent)))
    assert [failure.index for failure in found.failures] == [1]
    assert "not finite" in found.failures[0].problem
    assert_same(found, one_process_outcome(model, plans), model, plans)


def test_a_rank_without_the_heads_that_its_plans_need_raises() -> None:
    with pytest.raises(AssertionError, match="other ranks' heads"):
        WorkerStep(
            [worker_row("a", PlannedSample(samples()[0], plan_of("keydiff", "layer")))],
            [len(samples()[0].token_ids)],
            rope(),
            HeadShare.of(0, 2, HEADS),
            gathered=False,
        )


# ---------------------------------------------------------------------------------------------------- shares of heads


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16, 32])
def test_every_head_is_sent_once(ranks: int) -> None:
    shares = ranks_of(ranks)
    sent = [head for share in shares if share.sends for head in range(share.first, share.first + share.count)]
    assert sent == list(range(HEADS))
    assert [share.first for share in shares] == sorted(share.first for share in shares)
    assert all(share.copies == max(1, ranks // HEADS) for share in shares)


@pytest.mark.parametrize(
    ("selector", "scope", "ranks", "needed"),
    [
        ("r_kv", "head", 1, False),
        ("random", "head", 1, False),
        ("r_kv", "head", 8, False),
        # Two ranks have the query heads of one KV head.
        ("r_kv", "head", 16, True),
        ("keydiff", "head", 16, False),
        ("keydiff", "layer", 2, True),
        ("keydiff", "sample", 2, True),
        ("random", "head", 2, True),
        ("right", "layer", 16, False),
    ],
)
def test_ranks_gather_heads_if_the_selection_depends_on_them(
    selector: str, scope: str, ranks: int, needed: bool
) -> None:
    assert HeadShare.of(0, ranks, HEADS).needs_others(plan_of(selector, scope)) == needed


def test_copies_of_a_single_head_gather_only_attention() -> None:
    share = HeadShare.of(1, 2, 1)
    assert share.needs_others(plan_of("r_kv", "layer"))
    assert not share.needs_others(plan_of("keydiff", "layer"))


# ---------------------------------------------------------------------------------------------------- single messages


def message(
    tags: list[str], layer: int, heads_from: int = 0, heads: int = HEADS, error: float = 0.0, norm: float = 1.0
) -> LayerMessage:
    return LayerMessage(
        tags=tags,
        layer=layer,
        heads_from=heads_from,
        heads=heads,
        parts={"k.data": torch.full((len(tags), heads, 2, DIM), float(layer))},
        positions=torch.zeros(len(tags), 1, 2, dtype=torch.int32),
        relative_error={"k": [error] * len(tags)},
        norms={"k": [norm] * len(tags)},
        encode_s=0.0,
    )


FULL = KVPlan(layers=(0, 1, 2), selection=Selection(selector="full"), codec=RAW)


def test_layers_are_emitted_in_order() -> None:
    assembly = assembly_of(FULL)
    assert assembly.take(message(["tag 0"], 2)) == ([], [])
    assert assembly.take(message(["tag 0"], 1)) == ([], [])
    results, failures = assembly.take(message(["tag 0"], 0))
    assert [result.layer for result in results] == [0, 1, 2]
    assert not failures
    assert not assembly.is_open(0)


def test_samples_that_share_some_messages_get_their_layers_in_order() -> None:
    assembly, both = assembly_of(FULL, FULL), ["tag 0", "tag 1"]
    half = HEADS // 2
    for held in (message(both, 1, 0, half), message(both, 1, half, half)):
        assert assembly.take(held) == ([], [])
    for tag in both:
        assert assembly.take(message([tag], 0, half, half)) == ([], [])
    results, _ = assembly.take(message(both, 0, 0, half))
    for row in (0, 1):
        assert [result.layer for result in results if row in result.indices] == [0, 1]


@pytest.mark.parametrize(
    ("errors", "norms", "fails"),
    [((0.2, 0.0), (1.0, 10.0), False), ((0.0, 0.2), (1.0, 10.0), True), ((0.0, 0.0), (0.0, 0.0), False)],
)
def test_the_error_budget_applies_to_all_heads_together(
    errors: tuple[float, float], norms: tuple[float, float], fails: bool
) -> None:
    codec = RAW.model_copy(update={"max_relative_error": 0.1})
    assembly, half = assembly_of(FULL.model_copy(update={"codec": codec, "layers": (0,)})), HEADS // 2
    assembly.take(message(["tag 0"], 0, 0, half, errors[0], norms[0]))
    results, failures = assembly.take(message(["tag 0"], 0, half, half, errors[1], norms[1]))
    assert bool(results) != fails
    assert [failure.index for failure in failures] == [0] * fails
    assert all("max_relative_error is 0.1" in failure.problem for failure in failures)


def test_each_sample_of_a_message_has_its_own_budget() -> None:
    strict = FULL.model_copy(update={"codec": RAW.model_copy(update={"max_relative_error": 0.1})})
    assembly = assembly_of(FULL, strict)
    results, failures = assembly.take(message(["tag 0", "tag 1"], 0, error=0.5))
    assert [result.indices for result in results] == [[0]]
    assert [failure.index for failure in failures] == [1]


def test_a_sample_over_budget_emits_no_other_layer_of_the_same_message() -> None:
    codec = RAW.model_copy(update={"max_relative_error": 0.1})
    assembly = assembly_of(FULL.model_copy(update={"codec": codec}))
    assembly.take(message(["tag 0"], 1, error=0.5))
    results, failures = assembly.take(message(["tag 0"], 0))
    assert results == []
    assert [failure.index for failure in failures] == [0]
    assert assembly.take(message(["tag 0"], 2)) == ([], [])


def test_failure_messages_fail_only_their_samples_and_only_once() -> None:
    assembly = assembly_of(FULL, FULL, FULL)
    failure = FailureMessage(["tag 1", "of another batch"], "no memory")
    assert [(f.index, f.problem) for f in assembly.take(failure)[1]] == [(1, "no memory")]
    assert assembly.take(failure) == ([], [])
    results, _ = assembly.take(message(["tag 0", "tag 1", "tag 2"], 0))
    assert [result.indices for result in results] == [[0, 2]]
    assembly.drop(2)
    assert assembly.open_rows() == [0]


def test_ranks_with_different_selections_raise() -> None:
    assembly, half = assembly_of(FULL), HEADS // 2
    assembly.take(message(["tag 0"], 0, 0, half))
    other = message(["tag 0"], 0, half, half)
    with pytest.raises(AssertionError, match="ranks chose differently"):
        assembly.take(replace(other, positions=other.positions + 1))
