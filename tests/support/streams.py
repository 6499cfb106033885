"""Streams of known content: encoded samples, their frames, and forged frames."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from kvcore.plan import CODECS, CODED, CodecSpec, KVPlan, Selection
from kvcore.tensors.codec import encode
from kvcore.types import TENSORS, EncodedSampleKV, Sample, TeacherInfo, Tensor, Timings
from kvcore.wire.frames import FrameWriter, pack_frame, unpack_frame
from kvcore.wire.stream_reader import RefusedSample, StreamReader

REQUEST = "request-1"
# The codecs that need no map. test_packed_stream.py has the one that does.
UNMAPPED_CODECS = tuple(name for name in CODECS if name != CODED)
INFO = TeacherInfo(
    model="fake",
    weights_digest="a1" * 16,
    tokenizer_fingerprint="b2" * 16,
    layers=5,
    kv_heads=2,
    head_dim=4,
    rope={"rope_theta": 10000.0},
    engine="fake",
    dtype="float32",
    max_sample_tokens=64,
    max_samples_per_request=64,
    max_frame_bytes=1 << 20,
    max_map_bytes=1 << 24,
    selectors=("full", "right"),
    codecs=("raw", "bf16", "int8"),
)
PLAN = KVPlan(
    layers=(0, 2, 4),
    selection=Selection(selector="right", budget=3, scope="head"),
    codec=CodecSpec(name="int8", group_size=2),
)
TIMINGS = Timings(queue=0.25, prefill=0.5, encode=0.125)


def sample_kv(
    index: int, plan: KVPlan = PLAN, slots: int = 3, tokens: int = 9, info: TeacherInfo = INFO
) -> EncodedSampleKV:
    """Random K/V of the sample `s<index>`, encoded by the plan."""
    generator = torch.Generator().manual_seed(index)
    scope = plan.selection.scope
    layers, heads = len(plan.layers), INFO.kv_heads
    parts: dict[str, Tensor] = {}
    errors: dict[str, list[float]] = {}
    for kind in TENSORS:
        encoded = encode(torch.randn(layers, heads, slots, INFO.head_dim, generator=generator), kind, plan.codec)
        parts |= {f"{kind}.{name}": part for name, part in encoded.parts.items()}
        errors[kind] = encoded.relative_error_B.tolist()
    shape = (1 if scope == "sample" else layers, heads if scope == "head" else 1, tokens)
    positions = torch.rand(shape, generator=generator).argsort(-1)[..., :slots].sort(-1).values.int()
    sample = text_sample(index, tokens)
    return EncodedSampleKV(
        sample_id=sample.id,
        key=sample.key(INFO.weights_digest, plan),
        layers=plan.layers,
        codec=plan.codec,
        parts=parts,
        positions=positions,
        token_ids_T=torch.randint(0, 1000, (tokens,), generator=generator, dtype=torch.int32),
        byte_ends_T=torch.arange(tokens, dtype=torch.int32) - 1,
        relative_error=errors,
        timings=TIMINGS,
    )


def text_sample(index: int, tokens: int = 9) -> Sample:
    return Sample(f"s{index}", text=f"{index:0{tokens}d}")


def keys_of(sent: Sequence[EncodedSampleKV]) -> list[str]:
    """The sample keys that a server returns for these samples."""
    return [kv.key for kv in sent]


def write_layer(writer: FrameWriter, indices: Sequence[int], at: int, sent: Sequence[EncodedSampleKV]) -> list[bytes]:
    """The frames of the plan's `at`-th layer, for samples with the same number of slots."""
    group = [sent[index] for index in indices]
    return writer.layer_batch(
        indices,
        group[0].layers[at],
        {name: torch.stack([kv.parts[name][at] for kv in group]) for name in group[0].parts},
        torch.stack([kv.positions[at if len(kv.positions) > 1 else 0] for kv in group]),
        {kind: [kv.relative_error[kind][at] for kv in group] for kind in group[0].relative_error},
    )


def write_sample(writer: FrameWriter, index: int, kv: EncodedSampleKV) -> list[bytes]:
    return writer.sample(index, kv.sample_id, kv.token_ids_T.tolist(), kv.byte_ends_T.tolist())


