"""The state of one sample in a stream reader, and checks of record fields; all raise `ProtocolError`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import xxhash

from kvcore.errors import ProtocolError
from kvcore.tensors.packed_sample import PackedSample
from kvcore.types import Sample, Tensor, Timings
from kvcore.wire.sample_rows import Group

UINT64_MAX = 2**64 - 1


@dataclass(slots=True)
class SampleState:
    """What has arrived of one sample. `key` is the key of the requested sample, also after its completion arrived."""

    sample: Sample
    key: str
    tokens: int = 0
    layers_done: int = 0
    row: int = 0
    done: bool = False
    hash: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)
    errors: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    incoming: Incoming | None = None
    group: Group = field(init=False)
    packed: PackedSample = field(default_factory=PackedSample)
    token_ids_T: Tensor = field(init=False)
    byte_ends_T: Tensor = field(init=False)

    @property
    def text_bytes(self) -> int | None:
        """Bytes of the sample's text; None if it was sent as token ids."""
        return None if self.sample.text is None else len(self.sample.text.encode())

    def check_identity(self, record: dict[str, Any]) -> None:
        """Checks that a record is about this sample, as it was requested."""
        if record.get("id") != self.sample.id:
            raise ProtocolError(f"sample id {record.get('id')!r}, expected '{self.sample.id}'")
        self.check_key(record)

    def check_key(self, record: dict[str, Any]) -> None:
        """Checks that the teacher answers the sample and plan that were requested."""
        if record.get("key") != self.key:
            raise ProtocolError(
                f"sample '{self.sample.id}': the teacher answered another request than the one sent "
                f"(sample key {record.get('key')!r}, expected '{self.key}')"
            )

    def add_layer(self, row: memoryview, errors: dict[str, list[float]], place: int) -> None:
        """Counts the next layer, with the bytes that were sent of it and its errors at `place` of its record."""
        self.layers_done += 1
        self.hash.update(row)
        for kind, values in errors.items():
            self.errors.setdefault(kind, []).append(values[place])

    def close(self) -> None:
        """Ends the sample and releases its memory."""
        self.done = True
        if self.tokens:
            del self.token_ids_T, self.byte_ends_T
        if self.layers_done:
            del self.group
        self.packed = PackedSample()


@dataclass(slots=True)
class Incoming:
    """A record whose size has been checked, and the function that takes its body."""

    size: int
    states: list[SampleState]
    accept: Callable[[memoryview], None]
    chunks: list[memoryview] = field(default_factory=list[memoryview])
    missing: int = 0


def whole_number(record: dict[str, Any], name: str, low: int, high: int) -> int:
    """Returns a record's integer field after checking its range (both ends inclusive)."""
    value = record.get(name)
    if type(value) is not int or not low <= value <= high:
        raise ProtocolError(f"'{name}' must be a whole number between {low} and {high}, got {value!r}")
    return value


def finite_number(value: object, name: str) -> float:
    """Returns a number after checking that it is finite and at least 0."""
    if not isinstance(value, float | int) or not 0 <= value < math.inf:
        raise ProtocolError(f"'{name}' must hold finite numbers of at least 0, got {value!r}")
    return float(value)


def timings_of(record: object) -> Timings:
    """Reads the server's stage times from a sample's end."""
    return Timings(*seconds_of(record, ("queue", "prefill", "encode")))


def seconds_of(record: object, names: Sequence[str]) -> list[float]:
    """Reads the seconds of these names from a map."""
    if not isinstance(record, dict):
        raise ProtocolError("a sample has no timings")
    stages = cast("dict[str, Any]", record)
    return [finite_number(stages.get(name), name) for name in names]
