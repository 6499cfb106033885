"""What a teacher engine is: tokenise, run a batch while handing over each layer as it finishes, and write text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from kvcore.errors import KVDistillError
from kvcore.plan import ImportancePool, KVPlan, SelectionSpan
from kvcore.tensors.selectors.random import sample_seed
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

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens that a model writes on from: without what its tokenizer puts behind a text, such as an EOS."""
        after_text = next((place for place, end in enumerate(reversed(self.byte_ends)) if end >= 0), 0)
        return self.token_ids[: len(self.token_ids) - after_text]


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
    `norms`: where the heads are not all of the model's, the Frobenius norms that the errors are relative to, likewise.
    """

    indices: list[int]
    layer: int
    parts: dict[str, Tensor]
    positions: Tensor
    relative_error: dict[str, list[float]]
    norms: dict[str, list[float]] = field(default_factory=dict)

    def subset(self, places: Sequence[int]) -> LayerResult:
        """The result of some of its samples, by their place in `indices`."""
        if list(places) == list(range(len(self.indices))):
            return self
        return LayerResult(
            [self.indices[place] for place in places],
            self.layer,
            {name: part[list(places)] for name, part in self.parts.items()},
            self.positions[list(places)],
            {kind: [values[place] for place in places] for kind, values in self.relative_error.items()},
            {kind: [values[place] for place in places] for kind, values in self.norms.items()},
        )


@dataclass(frozen=True, slots=True)
class SampleFailure:
    """One sample of a batch that ended without its K/V; nothing more is emitted for it."""

    index: int
    problem: str


@dataclass(frozen=True, slots=True)
class ExecutionTimings:
    """Seconds a batch spent in the model, and in selecting, encoding and copying; tokens found in a prefix cache."""

    prefill_s: float
    encode_s: float
    cached_tokens: int = 0


Emit = Callable[[LayerResult], None]
Fail = Callable[[SampleFailure], None]
Wanted = Callable[[int], bool]
"""Whether anybody still waits for a row of the batch."""


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How a teacher writes.

    `max_new_tokens`: at most this many. `temperature`: 0 writes the likeliest token each time (greedy); otherwise
    tokens are drawn, from the smallest set whose probabilities reach `top_p`. `stop`: texts that end the writing.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def seed_for(self, prompt: TokenizedSample) -> int:
        """What the draws of one prompt start from, 63 bits: the same in every batch and on every replica."""
        return sample_seed(self.seed, prompt.prompt_ids) & (2**63 - 1)


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """What a teacher wrote behind a prompt.

    `text`: up to the stop text that ended it, without the model's special tokens and without a character that is not
    complete at its end. `finish_reason`: `stop` where the model ended by itself or met a stop text, `length` where
    `max_new_tokens` cut it off. `tokens`: how many the model wrote, also those that stand for no text.
    """

    text: str
    finish_reason: FinishReason
    tokens: int


class EngineLostError(KVDistillError):
    """The engine has ended for good; its server has to end too, so that whoever started it can start another."""

    next_step = "see the engine's own message above in this server's log, and start it again"


class TeacherEngine(Protocol):
    """One frozen teacher. `run` and `generate` are called from one thread at a time."""

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

    def generate(
        self, prompts: Sequence[TokenizedSample], options: GenerateOptions, wanted: Wanted
    ) -> list[GeneratedText | SampleFailure]:
        """Writes on from each prompt's `prompt_ids`; one outcome for each, in their order.

        Every prompt leaves room for `max_new_tokens` within `info.max_sample_tokens`. What is written depends on the
        prompt and the options, not on the rest of the batch, as far as the model's rounding does not. A prompt that
        `wanted` denies may end at any token; nobody looks at its outcome. Nothing of the model's own defaults applies
        but for the tokens that end its text.
        """
        ...

    def check(self) -> None:
        """Does nothing while the engine can run. May be called from any thread.

        Raises:
            EngineLostError: it never will again.
        """
        ...

    def close(self) -> None:
        """Frees the model."""
        ...


SPAN_KINDS: tuple[SelectionSpan, ...] = ("prompt", "reasoning", "answer")
