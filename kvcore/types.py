"""The data that teachers and students exchange.

Shape legend, for names and docstrings everywhere: B batch, N teachers, L layers, H key/value heads (never query
heads), T tokens, M selected tokens (slots), D head dim, F features (H times D). Keys are content keys: before RoPE.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from kvcore.plan import CodecSpec, KVPlan, SamplingParams, SpanKind

if TYPE_CHECKING:
    from kvcore.tensors.kv_map import KVMap

Tensor = torch.Tensor
TensorKind = Literal["k", "v"]
TENSORS: tuple[TensorKind, ...] = ("k", "v")
Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open range of characters (code points), or of token indices if the sample has token ids."""

    kind: SpanKind
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. Its content is a range of characters of the sample's text."""

    role: Role
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Chat:
    """How a chat template wraps a text: its turns, and after the last one what the assistant answers.

    `system_prompt`: a message before the turns that is not part of the text.
    """

    turns: tuple[Turn, ...]
    system_prompt: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence for a teacher to read: either `text`, in its chat template if there is a `chat`, or `token_ids`."""

    id: str
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    spans: tuple[Span, ...] = ()
    chat: Chat | None = None

    def key(self, weights_digest: str, plan: KVPlan, sampling: SamplingParams | None = None) -> str:
        """Returns the sample key: the hash that names this sample's K/V of one teacher under one plan.

        Equal content has the same key on the wire and in a store. With `sampling` it names a prompt of `Generate`.
        """
        spans = [[span.kind, span.start, span.end] for span in self.spans]
        content: list[object] = [weights_digest, plan.digest(), self.text, self.token_ids, spans]
        if sampling is not None:
            content.append(sampling.digest())
        if self.chat is not None:
            turns = [[turn.role, turn.start, turn.end] for turn in self.chat.turns]
            content.append({"system_prompt": self.chat.system_prompt, "turns": turns})
        canonical = json.dumps(content, separators=(",", ":"), ensure_ascii=True)
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class TeacherInfo:
    """A teacher's identity, geometry and limits, as `Describe` returns them.

    `max_map_bytes`: the largest map that it takes; 0 if plans cannot name one.
    """

    model: str
    weights_digest: str
    tokenizer_fingerprint: str
    layers: int
    kv_heads: int
    head_dim: int
    rope: Mapping[str, Any]
    engine: str
    dtype: str
    max_sample_tokens: int
    max_samples_per_request: int
    max_frame_bytes: int
    selectors: tuple[str, ...]
    codecs: tuple[str, ...]
    max_map_bytes: int = 0

    def identity(self) -> dict[str, str | int]:
        """Weights, tokenizer and geometry by name: equal for replicas of one teacher."""
        names = ("weights_digest", "tokenizer_fingerprint", "layers", "kv_heads", "head_dim")
        return {name: getattr(self, name) for name in names}

    def same_teacher(self, other: TeacherInfo) -> bool:
        """Whether two endpoints are replicas of one teacher."""
        return self.identity() == other.identity()


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that one sample spent in each stage of the server, and on the network as the client measured it."""

    queue: float = 0.0
    prefill: float = 0.0
    encode: float = 0.0
    network: float = 0.0


@dataclass(slots=True)
class EncodedSampleKV:
    """One sample's selected K/V as sent and as stored: encoded, with all layers stacked.

    `key` is the sample key. `parts` holds the codec's tensors by name (`k.codes`, `k.scale`, `v.codes`, ...), each
    [L,H,M,...] in the order of `layers`; every slot holds a token. `positions` is int32 [L,H,M], [L,1,M] or [1,1,M],
    depending on the plan's scope: ascending indices into the teacher's tokens. `byte_ends_T`: how many bytes of the
    sample's UTF-8 text have been read after each teacher token; -1 if that is unknown because the token ends inside a
    character, or if the token stands for no text. `kv_map` decodes the codec `pca`, whose `parts` are packed
    (`kvcore.wire.packed_rows`).
    """

    sample_id: str
    key: str
    layers: tuple[int, ...]
    codec: CodecSpec
    parts: dict[str, Tensor]
    positions: Tensor
    token_ids_T: Tensor
    byte_ends_T: Tensor
    relative_error: dict[str, list[float]]
    timings: Timings = field(default_factory=Timings)
    kv_map: KVMap | None = None

    @property
    def slots(self) -> int:
        """M: the number of selected tokens."""
        return int(self.positions.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded K/V (codes and scales), without headers."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())


@dataclass(frozen=True, slots=True)
class MissingKV:
    """A sample for which a teacher gave no K/V, and why."""

    sample_id: str
    reason: str


@dataclass(slots=True)
class BatchKV:
    """Decoded content K/V of one teacher for a batch, padded to the batch's largest M.

    `mask_BM` is True where a slot holds a token; elsewhere K/V are zero and must reach no loss.
    `byte_ends_BLHM` [B,L|1,H|1,M], depending on the plan's scope: the byte at which each slot's token ends.
    """

    k_BLHMD: Tensor
    v_BLHMD: Tensor
    mask_BM: Tensor
    byte_ends_BLHM: Tensor

    def __getitem__(self, samples: slice | Tensor) -> BatchKV:
        """Some of the batch's samples."""
        return replace(
            self.map(lambda x_BLHMD: x_BLHMD[samples]),
            mask_BM=self.mask_BM[samples],
            byte_ends_BLHM=self.byte_ends_BLHM[samples],
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> BatchKV:
        """Applies a function to the keys and to the values; mask and byte ends stay."""
        return replace(self, k_BLHMD=function(self.k_BLHMD), v_BLHMD=function(self.v_BLHMD))

    def to(self, device: torch.device) -> BatchKV:
        """Moves everything to a device; K/V without waiting for the copy."""
        return replace(
            self.map(lambda x_BLHMD: x_BLHMD.to(device, non_blocking=True)),
            mask_BM=self.mask_BM.to(device),
            byte_ends_BLHM=self.byte_ends_BLHM.to(device),
        )
