"""A teacher without a model, for tests of the service: keys and values are hashes of token, position and layer."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch

from kvcore.errors import FieldError
from kvcore.plan import CODECS, SELECTORS, SamplingParams
from kvcore.tensors.selectors.random import sample_seed
from kvcore.types import Chat, Sample, TeacherInfo, Tensor
from teacher_server.config import ServeConfig
from teacher_server.engines.base import (
    Emit,
    ExecutionTimings,
    Fail,
    FinishReason,
    GeneratedText,
    LayerOutput,
    LayerSink,
    PlannedSample,
    SampleFailure,
    TokenizedSample,
    Wanted,
    draw_seed,
)
from teacher_server.engines.text_reader import read_sample
from teacher_server.plan_execution import execute

DEFAULT_CONTEXT = 4096
BOS = 256


@dataclass(frozen=True, slots=True)
class FakeModel:
    """Geometry of the fake teacher. `delay_ms`: time per token of a batch, spread over the layers."""

    layers: int = 4
    heads: int = 2
    dim: int = 16
    delay_ms: float = 0.0

    @classmethod
    def parse(cls, specification: str) -> FakeModel:
        """Parse `fake:layers=3,heads=2,dim=16,delay_ms=0`; omitted values keep their defaults.

        Raises:
            FieldError: a name is unknown, or a value is not a number in range.
        """
        types = {entry.name: float if entry.name == "delay_ms" else int for entry in fields(cls)}
        values: dict[str, float] = {}
        for item in filter(None, specification.removeprefix("fake:").split(",")):
            name, _, text = item.partition("=")
            if name not in types:
                raise FieldError("model", f"'{name}' in '{specification}' is unknown; known: {', '.join(types)}")
            try:
                values[name] = types[name](text)
            except ValueError as error:
                raise FieldError("model", f"'{item}' in '{specification}' is not a number") from error
            if values[name] < (0 if name == "delay_ms" else 1):
                raise FieldError("model", f"'{item}' in '{specification}' is too small")
        return cls(**values)  # type: ignore[arg-type]


class FakeError(RuntimeError):
    """The error that `FakeFaults.fail` injects."""


@dataclass(frozen=True, slots=True)
class FakeFaults:
    """Faults to inject, by sample id.

    `fail`: the whole batch raises. `not_finite`: the sample's keys are NaN in every layer, and its generation fails.
    `die`: the process kills itself with SIGKILL. `slow`: seconds to wait before the batch's first layer or token.
    """

    fail: frozenset[str] = frozenset()
    not_finite: frozenset[str] = frozenset()
    die: frozenset[str] = frozenset()
    slow: Mapping[str, float] = field(default_factory=dict)


class ByteReader:
    """A byte tokenizer: every UTF-8 byte is a token, after a BOS."""

    vocabulary = BOS + 1

    def read(self, text: str) -> tuple[list[int], list[int]]:
        """See `TextReader.read`."""
        data = text.encode()
        return [BOS, *data], [-1, *range(1, len(data) + 1)]

    def read_chat(self, text: str, chat: Chat, field: str) -> tuple[list[int], list[int]]:
        """See `TextReader.read_chat`: there is no template."""
        raise FieldError(
            field, f"the engine 'fake' has no chat template; got {len(chat.turns)} turns of {len(text)} characters"
        )

    def byte_ends(self, token_ids: Sequence[int]) -> list[int]:
        """See `TextReader.byte_ends`."""
        ends: list[int] = []
        read = 0
        for token_id in token_ids:
            read += token_id != BOS
            ends.append(-1 if token_id == BOS else read)
        return ends


class FakeEngine:
    """A `TeacherEngine` whose output depends on the tokens only: it is the same in every process and batch."""

    def __init__(self, config: ServeConfig, model: FakeModel, faults: FakeFaults | None = None) -> None:
        self._model = model
        self._faults = faults or FakeFaults()
        self._reader = ByteReader()
        geometry = f"fake layers={model.layers} heads={model.heads} dim={model.dim}"
        self._info = TeacherInfo(
            model=config.teacher_name,
            weights_digest=hashlib.blake2b(geometry.encode(), digest_size=16).hexdigest(),
            tokenizer_fingerprint=hashlib.blake2b(b"fake bytes with BOS", digest_size=16).hexdigest(),
            layers=model.layers,
            kv_heads=model.heads,
            head_dim=model.dim,
            rope={"rope_type": "default", "rope_theta": 10000.0},
            engine="fake",
            dtype="fp32",
            max_sample_tokens=config.max_sample_tokens or DEFAULT_CONTEXT,
            max_samples_per_request=config.max_samples_per_request,
            max_frame_bytes=config.max_frame_bytes,
            selectors=tuple(SELECTORS),
            codecs=tuple(CODECS),
            max_map_bytes=config.max_map_bytes,
        )

    @property
    def info(self) -> TeacherInfo:
        """See `TeacherEngine.info`."""
        return self._info

    @property
    def small_batch_tokens(self) -> int | None:
        """See `TeacherEngine.small_batch_tokens`: padding takes no time."""
        return None

    @property
    def concurrent_batches(self) -> int:
        """See `TeacherEngine.concurrent_batches`."""
        return 1

    def tokenize(self, sample: Sample) -> TokenizedSample:
        """See `TeacherEngine.tokenize`."""
        return read_sample(sample, self._reader, self._info.max_sample_tokens)

    def prefill(
        self, batch: Sequence[TokenizedSample], layers: Sequence[int], with_importance: bool, sink: LayerSink
    ) -> None:
        """See `LayerwiseModel.prefill`."""
        self._inject_faults([tokens.sample.id for tokens in batch])
        tokens_BT = _pad([tokens.token_ids for tokens in batch])
        not_finite_B = torch.tensor([tokens.sample.id in self._faults.not_finite for tokens in batch])
        delay_s = self._model.delay_ms / 1000.0 * sum(len(tokens.token_ids) for tokens in batch) / self._model.layers
        for layer in range(max(layers) + 1):
            if delay_s:
                time.sleep(delay_s)
            if layer in layers:
                k_BHTD = self._noise(tokens_BT, layer, salt=1)
                k_BHTD[not_finite_B] = torch.nan
                largest_BHT, mean_BHT = self._importance(tokens_BT, layer) if with_importance else (None, None)
                sink(LayerOutput(layer, k_BHTD, self._noise(tokens_BT, layer, salt=2), largest_BHT, mean_BHT))

    def run(self, batch: Sequence[PlannedSample], emit: Emit, fail: Fail, wanted: Wanted) -> ExecutionTimings:
        """See `TeacherEngine.run`."""
        return execute(self, batch, emit, fail, wanted)

    def generate(
        self, prompts: Sequence[TokenizedSample], sampling: SamplingParams, wanted: Wanted
    ) -> list[GeneratedText | SampleFailure]:
        """See `TeacherEngine.generate`. A byte is a token; each step of the batch takes `delay_ms`."""
        self._inject_faults([tokens.sample.id for tokens in prompts])
        texts = [generate_text(tokens, sampling) for tokens in prompts]
        for step in range(max(text.tokens for text in texts) if self._model.delay_ms else 0):
            if not any(wanted(row) and step < text.tokens for row, text in enumerate(texts)):
                break
            time.sleep(self._model.delay_ms / 1000.0)
        return [
            SampleFailure(row, "injected fault: no text") if tokens.sample.id in self._faults.not_finite else text
            for row, (tokens, text) in enumerate(zip(prompts, texts, strict=True))
        ]

    def check(self) -> None:
        """See `TeacherEngine.check`: it can always run."""

    def close(self) -> None:
        """See `TeacherEngine.close`."""

    def _inject_faults(self, sample_ids: Sequence[str]) -> None:
        faults = self._faults
        if not faults.die.isdisjoint(sample_ids):
            os.kill(os.getpid(), signal.SIGKILL)
        if not faults.fail.isdisjoint(sample_ids):
            raise FakeError(f"injected fault at one of the samples {sample_ids}")
        time.sleep(max((faults.slow.get(sample_id, 0.0) for sample_id in sample_ids), default=0.0))

    def _importance(self, tokens_BT: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The maximum and the mean of two fake query heads' attention."""
        attention_BHTG = self._noise(tokens_BT, layer, salt=3)[..., :2].abs()
        return attention_BHTG.amax(dim=-1), attention_BHTG.mean(dim=-1)

    def _noise(self, tokens_BT: Tensor, layer: int, salt: int) -> Tensor:
        """[B,H,T,D] in [-1,1): an integer hash of (token, position, layer, head, channel)."""
        heads, dim = self._model.heads, self._model.dim
        position_T = torch.arange(tokens_BT.shape[1])
        channel_HD = torch.arange(heads * dim).view(heads, dim)
        seed_BT = (tokens_BT * 4096 + position_T) * 1024 + layer * 4 + salt
        x = _mix(seed_BT[:, None, :, None] * 65536 + channel_HD[:, None, :])
        return (x & 0xFFFF).float() / 32768.0 - 1.0


