"""What a teacher engine is: tokenise, and run a batch while handing over each layer as it finishes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvcore.plan import ImportancePool, KVPlan, SelectionSpan
from kvcore.types import Sample, TeacherInfo, Tensor


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """A sample as the teacher reads it.

    `span_ids_T`: for each token the index into `SPAN_KINDS` of the span it belongs to (by the token's last
    character), or -1. `byte_ends_T` as in `kvcore.types.EncodedSampleKV`.
    """

    sample: Sample
    token_ids: tuple[int, ...]
    byte_ends: tuple[int, ...]
    span_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerOutput:
    """One layer of a batch, on the engine's device.

    `k_BHTD` content keys and `v_BHTD` values, right-padded. `importance_BHT`: mean attention that the answer's tokens
    pay to each token, for each the largest of a KV head's query heads; `mean_importance_BHT`: the mean of the query
    heads instead. None where no sample of the batch asked for importance. The plans of a batch may differ, so an engine
    gives both.
    """

    layer: int
    k_BHTD: Tensor
    v_BHTD: Tensor
    importance_BHT: Tensor | None
    mean_importance_BHT: Tensor | None

    def importance(self, pool: ImportancePool) -> Tensor | None:
        """The importance [B,H,T] that a plan asks for."""
        return self.importance_BHT if pool == "max" else self.mean_importance_BHT


LayerSink = Callable[[LayerOutput], None]


class LayerwiseModel(Protocol):
    """A model that hands over each layer as it computes it."""

    def prefill(
        self, batch: Sequence[TokenizedSample], layers: Sequence[int], with_importance: bool, sink: LayerSink
    ) -> None:
        """Runs the batch once and calls `sink` for each of `layers`, in ascending order, as that layer finishes."""
        ...


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


Emit = Callable[[LayerResult], None]
Fail = Callable[[SampleFailure], None]
Wanted = Callable[[int], bool]
"""Whether anybody still waits for a row of the batch."""


class TeacherEngine(Protocol):
    """One frozen teacher. `run` is called from one thread at a time."""

    @property
    def info(self) -> TeacherInfo:
        """Identity, geometry and limits, as `Describe` answers them."""
        ...

    def tokenize(self, sample: Sample) -> TokenizedSample:
        """Reads a sample's text and spans.

        Raises:
            FieldError: the text, a token id or a span cannot be read.
        """
        ...

    def run(self, batch: Sequence[PlannedSample], emit: Emit, fail: Fail, wanted: Wanted) -> ExecutionTimings:
        """Runs a batch, whose plans may differ, where the model is, and emits each layer as it is encoded.

        A sample's layers are emitted in ascending order, and each once. `fail` is called at most once for a sample, and
        nothing more is emitted for it. A sample that `wanted` denies may end without either. All three are called from
        the calling thread.
        """
        ...

    def close(self) -> None:
        """Frees the model."""
        ...


SPAN_KINDS: tuple[SelectionSpan, ...] = ("prompt", "reasoning", "answer")
