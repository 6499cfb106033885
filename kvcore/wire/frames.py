"""Frames of the KV stream: a MessagePack header and a raw body in the protobuf wire format of `KVFrame`.

This module packs and parses the bytes itself, so that gRPC handlers pass them through without copies; any protobuf
client reads them as an ordinary `KVFrame`. docs/protocol.md describes every field of every record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import msgpack
import numpy as np
import torch
import xxhash
from google.protobuf.message import DecodeError

from kvcore.errors import ProtocolError
from kvcore.plan import CODED, KVPlan
from kvcore.tensors.kv_map import KVMap
from kvcore.types import Sample, Tensor, Timings
from kvcore.wire.completion import Completion
from kvcore.wire.packed_rows import PackedRow, pack_rows
from protos import kv_cache_pb2 as pb

PROTOCOL_VERSION = 1

# How a sample may end except with `ok`: the names of gRPC's status codes.
FAILURE_STATUSES = frozenset(code.name for code in grpc.StatusCode if code is not grpc.StatusCode.OK)

# The most records in a frame, so that headers stay small even if records have no body.
MAX_RECORDS = 1024

_HEADER_FIELD = 1
_BODY_FIELD = 2
_HEADER_XXH3_FIELD = 3
_SHARED_BODY_FIELD = 4
_HEADER_TAG = b"\x0a"
_BODY_TAG = b"\x12"
_HEADER_XXH3_TAG = b"\x19"
_SHARED_BODY_TAG = b"\x22"
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
# Most bytes of a tag or a size, and of a number.
_UINT32_BYTES, _UINT64_BYTES = 5, 10

# Reads a body that is not in its frame.
ReadShared = Callable[[pb.SharedBody], bytes]


def pack_frame(header: Mapping[str, Any], body: bytes) -> bytes:
    """Returns the protobuf bytes of a `KVFrame` with this header, its hash, and this body."""
    return _join_frame(header, [body], len(body))


def _join_frame(header: Mapping[str, Any], body: Sequence[bytes | memoryview], size: int) -> bytes:
    packed = msgpack.packb(header)
    pieces: list[bytes | memoryview] = [_HEADER_TAG, _varint(len(packed)), packed]
    if size:
        pieces += [_BODY_TAG, _varint(size), *body]
    pieces += [_HEADER_XXH3_TAG, xxhash.xxh3_64_intdigest(packed).to_bytes(8, "little")]
    return b"".join(pieces)


def body_of(frame: bytes) -> memoryview:
    """The body of a frame that this process has packed."""
    return _fields(frame)[_BODY_FIELD]


def with_shared_body(frame: bytes, place: pb.SharedBody) -> bytes:
    """The same frame, but its body is in shared memory."""
    found, packed = _fields(frame), place.SerializeToString()
    header = found[_HEADER_FIELD]
    pieces = (_HEADER_TAG, _varint(len(header)), header, _HEADER_XXH3_TAG, found[_HEADER_XXH3_FIELD])
    return b"".join([*pieces, _SHARED_BODY_TAG, _varint(len(packed)), packed])


def unpack_frame(data: bytes, read_shared: ReadShared | None = None) -> tuple[dict[str, Any], memoryview]:
    """Parses a frame without copying its body. Unknown protobuf fields are skipped, as protobuf requires.

    Args:
        data: the protobuf bytes of a `KVFrame`.
        read_shared: reads a body from shared memory; None if none was agreed.

    Raises:
        ProtocolError: truncated or malformed protobuf, or a header that does not match its hash or is not a
            MessagePack map with string keys; or a body in shared memory that cannot be read.
    """
    found = _fields(data)
    # An absent number is 0, as protobuf defines.
    if xxhash.xxh3_64_intdigest(found[_HEADER_FIELD]) != int.from_bytes(found[_HEADER_XXH3_FIELD], "little"):
        raise ProtocolError("the frame's header does not match its xxh3")
    header, body = _unpack_header(found[_HEADER_FIELD]), found[_BODY_FIELD]
    return header, _shared_body(found, read_shared) if found[_SHARED_BODY_FIELD] else body


def _shared_body(found: Mapping[int, memoryview], read_shared: ReadShared | None) -> memoryview:
    if read_shared is None or found[_BODY_FIELD]:
        raise ProtocolError("the frame has a body in shared memory, which was not agreed, or two bodies")
    try:
        place = pb.SharedBody.FromString(bytes(found[_SHARED_BODY_FIELD]))
    except DecodeError as error:
        raise ProtocolError(f"the frame's place in shared memory is malformed: {error}") from error
    return memoryview(read_shared(place))


def _fields(data: bytes) -> dict[int, memoryview]:
    """The content of each known field; empty if it is absent."""
    view = memoryview(data)
    wire_types = {_HEADER_FIELD: _LENGTH_DELIMITED, _BODY_FIELD: _LENGTH_DELIMITED, _HEADER_XXH3_FIELD: _FIXED64}
    wire_types[_SHARED_BODY_FIELD] = _LENGTH_DELIMITED
    found = dict.fromkeys(wire_types, view[:0])
    at = 0
    while at < len(view):
        tag, at = _read_varint(view, at, _UINT32_BYTES)
        if tag >= 1 << 32:
            raise ProtocolError(f"frame is not a protobuf message: a field number above 2^29 before byte {at}")
        number, wire_type = tag >> 3, tag & 7
        if number == 0:
            raise ProtocolError(f"frame is not a protobuf message: field number 0 at byte {at}")
        start, at = _field_extent(view, at, wire_type)
        if wire_types.get(number) == wire_type:
            found[number] = view[start:at]
    return found


def _unpack_header(packed: memoryview) -> dict[str, Any]:
    try:
        header = msgpack.unpackb(packed)
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"frame header is not valid MessagePack: {error}") from error
    if not isinstance(header, dict):
        raise ProtocolError(f"frame header is a MessagePack {type(header).__name__}, expected a map")
    return cast("dict[str, Any]", header)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, at: int, most_bytes: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 7 * most_bytes, 7):
        if at >= len(view):
            raise ProtocolError(f"frame is truncated at byte {at}: inside a number")
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ProtocolError(f"frame is not a protobuf message: a number of more than {most_bytes} bytes before byte {at}")


def _field_extent(view: memoryview, at: int, wire_type: int) -> tuple[int, int]:
    """Returns where a field's content starts and ends."""
    if wire_type == _VARINT:
        return at, _read_varint(view, at, _UINT64_BYTES)[1]
    if wire_type == _LENGTH_DELIMITED:
        size, at = _read_varint(view, at, _UINT32_BYTES)
    elif wire_type == _FIXED64:
        size = 8
    elif wire_type == _FIXED32:
        size = 4
    else:
        raise ProtocolError(f"frame is not a KVFrame: wire type {wire_type} at byte {at}")
    if size > len(view) - at:
        raise ProtocolError(f"frame is truncated: a field of {size} bytes, {len(view) - at} are left")
    return at, at + size


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name on the wire and in the store, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


