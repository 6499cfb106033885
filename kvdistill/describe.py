"""Queries a teacher server's `Describe` and formats the answer."""

from __future__ import annotations

import json
from contextlib import closing

from kvcore.plan import KVPlan
from kvcore.types import TeacherInfo
from student_trainer.kv_sources.remote import RemoteSource

# Of a model's own, unquantised cache in half precision.
RAW_ELEMENT_BYTES = 2


def describe(endpoint: str) -> TeacherInfo:
    """Calls `Describe` on the server at host:port.

    Raises:
        TeacherUnavailableError: the server does not answer.
        TeacherRefusedError: the server is not a teacher.
    """
    with closing(RemoteSource(endpoint, endpoint, every_layer)) as source:
        return source.connect()


def every_layer(info: TeacherInfo) -> KVPlan:
    """The plan for all tokens of all layers."""
    return KVPlan(layers=tuple(range(info.layers)))


def raw_token_bytes(layers: int, kv_heads: int, head_dim: int) -> int:
    """Bytes per token of a model's own K/V cache in half precision."""
    return 2 * RAW_ELEMENT_BYTES * layers * kv_heads * head_dim


def description_rows(info: TeacherInfo) -> list[tuple[str, str]]:
    """A teacher's identity, geometry and limits as (label, value) rows."""
    raw = raw_token_bytes(info.layers, info.kv_heads, info.head_dim)
    return [
        ("model", info.model),
        ("weights", info.weights_digest),
        ("tokenizer", info.tokenizer_fingerprint),
        ("engine", f"{info.engine}, {info.dtype}"),
        ("geometry", f"{info.layers} layers, {info.kv_heads} KV heads of {info.head_dim}"),
        ("rotary", json.dumps(dict(info.rope), sort_keys=True)),
        ("raw cache", f"{raw:,} bytes per token (bf16)"),
        ("max sample", f"{info.max_sample_tokens:,} tokens"),
        ("max request", f"{info.max_samples_per_request:,} samples"),
        ("max frame", f"{info.max_frame_bytes:,} bytes"),
        ("max map", f"{info.max_map_bytes:,} bytes" if info.max_map_bytes else "no maps"),
        ("selectors", ", ".join(info.selectors)),
        ("codecs", ", ".join(info.codecs)),
    ]
