"""A server's cache of results: what is kept is sent again without the engine, and with the same content."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvcore.plan import CodecSpec, KVPlan, PlanMap, Selection
from kvcore.types import Sample, Span, TeacherInfo
from teacher_server.config import ServeConfig
from teacher_server.engines.base import (
    Emit,
    ExecutionTimings,
    Fail,
    LayerResult,
    PlannedSample,
    SampleFailure,
    Wanted,
)
from teacher_server.engines.fake import FakeEngine, FakeFaults, FakeModel
from teacher_server.monitoring.metrics import Metrics
from teacher_server.result_cache import ENTRY_BYTES, LEAST_TOKENS, CachedRuns, KeptResult, ResultCache
from tests.support.kv_maps import coded_map
from tests.support.servers import wait_until

PLAN = KVPlan(layers=(0, 2), selection=Selection(selector="right", budget=8, span="all"), codec=CodecSpec(name="int4"))
CONFIG = ServeConfig(model="fake:layers=3", engine="fake")
ROOM = 1 << 20


class CountingEngine(FakeEngine):
    """Records the sample ids of every batch."""

    def __init__(self, faults: FakeFaults | None = None) -> None:
        super().__init__(CONFIG, FakeModel(layers=3), faults)
        self.batches: list[list[str]] = []
        self.weights, self.computes = "first", True

    @property
    def info(self) -> TeacherInfo:
        return replace(super().info, weights_digest=self.weights)

    def run(self, batch: Sequence[PlannedSample], emit: Emit, fail: Fail, wanted: Wanted) -> ExecutionTimings:
        self.batches.append([sample.tokens.sample.id for sample in batch])
        return super().run(batch, emit, fail, wanted) if self.computes else ExecutionTimings(0.0, 0.0)


def sample_of(number: int, tokens: int = 40, name: str | None = None) -> Sample:
    ids = tuple((number * 31 + place) % 250 for place in range(tokens))
    return Sample(name or f"s{number}", token_ids=ids, spans=(Span("answer", tokens - 5, tokens),))


class Server:
    """`CachedRuns` around a counting engine."""

    def __init__(self, max_bytes: int = ROOM, faults: FakeFaults | None = None) -> None:
        self.engine, self.metrics = CountingEngine(faults), Metrics()
        self.runs = CachedRuns(self.engine, max_bytes, self.metrics)
        self.failures: list[SampleFailure] = []
        self.timings = ExecutionTimings(0.0, 0.0)

    def planned(self, samples: Sequence[Sample], plan: KVPlan = PLAN) -> list[PlannedSample]:
        return [PlannedSample(self.engine.tokenize(sample), plan) for sample in samples]

    def run(
        self, batch: Sequence[PlannedSample], wanted: Wanted = lambda _row: True
    ) -> dict[int, list[tuple[int, dict[str, Any]]]]:
        """Each row's layers in the order in which they came: number and content."""
        found: dict[int, list[tuple[int, dict[str, Any]]]] = {}

        def emit(result: LayerResult) -> None:
            for place, row in enumerate(result.indices):
                errors = {kind: values[place] for kind, values in result.relative_error.items()}
                parts = {name: part[place].tolist() for name, part in result.parts.items()}
                content = {**parts, "positions": result.positions[place].tolist(), "errors": errors}
                found.setdefault(row, []).append((result.layer, content))

        self.timings = self.runs.run(batch, emit, self.failures.append, wanted)
        return found

    def count(self, name: str) -> float:
        return self.metrics.registry.get_sample_value(f"kvdistill_cache_{name}") or 0.0


