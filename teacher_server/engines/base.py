"""The TeacherEngine protocol, the extension point for running teacher models, and the types that it uses.

To add an engine, write a module with a class that implements `TeacherEngine` and a function
`load(config: ServeConfig) -> TeacherEngine`, and add the function to `teacher_server.config.ENGINES`, or to the
entry-point group `kvdistill.engines` of your own package. An engine that computes one layer after another in this
process implements `LayerwiseModel` and calls `plan_execution.execute` in its `run`; `engines/fake.py` is a complete
example. Every engine must pass `tests/contract`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from kvcore.errors import KVDistillError
from kvcore.plan import ImportancePool, KVPlan, SamplingParams, SelectionSpan
from kvcore.tensors.kv_map import KVMap
from kvcore.tensors.selectors.random import sample_seed
from kvcore.types import Sample, TeacherInfo, Tensor
from kvcore.wire.packed_rows import PackedRow

SPAN_KINDS: tuple[SelectionSpan, ...] = ("prompt", "reasoning", "answer")


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """A sample as token ids [T].

    `span_ids`: for each token the index into `SPAN_KINDS` of the span that holds the token's last character, or -1.
    `byte_ends`: as in `kvcore.types.EncodedSampleKV`.
    """

    sample: Sample
    token_ids: tuple[int, ...]
    byte_ends: tuple[int, ...]
    span_ids: tuple[int, ...]

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens to generate from: without those that the tokenizer adds after the text, such as an EOS."""
        after_text = next((place for place, end in enumerate(reversed(self.byte_ends)) if end >= 0), 0)
        return self.token_ids[: len(self.token_ids) - after_text]


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """A tokenized sample and the plan of its caller. `kv_map`: the map that the plan names."""

    tokens: TokenizedSample
    plan: KVPlan
    kv_map: KVMap | None = None


@dataclass(frozen=True, slots=True)
class LayerOutput:
    """One layer of a batch, on the engine's device.

    `k_BHTD` holds content keys and `v_BHTD` values, right-padded. `importance_BHT`: mean attention that the answer's
    tokens pay to each token, where each KV head takes the maximum over its query heads; `mean_importance_BHT`: the same
    with the mean over the query heads. Both are None if no sample of the batch asks for importance. An engine gives
    both, because the plans of a batch may differ.
    """

    layer: int
    k_BHTD: Tensor
    v_BHTD: Tensor
    importance_BHT: Tensor | None
    mean_importance_BHT: Tensor | None

    def importance(self, pool: ImportancePool) -> Tensor | None:
        """Importance [B,H,T], pooled over query heads as a plan asks."""
        return self.importance_BHT if pool == "max" else self.mean_importance_BHT


LayerSink = Callable[[LayerOutput], None]


