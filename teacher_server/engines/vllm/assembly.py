"""Puts together what the workers of one batch send: heads of tensor-parallel ranks, layers of pipeline stages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from kvcore.plan import KVPlan
from kvcore.types import Tensor
from teacher_server.engines.base import LayerResult, SampleFailure
from teacher_server.engines.vllm.message_queue import FailureMessage, LayerMessage, Message
from teacher_server.plan_execution import error_budget_problem

_Group = list[tuple[int, list[tuple[LayerMessage, int]]]]
"""Samples whose layer has come in the same messages: each one's row, and its pieces by ascending head."""


@dataclass(slots=True)
class _Row:
    """One sample: the pieces of each layer by first head, each a message and the sample's place in it."""

    plan: KVPlan
    pieces: dict[int, dict[int, tuple[LayerMessage, int]]] = field(default_factory=dict)
    emitted: int = 0
    failed: bool = False

    @property
    def open(self) -> bool:
        return not self.failed and self.emitted < len(self.plan.layers)


class Assembly:
    """The samples of one batch on their way in.

    Args:
        tags: the name of each sample's request.
        plans: each sample's plan.
        kv_heads: of the whole model; a layer is complete when every head has come.
    """

    def __init__(self, tags: Sequence[str], plans: Sequence[KVPlan], kv_heads: int) -> None:
        self._row_of = {tag: row for row, tag in enumerate(tags)}
        self._rows = [_Row(plan) for plan in plans]
        self._kv_heads = kv_heads

    def row_of(self, tag: str) -> int | None:
        """The sample of a request; None where it is another batch's."""
        return self._row_of.get(tag)

    def is_open(self, row: int) -> bool:
        """Whether layers of a sample are still to come."""
        return self._rows[row].open

    def open_rows(self) -> list[int]:
        """The samples that are neither complete nor failed."""
        return [row for row, state in enumerate(self._rows) if state.open]

    def drop(self, row: int) -> None:
        """Takes nothing more of a sample."""
        self._rows[row].failed = True
        self._rows[row].pieces.clear()

    def take(self, message: Message) -> tuple[list[LayerResult], list[SampleFailure]]:
        """What a message completes, each sample's layers in ascending order, and the samples that it ends.

        What comes twice, as after a preemption, or for a request that is not of this batch, is left out.
        """
        rows = {self._row_of[tag]: place for place, tag in enumerate(message.tags) if tag in self._row_of}
        rows = {row: place for row, place in rows.items() if self._rows[row].open}
        if isinstance(message, FailureMessage):
            return [], [self._fail(row, message.problem) for row in rows]
        for row, place in rows.items():
            self._rows[row].pieces.setdefault(message.layer, {}).setdefault(message.heads_from, (message, place))
        results = [self._assemble(group) for group in self._complete(rows)]
        return self._within_budget(results)

    def _fail(self, row: int, problem: str) -> SampleFailure:
        self.drop(row)
        return SampleFailure(row, problem)

    def _complete(self, rows: Iterable[int]) -> list[_Group]:
        """Layers that have all heads and are next in their sample's order, grouped where they came together."""
        groups: dict[tuple[int, ...], _Group] = {}
        for row in rows:
            state = self._rows[row]
            while state.open:
                pieces = state.pieces.get(state.plan.layers[state.emitted], {})
                if sum(message.heads for message, _ in pieces.values()) < self._kv_heads:
                    break
                ordered = [pieces[first] for first in sorted(pieces)]
                del state.pieces[state.plan.layers[state.emitted]]
                state.emitted += 1
                groups.setdefault(tuple(id(message) for message, _ in ordered), []).append((row, ordered))
        return sorted(groups.values(), key=_layer_of)

    def _assemble(self, group: _Group) -> LayerResult:
        """Samples that share their messages, as one result."""
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

    def _within_budget(self, results: Sequence[LayerResult]) -> tuple[list[LayerResult], list[SampleFailure]]:
        kept: list[LayerResult] = []
        failures: list[SampleFailure] = []
        for result in results:
            good: list[int] = []
            for place, row in enumerate(result.indices):
                errors = {kind: values[place] for kind, values in result.relative_error.items()}
                problem = error_budget_problem(errors, result.layer, self._rows[row].plan.codec)
                if problem is None:
                    good.append(place)
                elif not self._rows[row].failed:
                    failures.append(self._fail(row, problem))
            if good:
                kept.append(result.subset(good))
        failed = {failure.index for failure in failures}
        return [_without(result, failed) for result in kept if not failed.issuperset(result.indices)], failures


def _layer_of(group: _Group) -> int:
    return group[0][1][0][0].layer


def _rows_of(tensor: Tensor, places: list[int]) -> Tensor:
    return tensor if places == list(range(tensor.shape[0])) else tensor[places]


def _whole_error(kind: str, messages: Sequence[LayerMessage], places: Sequence[list[int]]) -> list[float]:
    """The error over all heads, from each rank's error and norm: ||decoded - x|| / ||x||."""
    if len(messages) == 1:
        return [messages[0].relative_error[kind][place] for place in places[0]]
    whole: list[float] = []
    for ranks in zip(*places, strict=True):
        errors = [m.relative_error[kind][place] for m, place in zip(messages, ranks, strict=True)]
        norms = [m.norms[kind][place] for m, place in zip(messages, ranks, strict=True)]
        norm = math.hypot(*norms)
        whole.append(math.hypot(*(e * n for e, n in zip(errors, norms, strict=True))) / norm if norm else max(errors))
    return whole


def _without(result: LayerResult, failed: set[int]) -> LayerResult:
    return result.subset([place for place, row in enumerate(result.indices) if row not in failed])
