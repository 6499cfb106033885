"""A teacher in memory. Its K/V depend only on the sample's id, so every source must return the same bytes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence

import torch

from kvcore.errors import TeacherUnavailableError
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.tensors import codec
from kvcore.types import TENSORS, EncodedSampleKV, MissingKV, Sample, TeacherInfo, Tensor
from student_trainer.kv_sources.base import KVResult, KVSource, PendingKV

INFO = TeacherInfo(
    model="fake",
    weights_digest="a1" * 16,
    tokenizer_fingerprint="b2" * 16,
    layers=3,
    kv_heads=2,
    head_dim=16,
    rope={"rope_theta": 10000.0},
    engine="fake",
    dtype="fp32",
    max_sample_tokens=512,
    max_samples_per_request=8,
    max_frame_bytes=1 << 20,
    max_map_bytes=1 << 24,
    selectors=("full", "right"),
    codecs=("raw", "bf16", "int8"),
)
PLAN = KVPlan(
    layers=(0, 1, 2), selection=Selection(selector="right", budget=3, span="all"), codec=CodecSpec(name="int8")
)


def samples(count: int, prefix: str = "s") -> list[Sample]:
    """Samples of 5 to 9 tokens, `s0`, `s1`, ..."""
    return [Sample(f"{prefix}{i}", token_ids=tuple(range(i, i + 5 + i % 5))) for i in range(count)]


def kv_of(sample: Sample, info: TeacherInfo = INFO, plan: KVPlan = PLAN) -> EncodedSampleKV:
    """The K/V that every fake teacher has for this sample: the last tokens of the whole sample, shared by all heads."""
    assert sample.token_ids is not None
    seed = int.from_bytes(hashlib.blake2b(f"{sample.id}/{info.weights_digest}".encode(), digest_size=7).digest())
    generator = torch.Generator().manual_seed(seed)
    tokens = len(sample.token_ids)
    slots = min(plan.selection.budget or tokens, tokens)
    parts: dict[str, Tensor] = {}
    errors: dict[str, list[float]] = {}
    for kind in TENSORS:
        x_LHMD = torch.randn(len(plan.layers), info.kv_heads, slots, info.head_dim, generator=generator)
        encoded = codec.encode(x_LHMD, kind, plan.codec)
        parts |= {f"{kind}.{name}": part for name, part in encoded.parts.items()}
        errors[kind] = encoded.relative_error_B.tolist()
    return EncodedSampleKV(
        sample_id=sample.id,
        key=sample.key(info.weights_digest, plan),
        layers=plan.layers,
        codec=plan.codec,
        parts=parts,
        positions=torch.arange(tokens - slots, tokens, dtype=torch.int32).reshape(1, 1, -1),
        token_ids_T=torch.tensor(sample.token_ids, dtype=torch.int32),
        byte_ends_T=torch.full((tokens,), -1, dtype=torch.int32),
        relative_error=errors,
    )


class MemorySource(KVSource):
    """A source without a network. `missing` samples have no K/V; `gate` holds every fetch until it is set."""

    def __init__(self, missing: Sequence[str] = (), plan: KVPlan = PLAN) -> None:
        self._plan = plan
        self.missing = set(missing)
        self.submitted: list[list[str]] = []
        self.fetched: list[list[str]] = []
        self.closed = 0
        self.gate = threading.Event()
        self.gate.set()
        self.before_fetch: Callable[[list[str]], None] = lambda _: None

    @property
    def info(self) -> TeacherInfo:
        return INFO

    @property
    def plan(self) -> KVPlan:
        return self._plan

    def submit(self, samples: Sequence[Sample]) -> PendingKV:
        self.submitted.append([sample.id for sample in samples])
        return super().submit(samples)

    def fetch(self, samples: Sequence[Sample]) -> list[KVResult]:
        ids = [sample.id for sample in samples]
        self.fetched.append(ids)
        self.gate.wait()
        if self.closed:
            raise TeacherUnavailableError("fake", "closed")
        self.before_fetch(ids)
        return [self._result(sample) for sample in samples]

    def close(self) -> None:
        self.closed += 1
        self.gate.set()

    def _result(self, sample: Sample) -> KVResult:
        if sample.id in self.missing:
            return MissingKV(sample.id, "not finite: a key of layer 1")
        return kv_of(sample, self.info, self.plan)


def same_result(left: KVResult, right: KVResult) -> bool:
    """Whether two results have the same bytes and metadata, apart from timings."""
    if isinstance(left, MissingKV) or isinstance(right, MissingKV):
        return left == right
    tensors = [(left.positions, right.positions), (left.token_ids_T, right.token_ids_T)]
    tensors.append((left.byte_ends_T, right.byte_ends_T))
    tensors += [(left.parts[name], right.parts.get(name, torch.empty(0))) for name in left.parts]
    return (
        (left.sample_id, left.key, left.layers, left.codec) == (right.sample_id, right.key, right.layers, right.codec)
        and left.parts.keys() == right.parts.keys()
        and left.relative_error == right.relative_error
        and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in tensors)
    )