@pytest.mark.parametrize("codec", ["raw", "int8", "int4"])
@pytest.mark.parametrize(
    "selection",
    [
        Selection(selector="right", budget=8, span="all"),
        Selection(selector="r_kv", budget=8, span="all", scope="layer"),
        Selection(selector="r_kv", budget=8, span="all", scope="head"),
        Selection(selector="r_kv", budget=8, span="all", scope="sample"),
        Selection(selector="random", budget=8, span="all", seed=3),
    ],
)
def test_a_sample_that_is_asked_again_is_sent_without_the_engine_and_with_the_same_content(
    codec: str, selection: Selection
) -> None:
    server, plan = Server(), KVPlan(layers=(0, 2), selection=selection, codec=CodecSpec(name=codec))
    samples = [sample_of(number) for number in range(3)]
    first = server.run(server.planned(samples, plan))
    again = server.run(server.planned([samples[2], sample_of(9), samples[0]], plan))
    assert server.engine.batches == [["s0", "s1", "s2"], ["s9"]]
    assert [layer for layer, _ in again[0]] == [0, 2]
    assert (again[0], again[2]) == (first[2], first[0])
    assert server.timings.reused == {0, 2}
    assert (server.count("hits_total"), server.count("misses_total")) == (2, 4)
    assert again[1] == Server().run(server.planned([sample_of(9)], plan))[0]


def test_mapped_samples_are_kept_for_their_map_alone() -> None:
    server = Server()
    batches: list[list[PlannedSample]] = []
    for seed in (0, 1):
        kv_map = coded_map(PLAN.layers, heads=2, head_dim=16, seed=seed)
        plan = PLAN.with_map(kv_map.named, CodecSpec(name="pca"))
        batches.append([replace(one, kv_map=kv_map) for one in server.planned([sample_of(0), sample_of(1)], plan)])
    first, other = (server.run(batch) for batch in batches)
    assert first != other
    assert [server.run(batch) for batch in batches] == [first, other]
    assert server.engine.batches == [["s0", "s1"]] * 2


def test_samples_of_different_plans_and_lengths_of_a_batch_are_kept_apart() -> None:
    server = Server()
    full = KVPlan(layers=(1,), selection=Selection(selector="full", span="all"))
    batch = [
        *server.planned([sample_of(0), sample_of(1, 50)]),
        *server.planned([sample_of(0), sample_of(1, 50)], full),
    ]
    first = server.run(batch)
    assert server.run(list(reversed(batch))) == {3 - row: layers for row, layers in first.items()}
    assert len(server.engine.batches) == 1


def test_equal_samples_of_a_batch_are_computed_once() -> None:
    server = Server()
    twins = [sample_of(1, name="a"), sample_of(2, name="b"), sample_of(1, name="c")]
    found = server.run(server.planned(twins))
    assert server.engine.batches == [["a", "b"]]
    assert found[0] == found[2] != found[1]
    assert server.timings.reused == {2}
    assert (server.count("hits_total"), server.count("misses_total")) == (1, 2)


