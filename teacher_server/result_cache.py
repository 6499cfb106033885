"""Keeps the encoded K/V of recent samples, so that the same sample under the same plan is computed once.

The key of an entry is the sample key: the hash of the teacher's weights, of the whole plan (layers, selection, codec
and map), and of the sample's content. A server never changes its weights, and its cache ends with it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from kvcore.plan import KVPlan
from kvcore.types import Tensor
from teacher_server.engines.base import (
    Emit,
    ExecutionTimings,
    Fail,
    LayerResult,
    PlannedSample,
    SampleFailure,
    TeacherEngine,
    Wanted,
)
from teacher_server.monitoring.metrics import Metrics

# Shorter samples take hardly any time. Above all, the samples by which clients compare replicas must reach the model.
LEAST_TOKENS = 32
# Of an entry's Python objects.
ENTRY_BYTES = 4096


@dataclass(frozen=True, slots=True)
class KeptResult:
    """One sample under one plan, as the layers of `LayerResult` stacked: each part [L, ...], positions [L,H|1,M].

    `relative_error`: by kind, one value per layer.
    """

    parts: dict[str, Tensor]
    positions_LHM: Tensor
    relative_error: dict[str, list[float]]

    @classmethod
    def of(cls, layers: Sequence[tuple[LayerResult, int]]) -> KeptResult:
        """Copies one sample's layers, in ascending order. Each is a result and the sample's index in it."""
        first, _ = layers[0]
        return cls(
            {name: torch.stack([result.parts[name][place] for result, place in layers]) for name in first.parts},
            torch.stack([result.positions[place] for result, place in layers]),
            {kind: [result.relative_error[kind][place] for result, place in layers] for kind in first.relative_error},
        )

    @property
    def nbytes(self) -> int:
        """Memory that the entry takes."""
        return ENTRY_BYTES + self.positions_LHM.nbytes + sum(part.nbytes for part in self.parts.values())

    @property
    def slots(self) -> int:
        """M: the number of selected tokens."""
        return self.positions_LHM.shape[-1]


class ResultCache:
    """The least recently used entries are dropped when there is no room.

    Args:
        max_bytes: of all entries. A larger one is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: dict[str, KeptResult] = {}
        self.nbytes = 0

    def get(self, key: str) -> KeptResult | None:
        """The entry, which now is the most recently used one."""
        found = self._entries.pop(key, None)
        if found is not None:
            self._entries[key] = found
        return found

    def add(self, key: str, entry: KeptResult) -> None:
        """Keep an entry."""
        if key in self._entries or entry.nbytes > self._max_bytes:
            return
        while self.nbytes + entry.nbytes > self._max_bytes:
            self.nbytes -= self._entries.pop(next(iter(self._entries))).nbytes
        self._entries[key] = entry
        self.nbytes += entry.nbytes

    def clear(self) -> None:
        """Drop all entries."""
        self._entries.clear()
        self.nbytes = 0


@dataclass(slots=True)
class _Computed:
    """A sample that the engine computes. `rows`: of the batch that get its result. `layers`: those that have arrived.

    `key`: under which it is kept; None if it is not. `failures`: of the engine before.
    """

    sample: PlannedSample
    rows: list[int]
    key: str | None
    failures: int = 0
    layers: list[tuple[LayerResult, int]] = field(default_factory=list)


