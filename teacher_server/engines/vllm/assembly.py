"""Assembles the messages of a batch's workers: heads of tensor-parallel ranks, layers of pipeline stages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from kvcore.plan import KVPlan
from kvcore.types import Tensor
from teacher_server.engines.base import LayerResult, PlannedSample, SampleFailure
from teacher_server.engines.vllm.message_queue import FailureMessage, LayerMessage, Message
from teacher_server.plan_execution import error_budget_problems, map_result

_Group = list[tuple[int, list[tuple[LayerMessage, int]]]]
"""Samples whose layer came in the same messages: each sample's row, and its pieces by ascending head."""


@dataclass(slots=True)
class _Row:
    """One sample. `pieces`: by layer and first head, a message and the sample's index in it."""

    planned: PlannedSample
    pieces: dict[int, dict[int, tuple[LayerMessage, int]]] = field(default_factory=dict)
    emitted: int = 0
    failed: bool = False

    @property
    def plan(self) -> KVPlan:
        return self.planned.plan

    @property
    def open(self) -> bool:
        return not self.failed and self.emitted < len(self.plan.layers)


class Assembly:
    """The samples of one batch that is being received.

    Args:
        tags: the name of each sample's request.
        samples: the samples, with their plans and maps.
        kv_heads: of the whole model; a layer is complete when all heads have arrived.
    """

    def __init__(self, tags: Sequence[str], samples: Sequence[PlannedSample], kv_heads: int) -> None:
        self._row_of = {tag: row for row, tag in enumerate(tags)}
        self._rows = [_Row(sample) for sample in samples]
        self._kv_heads = kv_heads

    def row_of(self, tag: str) -> int | None:
        """The row of a request's sample; None if it belongs to another batch."""
        return self._row_of.get(tag)

    def is_open(self, row: int) -> bool:
        """Whether a sample is neither complete nor failed."""
        return self._rows[row].open

    def open_rows(self) -> list[int]:
        """The rows of samples that are neither complete nor failed."""
        return [row for row, state in enumerate(self._rows) if state.open]

    def drop(self, row: int) -> None:
        """Ignore further messages about a sample."""
        self._rows[row].failed = True
        self._rows[row].pieces.clear()

    def take(self, message: Message) -> tuple[list[LayerResult], list[SampleFailure]]:
        """Add a message; returns the layers that it completes, in ascending order per sample, and failed samples.

        Ignores duplicates, as after a preemption, and requests of other batches.
        """
        rows = {self._row_of[tag]: place for place, tag in enumerate(message.tags) if tag in self._row_of}
        rows = {row: place for row, place in rows.items() if self._rows[row].open}
        if isinstance(message, FailureMessage):
            return [], [self._fail(row, message.problem) for row in rows]
        for row, place in rows.items():
            self._rows[row].pieces.setdefault(message.layer, {}).setdefault(message.heads_from, (message, place))
        assembled = [self._assemble(group) for group in self._complete(rows)]
        results, failures = self._mapped(assembled)
        results, over_budget = self._within_budget(results)
        return results, failures + over_budget

    def _fail(self, row: int, problem: str) -> SampleFailure:
        self.drop(row)
        return SampleFailure(row, problem)

    def _complete(self, rows: Iterable[int]) -> list[_Group]:
        """Layers with all heads that are next in their sample's order, grouped by plan and by their messages."""
        groups: dict[tuple[KVPlan, tuple[int, ...]], _Group] = {}
        for row in rows:
            state = self._rows[row]
            while state.open:
                pieces = state.pieces.get(state.plan.layers[state.emitted], {})
                if sum(message.heads for message, _ in pieces.values()) < self._kv_heads:
                    break
                ordered = [pieces[first] for first in sorted(pieces)]
                del state.pieces[state.plan.layers[state.emitted]]
                state.emitted += 1
                messages = tuple(id(message) for message, _ in ordered)
                groups.setdefault((state.plan, messages), []).append((row, ordered))
        return sorted(groups.values(), key=_layer_of)

    def _assemble(self, group: _Group) -> LayerResult:
        """Join the pieces of samples that share their messages into one result."""
        messages = [message for message, _ in group[0][1]]
        places = [[pieces[rank][1] for _, pieces in group] for rank in range(len(messages))]
        first = messages[0]
        parts = {
            name: torch.cat([_rows_of(m.parts[name], p) for m, p in zip(messages, places, strict=True)], dim=1)
            for name in first.parts
        }
        choices = [_rows_of(m.positions, p) for m, p in zip(messages, places, strict=True)]
        scope = self._rows[group[0][0]].plan.selection.scope
        positions = torch.cat(choices, dim=1) if scope == "head" else choices[0]
        assert scope == "head" or all(torch.equal(choice, positions) for choice in choices), "ranks chose differently"
        errors = {kind: _whole_error(kind, messages, places) for kind in first.relative_error}
        return LayerResult([row for row, _ in group], first.layer, parts, positions, errors)

    def _mapped(self, results: Sequence[LayerResult]) -> tuple[list[LayerResult], list[SampleFailure]]:
        """Apply the plans' maps, and encode as the plans ask; workers sent those samples in fp32."""
        mapped: list[LayerResult] = []
        failures: list[SampleFailure] = []
        for result in results:
            planned = self._rows[result.indices[0]].planned
            found, problem = result, ""
            if planned.kv_map is not None:
                found, problem = map_result(result, planned.kv_map, planned.plan.codec)
            lost = set(result.indices).difference(found.indices)
            failures += [self._fail(row, problem) for row in sorted(lost) if not self._rows[row].failed]
            mapped += [found] if found.indices else []
        return mapped, failures

    def _within_budget(self, results: Sequence[LayerResult]) -> tuple[list[LayerResult], list[SampleFailure]]:
        failures: list[SampleFailure] = []
        for result in results:
            problems = error_budget_problems(result, [self._rows[row].plan.codec for row in result.indices])
            for place, problem in problems.items():
                if not self._rows[result.indices[place]].failed:
                    failures.append(self._fail(result.indices[place], problem))
        failed = {failure.index for failure in failures}
        return [
            result.only(set(result.indices) - failed) for result in results if not failed.issuperset(result.indices)
        ], failures


def _layer_of(group: _Group) -> int:
    return group[0][1][0][0].layer


def _rows_of(tensor: Tensor, places: list[int]) -> Tensor:
    return tensor if places == list(range(tensor.shape[0])) else tensor[places]


def _whole_error(kind: str, messages: Sequence[LayerMessage], places: Sequence[list[int]]) -> list[float]:
    """The error over all heads, ||decoded - x|| / ||x||, from each rank's error and norm."""
    if len(messages) == 1:
        return [messages[0].relative_error[kind][place] for place in places[0]]
    whole: list[float] = []
    for ranks in zip(*places, strict=True):
        errors = [m.relative_error[kind][place] for m, place in zip(messages, ranks, strict=True)]
        norms = [m.norms[kind][place] for m, place in zip(messages, ranks, strict=True)]
        norm = math.hypot(*norms)
        whole.append(math.hypot(*(e * n for e, n in zip(errors, norms, strict=True))) / norm if norm else max(errors))
    return whole
