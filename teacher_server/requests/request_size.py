"""Checks a request's sizes on its protobuf bytes, before they are parsed.

Parsing a request of empty messages takes up to 40 times its bytes, and holds the interpreter lock meanwhile. The scan
stops at the first count that exceeds its limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from kvcore.errors import FieldError
from kvcore.types import TeacherInfo

MAX_ID_LENGTH = 256
MAX_NAME_LENGTH = 64
MAX_SPANS = 3  # one of each kind
MAX_TURNS = 64
MAX_ROLE_LENGTH = 16
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_TOKEN_IDS = 1 << 20
MAX_UNKNOWN_FIELDS = 64

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES, _MAX_CHARACTER_BYTES = 10, 4
_NEVER_PACKED = (FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE)
# The last byte of a varint has no high bit. Every UTF-8 character has exactly one byte that is not a continuation.
_NOT_LAST_OF_VARINT = bytes(range(0x80, 0x100))
_CONTINUATIONS = bytes(range(0x80, 0xC0))


@dataclass(frozen=True, slots=True)
class SizeLimits:
    """Limits by `Message.field`: entries of repeated fields, characters of strings. `fields`: all fields together.

    A field that is not repeated may occur once. Other strings are limited by the size of the request alone.
    """

    entries: Mapping[str, int]
    characters: Mapping[str, int]
    fields: int


def size_limits(info: TeacherInfo) -> SizeLimits:
    """The limits of requests to one teacher."""
    samples = info.max_samples_per_request
    return SizeLimits(
        entries={
            "KVRequest.samples": samples,
            "GenerateRequest.samples": samples,
            "Sample.spans": MAX_SPANS,
            "Chat.turns": MAX_TURNS,
            "Plan.layers": info.layers,
            "Sampling.stop": MAX_STOPS,
            # A sample that exceeds max_sample_tokens fails alone; one that exceeds this limit fails the request.
            "TokenIds.ids": max(MAX_TOKEN_IDS, info.max_sample_tokens),
        },
        characters={
            "KVRequest.request_id": MAX_ID_LENGTH,
            "GenerateRequest.request_id": MAX_ID_LENGTH,
            "Sample.id": MAX_ID_LENGTH,
            "Turn.role": MAX_ROLE_LENGTH,
            "Selection.selector": MAX_NAME_LENGTH,
            "Codec.name": MAX_NAME_LENGTH,
            "PlanMap.digest": MAX_NAME_LENGTH,
            "Sampling.stop": MAX_STOP_LENGTH,
            "Sampling.answer_marker": MAX_STOP_LENGTH,
        },
        # Far more than a well-formed request has. It limits repeated numbers that are not packed.
        fields=(1 << 16) + 64 * samples,
    )


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Byte offsets of a field: its tag, its content (-1 if the field has no length), and its end."""

    tag: int
    start: int
    end: int


def check_size(data: bytes, message: Descriptor, limits: SizeLimits) -> list[ByteRange]:
    """Refuse a request with too many entries or too long strings. Returns the byte ranges of its samples.

    Raises:
        FieldError: a field exceeds its limit, with its size as far as counted; or the bytes are not a protobuf message.
    """
    scan = _Scan(data, limits)
    scan.message(message, 0, len(data), "")
    return scan.samples


class _Scan:
    def __init__(self, data: bytes, limits: SizeLimits) -> None:
        self._data = data
        self._limits = limits
        self._fields_left = limits.fields
        self.samples: list[ByteRange] = []

    def message(self, message: Descriptor, start: int, end: int, path: str) -> None:
        counts: dict[int, int] = {}
        for number, field_range in self._fields(start, end):
            field = message.fields_by_number.get(number)
            if field is None:
                counts[0] = counts.get(0, 0) + 1
                if counts[0] > MAX_UNKNOWN_FIELDS:
                    raise _malformed(f"{path or message.name} has more than {MAX_UNKNOWN_FIELDS} unknown fields")
                continue
            counted = counts.get(number, 0)
            counts[number] = counted + self._field(
                field, f"{message.name}.{field.name}", field_range, counted, f"{path}{field.name}"
            )

    def _field(self, field: FieldDescriptor, key: str, field_range: ByteRange, counted: int, path: str) -> int:
        """Check one field after `counted` entries of the same field; returns the number of entries that it adds."""
        packed = field_range.start >= 0 and field.is_repeated and field.cpp_type not in _NEVER_PACKED
        limit = self._limits.entries.get(key, 1)
        added = self._count_varints(field_range, limit, path) if packed else 1
        if counted + added > limit:
            size = f"{counted + added}" if packed else f"more than {limit}"
            raise FieldError(path, f"has {size} entries; the limit is {limit}")
        if field_range.start < 0:
            return added
        if field.is_repeated:
            path = f"{path}.{counted}"
        if field.message_type is not None:
            if field.message_type.name == "Sample":
                self.samples.append(field_range)
            self.message(field.message_type, field_range.start, field_range.end, f"{path}.")
        elif field.type == FieldDescriptor.TYPE_STRING:
            if key in self._limits.characters:
                self._check_characters(field_range, self._limits.characters[key], path)
            self._check_utf8(field_range, path)
        return added

    def _count_varints(self, field_range: ByteRange, limit: int, path: str) -> int:
        least = -(-(field_range.end - field_range.start) // _MAX_VARINT_BYTES)
        if least > limit:
            raise FieldError(path, f"has at least {least} entries; the limit is {limit}")
        return len(self._data[field_range.start : field_range.end].translate(None, _NOT_LAST_OF_VARINT))

    def _check_characters(self, field_range: ByteRange, limit: int, path: str) -> None:
        size = field_range.end - field_range.start
        if size > limit * _MAX_CHARACTER_BYTES:
            raise FieldError(path, f"has {size} bytes; the limit is {limit} characters")
        characters = len(self._data[field_range.start : field_range.end].translate(None, _CONTINUATIONS))
        if characters > limit:
            raise FieldError(path, f"has {characters} characters; the limit is {limit}")

    def _check_utf8(self, field_range: ByteRange, path: str) -> None:
        try:
            self._data[field_range.start : field_range.end].decode()
        except UnicodeDecodeError as error:
            raise FieldError(path, f"is not valid UTF-8 at byte {error.start}") from error

    def _fields(self, at: int, end: int) -> Iterator[tuple[int, ByteRange]]:
        """Number and byte range of each field."""
        while at < end:
            self._fields_left -= 1
            if self._fields_left < 0:
                raise _malformed(
                    f"it has more than {self._limits.fields} fields; send repeated numbers packed, as proto3 does"
                )
            begin = at
            tag, at = self._varint(at, end)
            start, wire_type = -1, tag & 7
            if wire_type == _LENGTH_DELIMITED:
                size, at = self._varint(at, end)
                start, at = at, at + size
            elif wire_type == _VARINT:
                at = self._varint(at, end)[1]
            elif wire_type in _FIXED_SIZES:
                at += _FIXED_SIZES[wire_type]
            else:
                raise _malformed(f"wire type {wire_type} before byte {at}")
            if at > end:
                raise _malformed(f"a field ends at byte {at}, past the end at byte {end}")
            yield tag >> 3, ByteRange(begin, start, at)

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for index, byte in enumerate(self._data[at : min(at + _MAX_VARINT_BYTES, end)]):
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                return value, at + index + 1
        raise _malformed(f"a number at byte {at} does not end")


def _malformed(problem: str) -> FieldError:
    return FieldError("request", f"is not a message that this server can read: {problem}")
