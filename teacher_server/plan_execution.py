"""Runs plans at the source: select, gather and encode each layer where it was computed, then copy it to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvcore.plan import KVPlan
from kvcore.types import TeacherInfo, Tensor
from teacher_server.engines.base import TeacherEngine, TokenizedSample


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """A tokenised sample and what its caller wants of it."""

    tokens: TokenizedSample
    plan: KVPlan


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One layer of several samples, selected, encoded and on the host.

    `indices`: rows of the batch; every tensor's leading b follows them. `parts`: encoded tensors by wire name
    (`k.codes`, `v.scale`, ...). `positions`: [b,H,M] or [b,1,M] int32. `relative_error`: per row, by kind.
    """

    indices: list[int]
    layer: int
    parts: dict[str, Tensor]
    positions: Tensor
    relative_error: dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class SampleFailure:
    """One sample of a batch that ended without its K/V; nothing more is emitted for it."""

    index: int
    problem: str


@dataclass(frozen=True, slots=True)
class ExecutionTimings:
    """Seconds a batch spent in the model, and in selecting, encoding and copying."""

    prefill_s: float
    encode_s: float


def check_plan(plan: KVPlan, info: TeacherInfo) -> None:
    """Refuses a plan that this teacher cannot execute.

    Raises:
        FieldError: naming the field of the plan, its value and the limit.
    """
    raise NotImplementedError


def check_sample(tokens: TokenizedSample, plan: KVPlan, field: str) -> None:
    """Refuses a sample that the plan cannot be executed on: no token to choose from, no answer to rank by.

    Args:
        field: how the caller names the sample, for example `samples[q17]`.

    Raises:
        FieldError: naming what the sample lacks.
    """
    raise NotImplementedError


def encoded_bytes(plan: KVPlan, tokens: TokenizedSample, info: TeacherInfo) -> int:
    """The exact size in bytes of a sample's encoded K/V, positions included, headers not."""
    raise NotImplementedError


def execute(
    engine: TeacherEngine,
    batch: Sequence[PlannedSample],
    emit: Callable[[LayerResult], None],
    fail: Callable[[SampleFailure], None],
) -> ExecutionTimings:
    """Runs one batch, whose plans may differ, through the engine and emits each layer as it finishes.

    Every sample must have passed `check_plan` and `check_sample`. `fail` is called at most once for a sample, as soon
    as its K/V turn out to be unusable: not finite, or past the plan's `max_relative_error`; the others go on.
    """
    raise NotImplementedError
