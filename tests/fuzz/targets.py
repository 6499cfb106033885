"""What the fuzzer calls with arbitrary bytes. A target raises if kvdistill fails with an error that is not its own.

Random bytes seldom match a hash. So the targets put in the right hashes, as an attacker would, before they pass the
bytes on: what is fuzzed is the code behind the hashes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import xxhash

from kvcore.errors import ConfigError, KVDistillError, ProtocolError, StoreError
from kvcore.store.journal import seal
from kvcore.store.kv_store import KVStoreReader
from kvcore.wire.frames import pack_frame, unpack_frame
from kvcore.wire.stream_reader import StreamReader
from protos import kv_cache_pb2 as pb
from teacher_server.requests.request_parsing import parse_request, read_generate_query, read_query
from tests.support import golden
from tests.support.stores import SENT, fill
from tests.support.streams import INFO, PLAN, REQUEST, sample_kv, text_sample, write_stream

# Between two frames of a stream, or two lines of a journal, in the bytes of the fuzzer.
SEPARATOR = b"\xff\x00\xff\x00"
FRAME_SAMPLES = 2
_GOLDEN = golden.RELEASED / "0.1.0"


def read_request(data: bytes) -> None:
    """A server reads a request for K/V. Raises ConfigError if it refuses it."""
    read_query(parse_request(data, pb.KVRequest, golden.INFO), golden.INFO)


def read_generate_request(data: bytes) -> None:
    """A server reads a request to generate. Raises ConfigError if it refuses it."""
    read_generate_query(parse_request(data, pb.GenerateRequest, golden.INFO), golden.INFO)


def read_frames(data: bytes) -> None:
    """A client reads a stream of frames. Raises ProtocolError if it refuses one."""
    reader = StreamReader(REQUEST, PLAN, [text_sample(index) for index in range(FRAME_SAMPLES)], INFO)
    for number, part in enumerate(data.split(SEPARATOR)):
        reader.feed(_with_hashes(part, number))
    reader.finish()


def _with_hashes(part: bytes, number: int) -> bytes:
    """A frame from a header as JSON, a zero byte, and the body; anything else goes through as it is."""
    text, zero, body = part.partition(b"\0")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        return part
    if not zero or not isinstance(header, dict):
        return part
    header |= {"seq": number, "xxh3": xxhash.xxh3_64_intdigest(body)}
    try:
        return pack_frame(header, body)
    except (OverflowError, ValueError, UnicodeEncodeError):
        return part  # a number or a text that MessagePack does not hold


def read_store(data: bytes) -> None:
    """A reader opens a store with this journal, and reads what it lists. Raises StoreError if that is damaged."""
    lines = [_with_check(line) for line in data.split(SEPARATOR)]
    (_STORE / "rank0.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    with closing(KVStoreReader(_STORE)) as reader:
        for key in reader.keys():  # noqa: SIM118  not a dictionary
            reader.get(key)


def _with_check(line: bytes) -> bytes:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return line
    return seal(cast("dict[str, Any]", content)) if isinstance(content, dict) and content else line


def _frame_seed() -> bytes:
    parts: list[bytes] = []
    for frame in write_stream([sample_kv(index) for index in range(FRAME_SAMPLES)]):
        header, body = unpack_frame(frame)
        parts.append(json.dumps(header).encode() + b"\0" + bytes(body))
    return SEPARATOR.join(parts)


def _journal_seed() -> bytes:
    lines = (_STORE / "rank0.jsonl").read_bytes().splitlines()
    contents = [{name: value for name, value in json.loads(line).items() if name != "check"} for line in lines[:3]]
    return SEPARATOR.join(json.dumps(content).encode() for content in contents)


_FOLDER = tempfile.TemporaryDirectory(prefix="kvdistill-fuzz-")
_STORE = fill(Path(_FOLDER.name) / "store", SENT[:3])


@dataclass(frozen=True, slots=True)
class Target:
    """One target. `seeds`: valid inputs, from which the fuzzer starts. `refusal`: how `read` refuses an input."""

    read: Callable[[bytes], None]
    refusal: type[KVDistillError]
    seeds: Sequence[bytes]

    def __call__(self, data: bytes) -> None:
        """Reads an input that may be refused."""
        with suppress(self.refusal):
            self.read(data)


TARGETS = {
    "requests": Target(read_request, ConfigError, [(_GOLDEN / "kv_request.bin").read_bytes()]),
    "prompts": Target(read_generate_request, ConfigError, [(_GOLDEN / "generate_request.bin").read_bytes()]),
    "frames": Target(read_frames, ProtocolError, [_frame_seed()]),
    "store": Target(read_store, StoreError, [_journal_seed()]),
}
