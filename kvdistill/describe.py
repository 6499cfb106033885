"""Asking a teacher server what it is, and saying it in words."""

from __future__ import annotations

import json
from contextlib import closing

from kvcore.plan import KVPlan
from kvcore.types import TeacherInfo
from student_trainer.kv_sources.remote import RemoteSource

# Of an unquantised cache, as a model in half precision keeps it.
RAW_ELEMENT_BYTES = 2


def describe(endpoint: str) -> TeacherInfo:
    """What the server at host:port answers to `Describe`.

    Raises:
        TeacherUnavailableError: nobody answers there.
        TeacherRefusedError: what answers is no teacher.
    """
    with closing(RemoteSource(endpoint, endpoint, every_layer)) as source:
        return source.connect()


def every_layer(info: TeacherInfo) -> KVPlan:
    """The plan that asks for all tokens of all layers."""
    return KVPlan(layers=tuple(range(info.layers)))


def raw_token_bytes(layers: int, kv_heads: int, head_dim: int) -> int:
    """Bytes that keys and values of one token take in a model's own cache, in half precision."""
    return 2 * RAW_ELEMENT_BYTES * layers * kv_heads * head_dim


def in_words(info: TeacherInfo) -> list[tuple[str, str]]:
    """A teacher's identity, geometry and limits, each with its name."""
    raw = raw_token_bytes(info.layers, info.kv_heads, info.head_dim)
    return [
        ("model", info.model),
        ("weights", info.weights_digest),
        ("tokenizer", info.tokenizer_fingerprint),
        ("runs in", f"{info.dtype}, engine {info.engine}"),
        ("geometry", f"{info.layers} layers, {info.kv_heads} KV heads of {info.head_dim}"),
        ("rotary", json.dumps(dict(info.rope), sort_keys=True)),
        ("raw cache", f"{raw:,} bytes a token (bf16)"),
        ("longest sample", f"{info.max_sample_tokens:,} tokens"),
        ("one request", f"{info.max_samples_per_request:,} samples"),
        ("one frame", f"{info.max_frame_bytes:,} bytes"),
        ("selectors", ", ".join(info.selectors)),
        ("codecs", ", ".join(info.codecs)),
    ]