CHANGES: dict[str, Callable[[PlannedSample], PlannedSample]] = {
    "layers": lambda one: replace(one, plan=one.plan.model_copy(update={"layers": (0, 1)})),
    "selection": lambda one: replace(one, plan=one.plan.model_copy(update={"selection": Selection(span="all")})),
    "codec": lambda one: replace(
        one, plan=one.plan.model_copy(update={"codec": CodecSpec(name="int4", group_size=32)})
    ),
    "map": lambda one: replace(one, plan=one.plan.with_map(PlanMap(digest="0" * 32, heads=1, head_dim=4))),
    "spans": lambda one: replace(one, tokens=replace(one.tokens, sample=replace(one.tokens.sample, spans=()))),
    "text": lambda one: replace(
        one, tokens=replace(one.tokens, sample=replace(one.tokens.sample, token_ids=(1,) * 40))
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_plan_map_codec_or_content_is_computed(change: Callable[[PlannedSample], PlannedSample]) -> None:
    server = Server()
    (planned,) = server.planned([sample_of(0)])
    server.run([planned])
    # It matters only whether the engine is asked.
    server.engine.computes = False
    server.run([change(planned)])
    assert len(server.engine.batches) == 2
    server.run([planned])
    assert len(server.engine.batches) == 2


def test_other_weights_are_asked_again() -> None:
    server = Server()
    server.run(server.planned([sample_of(0)]))
    server.engine.weights = "second"
    server.run(server.planned([sample_of(0)]))
    assert server.engine.batches == [["s0"], ["s0"]]


def test_the_engine_is_asked_for_short_samples_by_which_replicas_are_compared() -> None:
    server = Server()
    for _ in range(2):
        server.run(server.planned([sample_of(0, LEAST_TOKENS - 1), sample_of(1, LEAST_TOKENS)]))
    assert server.engine.batches == [["s0", "s1"], ["s0"]]
    assert server.timings.reused == {1}


def test_nothing_is_kept_without_room() -> None:
    server = Server(max_bytes=0)
    for _ in range(2):
        server.run(server.planned([sample_of(0), sample_of(0, name="twin")]))
    assert server.engine.batches == [["s0", "twin"]] * 2
    assert (server.count("hits_total"), server.count("misses_total")) == (0, 0)


def test_a_failed_engine_loses_what_is_kept_so_that_the_self_test_reaches_it() -> None:
    server = Server(faults=FakeFaults(fail=frozenset({"bad"})))
    server.run(server.planned([sample_of(0)]))
    with pytest.raises(RuntimeError, match="injected fault"):
        server.run(server.planned([sample_of(5, name="bad")]))
    server.run(server.planned([sample_of(0)]))
    assert server.engine.batches == [["s0"], ["bad"], ["s0"]]


def test_a_failed_sample_is_not_kept_and_fails_for_all_who_ask() -> None:
    server = Server(faults=FakeFaults(not_finite=frozenset({"nan"})))
    batch = server.planned([sample_of(1), sample_of(3, name="nan"), sample_of(3, name="twin")])
    assert set(server.run(batch)) == {0}
    assert sorted(failure.index for failure in server.failures) == [1, 2]
    server.run(batch[1:])
    assert server.engine.batches == [["s1", "nan"], ["nan"]]


def test_a_sample_is_computed_while_one_of_its_callers_waits() -> None:
    server = Server()
    batch = server.planned([sample_of(0), sample_of(0, name="twin"), sample_of(1)])
    found = server.run(batch, lambda row: row == 1)
    assert 1 in found
    assert 2 not in found
    assert set(server.run([batch[2]])) == {0}
    assert server.engine.batches == [["s0", "s1"], ["s1"]]


class GatedEngine(CountingEngine):
    """Waits for its gate when it has begun a batch."""

    def __init__(self) -> None:
        super().__init__(FakeFaults(fail=frozenset({"bad"})))
        self.begun, self.gate = threading.Event(), threading.Event()

    def run(self, batch: Sequence[PlannedSample], emit: Emit, fail: Fail, wanted: Wanted) -> ExecutionTimings:
        self.begun.set()
        assert self.gate.wait(20)
        return super().run(batch, emit, fail, wanted)


class GatedServer(Server):
    """`CachedRuns` around a gated engine, whose batches run in threads."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = self.gated = GatedEngine()
        self.runs = CachedRuns(self.engine, ROOM, self.metrics)
        self.pool = ThreadPoolExecutor(2)

    def start(self, batch: Sequence[PlannedSample]) -> Future[dict[int, list[tuple[int, dict[str, Any]]]]]:
        """Starts a batch; returns when the engine has begun it, or when it waits for another one."""
        self.gated.begun.clear()
        started = self.pool.submit(self.run, batch)
        wait_until(lambda: self.gated.begun.is_set() or bool(self.runs._changed._waiters))  # type: ignore[attr-defined]
        return started


def test_a_sample_that_another_batch_computes_is_not_computed_twice() -> None:
    server = GatedServer()
    first = server.start(server.planned([sample_of(0), sample_of(1)]))
    second = server.start(server.planned([sample_of(1, name="twin")]))
    assert not second.done()
    server.gated.gate.set()
    assert second.result(20)[0] == first.result(20)[1]
    assert server.engine.batches == [["s0", "s1"]]
    assert (server.count("hits_total"), server.count("misses_total")) == (1, 2)


@pytest.mark.parametrize("tokens", [LEAST_TOKENS - 1, LEAST_TOKENS])
def test_a_batch_computes_its_other_samples_while_another_one_computes_the_first(tokens: int) -> None:
    server = GatedServer()
    first = server.start(server.planned([sample_of(0)]))
    second = server.start(server.planned([sample_of(0, name="twin"), sample_of(2, tokens)]))
    assert server.gated.begun.is_set()
    server.gated.gate.set()
    found = second.result(20)
    assert (found[0], set(found)) == (first.result(20)[0], {0, 1})
    assert sorted(server.engine.batches) == [["s0"], ["s2"]]


def test_a_sample_is_computed_if_the_batch_that_it_waited_for_failed() -> None:
    server = GatedServer()
    first = server.start(server.planned([sample_of(0), sample_of(7, name="bad")]))
    second = server.start(server.planned([sample_of(0, name="twin")]))
    server.gated.gate.set()
    with pytest.raises(RuntimeError, match="injected fault"):
        first.result(20)
    assert set(second.result(20)) == {0}
    assert server.engine.batches == [["s0", "bad"], ["twin"]]


def entry(size: int) -> KeptResult:
    """An entry whose parts take `size` bytes."""
    positions = torch.zeros(1, 1, 1, dtype=torch.int32)
    return KeptResult({"k.data": torch.zeros(size, dtype=torch.uint8)}, positions, {})


def test_the_least_recently_used_entries_make_room() -> None:
    each = ENTRY_BYTES + 4 + 1000
    cache = ResultCache(3 * each)
    for key in "abc":
        cache.add(key, entry(1000))
    assert cache.get("a") is not None
    cache.add("d", entry(1000))
    assert [key for key in "abcd" if cache.get(key) is not None] == ["a", "c", "d"]
    cache.add("large", entry(2 * each - ENTRY_BYTES - 4))
    assert [key for key in ("a", "c", "d", "large") if cache.get(key) is not None] == ["d", "large"]
    assert cache.nbytes == 3 * each
    cache.add("too large", entry(3 * each))
    cache.add("d", entry(1000))
    assert cache.nbytes == 3 * each
    assert cache.get("too large") is None


def test_the_metric_has_the_memory_of_all_entries() -> None:
    server = Server()
    server.run(server.planned([sample_of(0), sample_of(1)]))
    one = server.count("bytes") / 2
    assert one > ENTRY_BYTES
    server = Server(max_bytes=int(2.5 * one))
    server.run(server.planned([sample_of(number) for number in range(5)]))
    assert server.count("bytes") == 2 * one


def test_a_callback_that_fails_on_a_kept_result_leaves_nothing_in_flight() -> None:
    server = Server()
    kept, other = server.planned([sample_of(1), sample_of(2)])
    server.run([kept])

    def broken(result: LayerResult) -> None:
        raise MemoryError(f"layer {result.layer}")

    with pytest.raises(MemoryError):
        server.runs.run([kept, other], broken, server.failures.append, lambda _row: True)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(server.run, [other]).result(timeout=20).keys() == {0}


def test_what_another_batch_computed_while_the_engine_failed_is_not_kept() -> None:
    server = Server()
    slow, broken = server.planned([sample_of(1), sample_of(2)])

    def fails_meanwhile(result: LayerResult) -> None:
        if result.layer == PLAN.layers[0]:
            with pytest.raises(MemoryError):
                server.runs.run([broken], refuses, server.failures.append, lambda _row: True)

    def refuses(result: LayerResult) -> None:
        raise MemoryError(f"layer {result.layer}")

    server.runs.run([slow], fails_meanwhile, server.failures.append, lambda _row: True)
    before = len(server.engine.batches)
    server.run([slow])
    assert len(server.engine.batches) == before + 1