class CachedRuns:
    """Runs batches on an engine. What is kept is not computed again, and equal samples of a batch are computed once.

    Any thread may call `run`. What one call computes is not computed by another one at the same time.

    Args:
        engine: computes what is not kept.
        max_bytes: of the cache; 0 passes every batch to the engine.
        metrics: of the server.
    """

    def __init__(self, engine: TeacherEngine, max_bytes: int, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._cache = ResultCache(max_bytes)
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._in_flight: set[str] = set()
        self._failures = 0

    def run(self, batch: Sequence[PlannedSample], emit: Emit, fail: Fail, wanted: Wanted) -> ExecutionTimings:
        """See `TeacherEngine.run`. The timings name the rows that were not computed."""
        if not self._max_bytes:
            return self._engine.run(batch, emit, fail, wanted)
        left, timings = list(range(len(batch))), ExecutionTimings(0.0, 0.0)
        while left:
            kept, computed, left = self._claim(batch, left)
            reused = {row for _, rows in kept for row in rows} | {row for one in computed for row in one.rows[1:]}
            self._metrics.cache_hits.inc(len(reused))
            self._metrics.cache_misses.inc(sum(one.key is not None for one in computed))
            timings = replace(timings, reused=timings.reused | reused)
            try:
                _emit_kept(batch, kept, emit)
                if computed:
                    timings = _sum(timings, self._compute(computed, emit, fail, wanted))
            finally:
                with self._changed:
                    self._in_flight.difference_update(one.key for one in computed if one.key is not None)
                    self._changed.notify_all()
        self._metrics.cache_bytes.set(self._cache.nbytes)
        return timings

    def _claim(
        self, batch: Sequence[PlannedSample], rows: Sequence[int]
    ) -> tuple[list[tuple[KeptResult, list[int]]], list[_Computed], list[int]]:
        """The kept results with their rows, what this call is to compute, and the rows that another call computes.

        Waits while all rows are computed by other calls.
        """
        computed: list[_Computed] = []
        rows_of: dict[str, list[int]] = {}
        for row in rows:
            sample = batch[row]
            if len(sample.tokens.token_ids) < LEAST_TOKENS:
                computed.append(_Computed(sample, [row], None))
            else:
                key = sample.tokens.sample.key(self._engine.info.weights_digest, sample.plan)
                rows_of.setdefault(key, []).append(row)
        kept: list[tuple[KeptResult, list[int]]] = []
        with self._changed:
            self._changed.wait_for(lambda: computed or not self._in_flight.issuperset(rows_of))
            elsewhere = self._in_flight & rows_of.keys()
            for key in rows_of.keys() - elsewhere:
                entry = self._cache.get(key)
                if entry is None:
                    computed.append(_Computed(batch[rows_of[key][0]], rows_of[key], key, self._failures))
                    self._in_flight.add(key)
                else:
                    kept.append((entry, rows_of[key]))
        computed.sort(key=lambda one: one.rows[0])
        return kept, computed, sorted(row for key in elsewhere for row in rows_of[key])

    def _compute(self, computed: Sequence[_Computed], emit: Emit, fail: Fail, wanted: Wanted) -> ExecutionTimings:
        def emit_to_all(result: LayerResult) -> None:
            for place, index in enumerate(result.indices):
                if computed[index].key is not None:
                    self._take(computed[index], result, place)
            places = [place for place, index in enumerate(result.indices) for _ in computed[index].rows]
            rows = [row for index in result.indices for row in computed[index].rows]
            emit(replace(result.subset(places), indices=rows))

        def fail_all(failure: SampleFailure) -> None:
            for row in computed[failure.index].rows:
                fail(SampleFailure(row, failure.problem))

        def any_wanted(index: int) -> bool:
            return any(wanted(row) for row in computed[index].rows)

        try:
            return self._engine.run([one.sample for one in computed], emit_to_all, fail_all, any_wanted)
        except Exception:
            # The self-test that follows must reach the engine, and what a broken engine computed is not to be trusted,
            # in other batches that run now either.
            with self._changed:
                self._failures += 1
                self._cache.clear()
            raise

    def _take(self, one: _Computed, result: LayerResult, place: int) -> None:
        one.layers.append((result, place))
        if len(one.layers) == len(one.sample.plan.layers):
            assert one.key is not None
            entry = KeptResult.of(one.layers)
            one.layers.clear()
            with self._changed:
                if one.failures == self._failures:
                    self._cache.add(one.key, entry)


def _sum(some: ExecutionTimings, more: ExecutionTimings) -> ExecutionTimings:
    """The timings of both, with the reused rows of the first."""
    return ExecutionTimings(
        some.prefill_s + more.prefill_s,
        some.encode_s + more.encode_s,
        some.cached_tokens + more.cached_tokens,
        some.reused,
    )


def _emit_kept(batch: Sequence[PlannedSample], kept: Sequence[tuple[KeptResult, list[int]]], emit: Emit) -> None:
    """Emits kept results layer by layer, those with equal plans and slots together."""
    groups: dict[tuple[KVPlan, int], list[tuple[KeptResult, int]]] = {}
    for entry, rows in kept:
        group = groups.setdefault((batch[rows[0]].plan, entry.slots), [])
        group += [(entry, row) for row in rows]
    for (plan, _), group in groups.items():
        for number, layer in enumerate(plan.layers):
            emit(_layer_of(group, number, layer))


def _layer_of(group: Sequence[tuple[KeptResult, int]], number: int, layer: int) -> LayerResult:
    entries = [entry for entry, _ in group]
    return LayerResult(
        [row for _, row in group],
        layer,
        {name: torch.stack([entry.parts[name][number] for entry in entries]) for name in entries[0].parts},
        torch.stack([entry.positions_LHM[number] for entry in entries]),
        {kind: [entry.relative_error[kind][number] for entry in entries] for kind in entries[0].relative_error},
    )