def load(config: ServeConfig) -> FakeEngine:
    """The fake teacher that `config.model` specifies."""
    return FakeEngine(config, FakeModel.parse(config.model))


def generate_text(prompt: TokenizedSample, sampling: SamplingParams) -> GeneratedText:
    """A few sums and an answer, seeded by the prompt and, unless greedy, by the sampling seed."""
    seed = draw_seed(sampling, prompt) if sampling.temperature else sample_seed(0, prompt.prompt_ids)
    numbers = torch.randint(0, 100, (4, 2), generator=torch.Generator().manual_seed(seed & (2**63 - 1))).tolist()
    text = "".join(f" {a} + {b} = {a + b}." for a, b in numbers) + f" Answer: {sum(map(sum, numbers))}"
    finish: FinishReason = "stop"
    if len(text) > sampling.max_new_tokens:
        text, finish = text[: sampling.max_new_tokens], "length"
    found = [index for stop in sampling.stop if (index := text.find(stop)) >= 0]
    if found:
        text, finish = text[: min(found)], "stop"
    return GeneratedText(text, finish, len(text))


def _pad(token_ids: Sequence[Sequence[int]]) -> Tensor:
    longest = max(len(ids) for ids in token_ids)
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in token_ids])


def _mix(x: Tensor) -> Tensor:
    """Mix 64-bit integers with two rounds of multiply and shift."""
    for multiplier in (0x5851F42D4C957F2D, 0x14057B7EF767814F):
        x = x * multiplier
        x = x ^ ((x >> 29) & 0x7FFFFFFFF)
    return x >> 7
