"""Splits samples into requests that a server accepts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvcore.types import Sample

# Below gRPC servers' default limit of 4 MiB; a single sample may still be larger.
REQUEST_BYTES = 3 << 20


def chunks_of(samples: Sequence[Sample], max_samples: int) -> Iterator[list[Sample]]:
    """Splits samples into requests of at most `max_samples` and about `REQUEST_BYTES`."""
    chunk: list[Sample] = []
    size = 0
    for sample in samples:
        # A character takes at most 4 bytes in UTF-8, a token id below 2^35 at most 5 as a varint.
        bytes_at_most = 4 * len(sample.text or "") + 5 * len(sample.token_ids or ())
        if chunk and (len(chunk) == max_samples or size + bytes_at_most > REQUEST_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(sample)
        size += bytes_at_most
    if chunk:
        yield chunk
