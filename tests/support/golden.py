"""The content of the golden messages of a released version, in `tests/contract/released/VERSION`.

When a version is released, write its folder: `python -m tests.support.golden VERSION`. Never change an old one.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from kvcore.plan import CodecSpec, KVPlan, SamplingParams, Selection
from kvcore.types import Chat, EncodedSampleKV, Sample, Span, TeacherInfo, Tensor, Timings, Turn
from kvcore.wire import messages
from kvcore.wire.completion import Completion
from kvcore.wire.frames import FrameWriter
from protos import kv_cache_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
RELEASED = ROOT / "tests" / "contract" / "released"
PROTO = "kv_cache.proto"

REQUEST_ID = "golden"
INFO = TeacherInfo(
    model="golden/teacher",
    weights_digest="a1" * 16,
    tokenizer_fingerprint="b2" * 16,
    layers=5,
    kv_heads=2,
    head_dim=4,
    rope={"rope_theta": 10000.0, "rope_type": "default"},
    engine="fake",
    dtype="fp32",
    max_sample_tokens=64,
    max_samples_per_request=8,
    max_frame_bytes=1 << 20,
    selectors=("full", "r_kv", "right"),
    codecs=("bf16", "int8", "raw"),
)
PLAN = KVPlan(
    layers=(0, 2, 4),
    selection=Selection(selector="right", budget=3, span="reasoning", scope="head"),
    codec=CodecSpec(name="int8", group_size=2, max_relative_error=0.5),
)
SAMPLING = SamplingParams(max_new_tokens=8, temperature=0.5, top_p=0.9, seed=7, stop=("\nQ:",), answer_marker="A:")
SPANS = (Span("prompt", 0, 3), Span("reasoning", 3, 8), Span("answer", 8, 11))
SAMPLES = (
    Sample("text", text="1+2=3; ü = 3", spans=SPANS),
    Sample("ids", token_ids=(1, 2, 300, 70_000), spans=(Span("reasoning", 1, 4),)),
    Sample("chat", text="Hi? 1+1. 2", chat=Chat((Turn("user", 0, 3),), "Be brief."), spans=(Span("reasoning", 4, 8),)),
)
PROMPT = Sample("prompt", text="1+2=", spans=(Span("prompt", 0, 4),))
COMPLETION = Completion(
    Sample("prompt", text="1+2=3 A:3", spans=(Span("prompt", 0, 4), Span("reasoning", 4, 8), Span("answer", 8, 9))),
    "stop",
    5,
    0.25,
    0.5,
)


def sample_kv(index: int) -> EncodedSampleKV:
    """K/V of one of `SAMPLES`, from counted numbers only."""
    sample, slots = SAMPLES[index], 3
    token_ids = sample.token_ids or (1, 2, 3, 4, 5, 6)
    layers, heads, dim = len(PLAN.layers), INFO.kv_heads, INFO.head_dim

    def counted(*shape: int, dtype: torch.dtype) -> Tensor:
        numbers = torch.arange(int(torch.tensor(shape).prod())) + index
        return (numbers % 100 if dtype == torch.int8 else numbers / 8).reshape(shape).to(dtype)

    return EncodedSampleKV(
        sample_id=sample.id,
        key=sample.key(INFO.weights_digest, PLAN),
        layers=PLAN.layers,
        codec=PLAN.codec,
        parts={
            "k.codes": counted(layers, heads, slots, dim, dtype=torch.int8),
            "k.scale": counted(layers, heads, 2, dim, dtype=torch.bfloat16),
            "v.codes": counted(layers, heads, slots, dim, dtype=torch.int8),
            "v.scale": counted(layers, heads, slots, 2, dtype=torch.bfloat16),
        },
        positions=torch.tensor([1, 2, 3], dtype=torch.int32).expand(layers, heads, slots).contiguous(),
        token_ids_T=torch.tensor(token_ids, dtype=torch.int32),
        byte_ends_T=torch.arange(len(token_ids), dtype=torch.int32) - 1,
        relative_error={kind: [0.0, 0.125, 0.25] for kind in ("k", "v")},
        timings=Timings(queue=0.25, prefill=0.5, encode=0.125),
    )


def kv_request() -> bytes:
    """The serialized request for `SAMPLES`."""
    return pb.KVRequest(
        request_id=REQUEST_ID,
        plan=messages.plan_to_proto(PLAN),
        samples=[messages.sample_to_proto(sample) for sample in SAMPLES],
    ).SerializeToString()


def generate_request() -> bytes:
    """The serialized request to generate from `PROMPT`."""
    return pb.GenerateRequest(
        request_id=REQUEST_ID,
        plan=messages.plan_to_proto(PLAN),
        samples=[messages.sample_to_proto(PROMPT)],
        sampling=messages.sampling_to_proto(SAMPLING),
    ).SerializeToString()


def description() -> bytes:
    """The serialized answer of `Describe`."""
    return messages.info_to_proto(INFO).SerializeToString()


def kv_frames() -> list[bytes]:
    """The answer to `kv_request`: two samples in frames so small that records are split, and one that failed."""
    sent = [sample_kv(0), sample_kv(1)]
    keys = [sample.key(INFO.weights_digest, PLAN) for sample in SAMPLES]
    writer = FrameWriter(REQUEST_ID, PLAN, keys, max_body=64)
    frames: list[bytes] = []
    for index, kv in enumerate(sent):
        frames += writer.sample(index, kv.sample_id, kv.token_ids_T.tolist(), kv.byte_ends_T.tolist())
    frames += writer.sample_failed(2, "INVALID_ARGUMENT", "no chat template")
    for at, layer in enumerate(PLAN.layers):
        parts = {name: torch.stack([kv.parts[name][at] for kv in sent]) for name in sent[0].parts}
        errors = {kind: [kv.relative_error[kind][at] for kv in sent] for kind in ("k", "v")}
        frames += writer.layer_batch([0, 1], layer, parts, torch.stack([kv.positions[at] for kv in sent]), errors)
    for index, kv in enumerate(sent):
        frames += writer.sample_end(index, kv.timings)
    return frames + writer.end()


def generate_frames() -> list[bytes]:
    """The answer to `generate_request`: a text without K/V."""
    key = PROMPT.key(INFO.weights_digest, PLAN, SAMPLING)
    writer = FrameWriter(REQUEST_ID, PLAN, [key], INFO.max_frame_bytes)
    failed = writer.completion(0, PROMPT, COMPLETION)
    return failed + writer.sample_failed(0, "FAILED_PRECONDITION", "the text has no answer") + writer.end()


def keys() -> dict[str, str]:
    """Sample keys by sample id."""
    found = {sample.id: sample.key(INFO.weights_digest, PLAN) for sample in SAMPLES}
    return found | {PROMPT.id: PROMPT.key(INFO.weights_digest, PLAN, SAMPLING)}


def read_frames(path: Path) -> list[bytes]:
    """The frames in a file, each after its size in four bytes, big-endian."""
    data, frames = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:4], "big")
        frames.append(data[4 : 4 + size])
        data = data[4 + size :]
    return frames


def _write_frames(path: Path, frames: Sequence[bytes]) -> None:
    path.write_bytes(b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames))


def write(folder: Path) -> None:
    """Writes the golden messages of this version."""
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "protos" / PROTO, folder / PROTO)
    (folder / "kv_request.bin").write_bytes(kv_request())
    (folder / "generate_request.bin").write_bytes(generate_request())
    (folder / "description.bin").write_bytes(description())
    _write_frames(folder / "kv_frames.bin", kv_frames())
    _write_frames(folder / "generate_frames.bin", generate_frames())
    (folder / "keys.json").write_text(json.dumps(keys(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(RELEASED / sys.argv[1])