@dataclass(slots=True)
class _OpenSample:
    """Counts and hash of what has been sent of a sample, for its end record."""

    tokens: int
    layers: int = 0
    slots: int = 0
    hash: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)
    codes_hash: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)


class FrameWriter:
    """Writes one request's results as frames. Records are buffered until `max_body` is full or `flush` is called.

    Every method returns the frames that are ready, often none. Not thread-safe.

    Args:
        request_id: repeated in every frame.
        plan: the plan of the request.
        keys: `Sample.key` of each sample of the request, as the server read it; its records repeat it.
        max_body: the largest body of a frame in bytes; larger records are split.
        kv_map: the plan's map. With the codec `pca`, layers are entropy-coded.
    """

    def __init__(
        self, request_id: str, plan: KVPlan, keys: Sequence[str], max_body: int, kv_map: KVMap | None = None
    ) -> None:
        assert max_body > 0
        assert plan.codec.name != CODED or kv_map is not None, "the codec needs the plan's map"
        self._map = kv_map if plan.codec.name == CODED else None
        self._request_id = request_id
        self._plan = plan
        self._keys = keys
        self._max_body = max_body
        self._seq = 0
        self._records: list[dict[str, Any]] = []
        self._body: list[memoryview] = []
        self._used = 0
        self._open: dict[int, _OpenSample] = {}
        self._ended = 0

    def completion(self, index: int, prompt: Sample, completion: Completion) -> list[bytes]:
        """Writes the text that the teacher generated for prompt `index`, and the spans of prompt and text."""
        sample = completion.sample
        assert prompt.text is not None
        assert sample.text is not None
        record = {
            "kind": "written",
            "index": index,
            "id": sample.id,
            "key": self._keys[index],
            "finish_reason": completion.finish_reason,
            "tokens": completion.tokens,
            "spans": [[span.kind, span.start, span.end] for span in sample.spans],
            "timings": {"queue": completion.queue_s, "write": completion.generate_s},
        }
        return self._add(record, index, memoryview(sample.text[len(prompt.text) :].encode()))

    def sample(self, index: int, sample_id: str, token_ids: Sequence[int], byte_ends: Sequence[int]) -> list[bytes]:
        """Opens sample `index` of the request with its tokens and their byte ends."""
        assert len(token_ids) == len(byte_ends)
        body = np.array([token_ids, byte_ends], dtype="<i4").tobytes()
        self._open[index] = opened = _OpenSample(tokens=len(token_ids))
        opened.hash.update(body)
        key = self._keys[index]
        record = {"kind": "sample", "index": index, "id": sample_id, "key": key, "tokens": len(token_ids)}
        return self._add(record, index, memoryview(body))

    def layer(
        self,
        index: int,
        layer: int,
        parts: Mapping[str, Tensor],
        positions: Tensor,
        relative_error: Mapping[str, float],
    ) -> list[bytes]:
        """Writes one layer of one sample: `layer_batch` without the leading dimension."""
        return self.layer_batch(
            [index],
            layer,
            {name: part.unsqueeze(0) for name, part in parts.items()},
            positions.unsqueeze(0),
            {kind: [error] for kind, error in relative_error.items()},
        )

    def layer_batch(
        self,
        indices: Sequence[int],
        layer: int,
        parts: Mapping[str, Tensor],
        positions_BHM: Tensor,
        relative_error: Mapping[str, Sequence[float]],
        packed: Sequence[PackedRow] | None = None,
    ) -> list[bytes]:
        """Writes one layer of several samples with the same number of slots; far cheaper than one call per sample.

        Args:
            indices: the samples' indices in the request, all opened by `sample`.
            layer: the plan's next layer.
            parts: `k.codes`, `v.scale`, ... on the CPU, each [B, ...].
            positions_BHM: int32 [B,H|1,M].
            relative_error: for `k` and `v`, one number per sample.
            packed: the rows of the codec `pca`, if they have been made before.
        """
        slots = positions_BHM.shape[-1]
        assert slots > 0
        columns = [("positions", positions_BHM.to(torch.int32)), *sorted(parts.items())]
        record: dict[str, Any] = {
            "kind": "layer",
            "indices": list(indices),
            "layer": layer,
            "slots": slots,
            "codec": self._plan.codec.name,
            "parts": [[name, dtype_name(column.dtype), list(column.shape[1:])] for name, column in columns],
            "errors": {kind: list(errors) for kind, errors in relative_error.items()},
        }
        if self._map is not None:
            if packed is None:
                packed = pack_rows(self._plan, self._map, self._open[indices[0]].layers, parts, positions_BHM)
            return self._add_packed(record, packed)
        rows = np.concatenate([_bytes_of(column) for _, column in columns], axis=1)
        flat = rows.reshape(-1).data
        row_bytes = rows.shape[1]
        for row, index in enumerate(indices):
            opened = self._open[index]
            opened.layers += 1
            opened.slots = slots
            opened.hash.update(flat[row * row_bytes : (row + 1) * row_bytes])
        return self._add_rows(record, flat, row_bytes)

    def sample_end(self, index: int, timings: Timings) -> list[bytes]:
        """Ends a sample after its last layer."""
        opened = self._open.pop(index)
        assert opened.layers == len(self._plan.layers)
        record = {
            "kind": "sample_end",
            "index": index,
            "key": self._keys[index],
            "status": "ok",
            "digest": opened.hash.intdigest(),
            "tokens": opened.tokens,
            "slots": opened.slots,
            "layers": opened.layers,
            "timings": {"queue": timings.queue, "prefill": timings.prefill, "encode": timings.encode},
        }
        if self._map is not None:
            record["codes_xxh3"] = opened.codes_hash.intdigest()
        return self._end_sample(record)

    def sample_failed(self, index: int, code: str, message: str) -> list[bytes]:
        """Ends a sample that failed, at any point; the other samples are not affected."""
        assert code in FAILURE_STATUSES, code
        self._open.pop(index, None)
        key = self._keys[index]
        return self._end_sample({"kind": "sample_end", "index": index, "key": key, "status": code, "message": message})

    def flush(self) -> list[bytes]:
        """Returns a frame with all buffered records, if there are any."""
        return [self._emit()] if self._records else []

    def end(self) -> list[bytes]:
        """Ends the stream."""
        assert not self._open
        return [*self._add_record({"kind": "end", "samples": self._ended}, memoryview(b"")), *self.flush()]

    def _end_sample(self, record: dict[str, Any]) -> list[bytes]:
        self._ended += 1
        return self._add_record(record, memoryview(b""))

    def _add_rows(self, record: dict[str, Any], flat: memoryview, row_bytes: int) -> list[bytes]:
        """Distributes the rows of a layer over frames; a row is split only if it does not fit into one frame."""
        frames: list[bytes] = []
        indices, errors = record["indices"], record["errors"]
        done = 0
        while done < len(indices):
            if self._used + row_bytes > self._max_body:
                frames += self.flush()
            count = max(1, (self._max_body - self._used) // row_bytes)
            end = min(done + count, len(indices))
            piece = {
                **record,
                "indices": indices[done:end],
                "errors": {kind: values[done:end] for kind, values in errors.items()},
            }
            frames += self._add(piece, indices[done], flat[done * row_bytes : end * row_bytes])
            done = end
        return frames

    def _add_packed(self, record: dict[str, Any], rows: Sequence[PackedRow]) -> list[bytes]:
        """Distributes entropy-coded rows over frames, as many to a record as fit."""
        frames: list[bytes] = []
        done = 0
        for index, row in zip(record["indices"], rows, strict=True):
            opened = self._open[index]
            opened.layers += 1
            opened.slots = record["slots"]
            opened.hash.update(row.row)
            opened.codes_hash.update(row.codes)
        while done < len(rows):
            if self._used + len(rows[done].row) > self._max_body:
                frames += self.flush()
            end, size = done + 1, len(rows[done].row)
            while end < len(rows) and self._used + size + len(rows[end].row) <= self._max_body:
                size += len(rows[end].row)
                end += 1
            piece = {
                **record,
                "indices": record["indices"][done:end],
                "errors": {kind: values[done:end] for kind, values in record["errors"].items()},
                "packed": [list(row.sizes) for row in rows[done:end]],
            }
            frames += self._add(piece, record["indices"][done], memoryview(b"".join(row.row for row in rows[done:end])))
            done = end
        return frames

    def _add(self, record: dict[str, Any], index: int, body: memoryview) -> list[bytes]:
        """Adds a record with its body, split over several frames if necessary."""
        if len(body) <= self._max_body:
            return self._add_record({**record, "bytes": len(body)}, body)
        frames = self.flush()
        record = {**record, "index": index, "bytes": self._max_body, "size": len(body)}
        for start in range(0, len(body), self._max_body):
            piece = body[start : start + self._max_body]
            frames += self._add_record(record, piece)
            record = {"kind": "more", "index": index, "bytes": min(self._max_body, len(body) - start - len(piece))}
        return frames

    def _add_record(self, record: dict[str, Any], body: memoryview) -> list[bytes]:
        full = self._used + len(body) > self._max_body or len(self._records) >= MAX_RECORDS
        frames = self.flush() if full else []
        self._records.append(record)
        if len(body):
            self._body.append(body)
            self._used += len(body)
        return frames

    def _emit(self) -> bytes:
        digest = xxhash.xxh3_64()
        for piece in self._body:
            digest.update(piece)
        header = {
            "v": PROTOCOL_VERSION,
            "request": self._request_id,
            "seq": self._seq,
            "xxh3": digest.intdigest(),
            "records": self._records,
        }
        frame = _join_frame(header, self._body, self._used)
        self._seq += 1
        self._records, self._body, self._used = [], [], 0
        return frame


def _bytes_of(tensor: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """A CPU tensor [B, ...] as bytes [B, n], without a copy if it is contiguous."""
    return tensor.contiguous().reshape(tensor.shape[0], -1).view(torch.uint8).numpy()