class LayerwiseModel(Protocol):
    """A model that returns each layer's keys and values as soon as it has computed the layer."""

    def prefill(
        self, batch: Sequence[TokenizedSample], layers: Sequence[int], with_importance: bool, sink: LayerSink
    ) -> None:
        """Run the batch once and call `sink` for each of `layers`, in ascending order, when that layer is computed."""
        ...


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One layer of several samples after selection and encoding, in host memory.

    `indices`: rows of the batch; the leading dimension b of every tensor follows them. `parts`: encoded tensors by wire
    name (`k.codes`, `v.scale`, ...). `positions`: [b,H,M] or [b,1,M] int32. `relative_error`: by kind, one value per
    row. `norms`: the Frobenius norms that the errors are relative to, by kind, one value per row; only if the result
    holds a part of the model's KV heads. `packed`: the entropy-coded rows of the codec `pca`, as soon as there are any.
    """

    indices: list[int]
    layer: int
    parts: dict[str, Tensor]
    positions: Tensor
    relative_error: dict[str, list[float]]
    norms: dict[str, list[float]] = field(default_factory=dict)
    packed: Sequence[PackedRow] = ()

    def subset(self, places: Sequence[int]) -> LayerResult:
        """The result of some samples, given by their index in `indices`."""
        if list(places) == list(range(len(self.indices))):
            return self
        return LayerResult(
            [self.indices[place] for place in places],
            self.layer,
            {name: part[list(places)] for name, part in self.parts.items()},
            self.positions[list(places)],
            {kind: [values[place] for place in places] for kind, values in self.relative_error.items()},
            {kind: [values[place] for place in places] for kind, values in self.norms.items()},
            [self.packed[place] for place in places] if self.packed else (),
        )

    def only(self, rows: Collection[int]) -> LayerResult:
        """The result of those samples that are among these rows of the batch."""
        return self.subset([place for place, row in enumerate(self.indices) if row in rows])


@dataclass(frozen=True, slots=True)
class SampleFailure:
    """A sample of a batch that failed. `index`: its row. The engine emits nothing more for it."""

    index: int
    problem: str


@dataclass(frozen=True, slots=True)
class ExecutionTimings:
    """Seconds that a batch spent in the model, and in selecting, encoding and copying; tokens from a prefix cache.

    `reused`: rows that the model did not compute, because the server had their results (`result_cache`).
    """

    prefill_s: float
    encode_s: float
    cached_tokens: int = 0
    reused: frozenset[int] = frozenset()


Emit = Callable[[LayerResult], None]
Fail = Callable[[SampleFailure], None]
Wanted = Callable[[int], bool]
"""Whether a caller still waits for this row of the batch."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """What a teacher generated from a prompt.

    `text`: up to the stop text that ended it, without special tokens and without an incomplete character at its end.
    `finish_reason`: `stop` if the model ended its text or a stop text came, `length` if it reached `max_new_tokens`.
    `tokens`: number of generated tokens, including those that stand for no text.
    """

    text: str
    finish_reason: FinishReason
    tokens: int


def draw_seed(sampling: SamplingParams, prompt: TokenizedSample) -> int:
    """The seed for sampling from one prompt, 63 bits: the same in every batch and on every replica."""
    return sample_seed(sampling.seed, prompt.prompt_ids) & (2**63 - 1)


class EngineLostError(KVDistillError):
    """The engine has ended and cannot recover. The server exits, so that its supervisor can start it again."""

    next_step = "see the engine's own message above in this server's log, and start it again"


class TeacherEngine(Protocol):
    """A frozen teacher model: tokenizes samples, computes their K/V under a plan, and generates text.

    The server calls `run` and `generate` from `concurrent_batches` threads, each with one batch at a time, and
    `tokenize` from another.
    """

    @property
    def info(self) -> TeacherInfo:
        """Identity, geometry and limits of the teacher, as `Describe` returns them."""
        ...

    @property
    def small_batch_tokens(self) -> int | None:
        """Padded tokens up to which a larger batch takes hardly longer; None if the engine does not pad its batches.

        The server puts samples of similar length into one batch, unless the engine does not pad.
        """
        ...

    @property
    def concurrent_batches(self) -> int:
        """Batches that the server runs at the same time. 1, unless the engine itself shares the model between them."""
        ...

    def tokenize(self, sample: Sample) -> TokenizedSample:
        """Tokenize a sample and map its spans to tokens.

        Raises:
            FieldError: the text, a token id or a span is not valid.
        """
        ...

    def run(self, batch: Sequence[PlannedSample], emit: Emit, fail: Fail, wanted: Wanted) -> ExecutionTimings:
        """Compute the K/V of a batch, execute each sample's plan on the model's device, and emit layer by layer.

        Args:
            batch: samples that passed `check_plan` and `check_sample`; their plans may differ. If
                `info.max_map_bytes` is above 0, plans may name maps.
            emit: receives each layer of each sample once, in ascending order per sample.
            fail: called at most once per sample; nothing more is emitted for a sample that failed.
            wanted: the engine may drop a row for which this returns False, without a call of `emit` or `fail`.

        All three functions are called from the calling thread. Any exception fails the whole batch; the server then
        repeats its self-test before it serves on.
        """
        ...

    def generate(
        self, prompts: Sequence[TokenizedSample], sampling: SamplingParams, wanted: Wanted
    ) -> list[GeneratedText | SampleFailure]:
        """Generate text from each prompt's `prompt_ids`; returns one outcome per prompt, in order.

        Each prompt leaves room for `max_new_tokens` within `info.max_sample_tokens`. The text depends on the prompt and
        on `sampling`, not on the rest of the batch, up to the model's rounding. The engine ignores the model's default
        generation settings except its end-of-text tokens. It ignores `sampling.answer_marker`. Generation may stop at
        any token for a prompt that is no longer `wanted`; its outcome is discarded.
        """
        ...

    def check(self) -> None:
        """Return if the engine can still run batches. Any thread may call it.

        Raises:
            EngineLostError: the engine has ended and cannot recover.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...