def write_stream(sent: Sequence[EncodedSampleKV], plan: KVPlan = PLAN, max_body: int = 1 << 20) -> list[bytes]:
    """The frames of a server that runs all samples as one batch: a frame for each layer where they fit."""
    writer = FrameWriter(REQUEST, plan, keys_of(sent), max_body)
    frames = [frame for index, kv in enumerate(sent) for frame in write_sample(writer, index, kv)]
    for at in range(len(plan.layers)):
        frames += write_layer(writer, range(len(sent)), at, sent) + writer.flush()
    for index, kv in enumerate(sent):
        frames += writer.sample_end(index, kv.timings)
    return frames + writer.end()


def write_shuffled(
    sent: Sequence[EncodedSampleKV], plan: KVPlan, max_body: int, failing: set[int], rng: random.Random
) -> list[bytes]:
    """The frames of a server with many batches: samples open, advance in changing groups, fail and end in any order."""
    writer = FrameWriter(REQUEST, plan, keys_of(sent), max_body)
    frames: list[bytes] = []
    step = dict.fromkeys(range(len(sent)), -1)
    while step:
        first = rng.choice(list(step))
        at = step[first]
        if first in failing and rng.random() < 0.4:
            frames += writer.sample_failed(first, "FAILED_PRECONDITION", f"sample {first}")
            del step[first]
        elif at < 0:
            frames += write_sample(writer, first, sent[first])
            step[first] = 0
        elif at < len(plan.layers):
            alike = [i for i in step if step[i] == at and sent[i].slots == sent[first].slots and i != first]
            indices = [first, *rng.sample(alike, rng.randint(0, len(alike)))]
            frames += write_layer(writer, indices, at, sent)
            step |= dict.fromkeys(indices, at + 1)
        elif first not in failing:
            frames += writer.sample_end(first, sent[first].timings)
            del step[first]
        if rng.random() < 0.3:
            frames += writer.flush()
    return frames + writer.end()


def read_stream(
    frames: Sequence[bytes], count: int, plan: KVPlan = PLAN, tokens: Sequence[int] = ()
) -> dict[int, EncodedSampleKV | RefusedSample]:
    reader = StreamReader(REQUEST, plan, [text_sample(i, tokens[i] if tokens else 9) for i in range(count)], INFO)
    results = [result for frame in frames for result in reader.feed(frame)]
    reader.finish()
    assert len(dict(results)) == len(results)
    return dict(results)


def assert_same(got: EncodedSampleKV | RefusedSample | None, sent: EncodedSampleKV, timings: bool = True) -> None:
    """Compare every field, and every tensor bit for bit with its dtype and shape."""
    assert isinstance(got, EncodedSampleKV)
    assert (got.sample_id, got.key, got.layers, got.codec) == (sent.sample_id, sent.key, sent.layers, sent.codec)
    assert got.relative_error == sent.relative_error
    assert got.parts.keys() == sent.parts.keys()
    assert got.timings == (sent.timings if timings else Timings())
    pairs = [(got.parts[name], sent.parts[name]) for name in sent.parts]
    pairs += [(got.positions, sent.positions), (got.token_ids_T, sent.token_ids_T), (got.byte_ends_T, sent.byte_ends_T)]
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


SENT = [sample_kv(0), sample_kv(1), sample_kv(2, slots=2)]


def stream(max_body: int = 1 << 20) -> list[bytes]:
    """The frames of `SENT`: two samples that share frames and a shorter one; a frame per layer where they fit."""
    writer = FrameWriter(REQUEST, PLAN, keys_of(SENT), max_body)
    frames = [frame for index, kv in enumerate(SENT) for frame in write_sample(writer, index, kv)]
    for at in range(3):
        frames += write_layer(writer, [0, 1], at, SENT) + write_layer(writer, [2], at, SENT) + writer.flush()
    frames += [frame for index, kv in enumerate(SENT) for frame in writer.sample_end(index, kv.timings)]
    return frames + writer.end()


@dataclass
class Forged:
    """A decoded frame that a test changes and hashes again, as a hostile server could."""

    header: dict[str, Any]
    body: bytearray

    def record(self, kind: str) -> dict[str, Any]:
        return next(record for record in self.header["records"] if record["kind"] == kind)


def forge(frames: Sequence[bytes], change: Callable[[list[Forged]], object]) -> list[bytes]:
    """Change frames, then correct their sequence numbers and hashes."""
    forged = [Forged(copy.deepcopy(header), bytearray(body)) for header, body in map(unpack_frame, frames)]
    change(forged)
    return [
        pack_frame(frame.header | {"seq": seq, "xxh3": xxhash.xxh3_64_intdigest(bytes(frame.body))}, bytes(frame.body))
        for seq, frame in enumerate(forged)
    ]
