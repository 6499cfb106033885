"""Limits of a server's description of itself, checked before it is converted, logged or given memory."""

from __future__ import annotations

from kvcore.errors import FieldError
from kvcore.printable import printable
from protos import kv_cache_pb2 as pb

# Several times those of the largest models.
_LARGEST = {"layers": 4096, "kv_heads": 4096, "head_dim": 65_536}
# Clients receive messages of this size, which `max_frame_bytes` of servers may not exceed either.
_LARGEST_FRAME_BYTES = 64 << 20
_MOST_CHARACTERS = {
    "model": 1024,
    "weights_digest": 256,
    "tokenizer_fingerprint": 256,
    "engine": 256,
    "dtype": 256,
    "rope_json": 65_536,
}
_MOST_NAMES, _LONGEST_NAME = 256, 256


def check_description(proto: pb.DescribeResponse) -> None:
    """Refuses sizes that no teacher has, long texts, and control characters, which could reach a terminal.

    Raises:
        FieldError: names the field and the limit.
    """
    for field, limit in _LARGEST.items():
        _at_most(limit, getattr(proto, field), field)
    _at_most(_LARGEST_FRAME_BYTES, proto.limits.max_frame_bytes, "limits.max_frame_bytes")
    for field, limit in _MOST_CHARACTERS.items():
        _check_text(getattr(proto, field), limit, field)
    for field, names in (("selectors", proto.selectors), ("codecs", proto.codecs)):
        _at_most(_MOST_NAMES, len(names), field)
        for name in names:
            _check_text(name, _LONGEST_NAME, field)


def _at_most(limit: int, value: int, field: str) -> None:
    if value > limit:
        raise FieldError(field, f"must be at most {limit} (got {value})")


def _check_text(text: str, limit: int, field: str) -> None:
    if len(text) > limit:
        raise FieldError(field, f"must have at most {limit} characters (got {len(text)})")
    if not text.isprintable():
        raise FieldError(field, f"must have no control characters (got '{printable(text[:80])}')")
