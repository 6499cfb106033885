"""Tests of frames: compatibility with protobuf, detection of damage, and how the writer fills and splits them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from kvcore.errors import ProtocolError
from kvcore.types import Timings
from kvcore.wire.frames import MAX_RECORDS, FrameWriter, pack_frame, unpack_frame
from protos import kv_cache_pb2 as pb
from tests.support.streams import (
    INFO,
    PLAN,
    REQUEST,
    keys_of,
    sample_kv,
    text_sample,
    write_layer,
    write_sample,
    write_stream,
)

PROTOCOL = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"

plain = st.integers(-(2**63), 2**64 - 1) | st.text() | st.booleans() | st.floats(allow_nan=False) | st.none()
headers = st.dictionaries(st.text(), plain | st.lists(plain), max_size=5)


def protobuf_frame(header: object, body: bytes) -> bytes:
    """A frame as the protobuf library serialises it."""
    packed = msgpack.packb(header)
    return pb.KVFrame(header=packed, body=body, header_xxh3=xxhash.xxh3_64_intdigest(packed)).SerializeToString()


@given(headers, st.binary(max_size=300))
def test_packed_frames_equal_the_bytes_of_protobuf(header, body):
    frame = pack_frame(header, body)
    assert type(frame) is bytes
    assert frame == protobuf_frame(header, body)


@given(headers, st.binary(max_size=300))
def test_frames_written_by_protobuf_are_read(header, body):
    read, read_body = unpack_frame(protobuf_frame(header, body))
    assert read == header
    assert read_body == body


@pytest.mark.parametrize("size", [127, 128, 16383, 16384, 2**21 - 1, 2**21])
def test_protobuf_reads_lengths_at_varint_boundaries(size):
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    assert pb.KVFrame.FromString(pack_frame({}, body)).body == body


def varint(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])


def field(number: int, wire_type: int, content: bytes | int) -> bytes:
    tag = varint(number << 3 | wire_type)
    if isinstance(content, int):
        return tag + varint(content)
    return tag + (varint(len(content)) if wire_type == 2 else b"") + content


unknown_fields = st.one_of(
    st.builds(field, st.integers(4, 2**29 - 1), st.just(0), st.integers(0, 2**64 - 1)),
    st.builds(field, st.integers(4, 2**29 - 1), st.just(1), st.binary(min_size=8, max_size=8)),
    st.builds(field, st.integers(4, 2**29 - 1), st.just(2), st.binary(max_size=20)),
    st.builds(field, st.integers(4, 2**29 - 1), st.just(5), st.binary(min_size=4, max_size=4)),
    # Known field numbers with other wire types are unknown fields too.
    st.builds(field, st.integers(1, 3), st.just(0), st.integers(0, 2**64 - 1)),
    st.builds(field, st.just(3), st.just(2), st.binary(max_size=20)),
)
known_fields = st.builds(field, st.just(1), st.just(2), headers.map(msgpack.packb)) | st.builds(
    field, st.just(2), st.just(2), st.binary(max_size=50)
)


def with_header_hash(data: bytes) -> bytes:
    """The fields of a frame plus the xxh3 of the header that protobuf reads from them."""
    return data + field(3, 1, xxhash.xxh3_64_digest(pb.KVFrame.FromString(data).header)[::-1])


@given(st.lists(unknown_fields | known_fields, max_size=6), headers)
def test_reordered_repeated_and_unknown_fields_are_read_as_by_protobuf(fields, header):
    data = with_header_hash(b"".join([field(1, 2, msgpack.packb(header)), *fields]))
    by_protobuf = pb.KVFrame.FromString(data)
    read, body = unpack_frame(data)
    assert read == msgpack.unpackb(by_protobuf.header)
    assert body == by_protobuf.body


@given(st.binary(max_size=80), st.binary(max_size=80))
@example(b"", b"\x80\x80\x80\x80\x10\x00\x08\x00")  # A tag above 2^32.
@example(b"", b"\x88\x80\x80\x80\x80\x00\x01")  # A tag of six bytes.
@example(b"", b"\x22\x81\x80\x80\x80\x80\x00x")  # A size of six bytes.
def test_arbitrary_bytes_are_refused_or_read_as_by_protobuf(before, after):
    data = before + protobuf_frame({"seq": 1}, b"body") + after
    try:
        header, body = unpack_frame(data)
    except ProtocolError:
        return
    by_protobuf = pb.KVFrame.FromString(data)
    assert msgpack.unpackb(by_protobuf.header) == header
    assert by_protobuf.body == body


def test_a_frame_cut_anywhere_inside_a_field_is_refused():
    frame = pack_frame({"seq": 300, "records": ["x" * 200]}, b"b" * 200)
    for length in range(len(frame)):
        with pytest.raises(ProtocolError, match=r"truncated|does not match its xxh3"):
            unpack_frame(frame[:length])


@given(headers, st.binary(min_size=1, max_size=40))
def test_a_flipped_bit_is_refused_or_leaves_the_header_unchanged(header, body):
    frame = pack_frame(header, body)
    for bit in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            read, _ = unpack_frame(bytes(damaged))
        except ProtocolError:
            continue
        assert read == header


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "does not match its xxh3"),
        (field(1, 2, msgpack.packb({})), "does not match its xxh3"),
        (protobuf_frame({}, b"")[:-1] + b"\0", "does not match its xxh3"),
        (field(0, 2, b""), "field number 0"),
        (b"\x0a" + b"\xff" * 10 + b"\x01", "more than 5 bytes"),
        (with_header_hash(field(1, 2, b"\xc1")), "not valid MessagePack"),
        (with_header_hash(field(1, 2, b"\x80\x80")), "not valid MessagePack"),
        (with_header_hash(field(1, 2, b"\xa1\xff")), "not valid MessagePack"),
        (with_header_hash(field(1, 2, b"\x81\x01\x01")), "not valid MessagePack"),
        (with_header_hash(field(1, 2, b"\x91" * 5000 + b"\xc0")), "not valid MessagePack"),
        (with_header_hash(field(1, 2, b"\xdf\xff\xff\xff\xff")), "not valid MessagePack"),
        (with_header_hash(field(1, 2, msgpack.packb([1]))), "expected a map"),
        (b"\x0b" + field(1, 2, msgpack.packb({})), "wire type 3"),
    ],
)
def test_errors_of_malformed_frames_name_the_problem(data, problem):
    with pytest.raises(ProtocolError, match=problem):
        unpack_frame(data)


def records_of(frame: bytes) -> list[dict[str, Any]]:
    return unpack_frame(frame)[0]["records"]


def test_small_samples_of_one_layer_share_a_frame():
    sent = [sample_kv(i) for i in range(20)]
    frames = write_stream(sent)
    assert len(frames) == len(PLAN.layers) + 1
    assert [[r["kind"] for r in records_of(frame)] for frame in frames] == [
        ["sample"] * 20 + ["layer"],
        ["layer"],
        ["layer"],
        ["sample_end"] * 20 + ["end"],
    ]


def test_single_samples_and_a_batch_write_the_same_bytes():
    sent = [sample_kv(i) for i in range(3)]
    batched, single = (FrameWriter(REQUEST, PLAN, keys_of(sent), 1 << 20) for _ in range(2))
    for index, kv in enumerate(sent):
        write_sample(batched, index, kv)
        write_sample(single, index, kv)
    write_layer(batched, [0, 1, 2], 0, sent)
    for index, kv in enumerate(sent):
        parts = {name: part[0] for name, part in kv.parts.items()}
        errors = {kind: values[0] for kind, values in kv.relative_error.items()}
        single.layer(index, 0, parts, kv.positions[0], errors)
    (left,), (right,) = batched.flush(), single.flush()
    assert unpack_frame(left)[1] == unpack_frame(right)[1]
    assert [r["indices"] for r in records_of(right) if r["kind"] == "layer"] == [[0], [1], [2]]


@pytest.mark.parametrize("max_body", [1, 7, 60, 61, 500, 4096])
def test_no_body_exceeds_the_limit_and_no_byte_is_lost(max_body):
    sent = [sample_kv(i) for i in range(6)]
    frames = write_stream(sent, max_body=max_body)
    sizes = [sum(record.get("bytes", 0) for record in records_of(frame)) for frame in frames]
    bodies = [unpack_frame(frame)[1] for frame in frames]
    assert sizes == [len(body) for body in bodies]
    assert max(sizes) <= max_body
    whole = b"".join(unpack_frame(frame)[1] for frame in write_stream(sent))
    assert b"".join(bodies) == whole


def test_a_body_is_filled_before_the_next_one_starts():
    sent = [sample_kv(i) for i in range(40)]
    row_bytes = records_of(write_stream(sent[:1])[1])[0]["bytes"]
    layer_frames = [f for f in write_stream(sent, max_body=10 * row_bytes) if records_of(f)[0]["kind"] == "layer"]
    counts = [sum(len(r["indices"]) for r in records_of(f) if r["kind"] == "layer") for f in layer_frames]
    # The first layer shares its frames with the sample records.
    assert counts[-8:] == [10] * 8


def test_a_body_may_be_exactly_full():
    sent = [sample_kv(i) for i in range(2)]
    sample_bytes = records_of(write_stream(sent)[0])[0]["bytes"]
    row_bytes = records_of(write_stream(sent)[1])[0]["bytes"] // 2
    writer = FrameWriter(REQUEST, PLAN, keys_of(sent), max_body=sample_bytes)
    assert write_sample(writer, 0, sent[0]) == []
    assert [(r["kind"], "size" in r) for r in records_of(*writer.flush())] == [("sample", False)]
    writer = FrameWriter(REQUEST, PLAN, keys_of(sent), max_body=2 * sample_bytes)
    assert write_sample(writer, 0, sent[0]) + write_sample(writer, 1, sent[1]) == []
    writer = FrameWriter(REQUEST, PLAN, keys_of(sent), max_body=sample_bytes + row_bytes)
    assert write_sample(writer, 0, sent[0]) + write_layer(writer, [0], 0, sent) == []


def test_frames_are_numbered_and_carry_the_hash_of_their_body():
    for seq, frame in enumerate(write_stream([sample_kv(i) for i in range(3)], max_body=100)):
        header, body = unpack_frame(frame)
        assert (header["v"], header["request"], header["seq"]) == (1, REQUEST, seq)
        assert header["xxh3"] == xxhash.xxh3_64_intdigest(body)


def test_number_of_records_per_frame_is_limited():
    writer = FrameWriter(REQUEST, PLAN, ["key"] * 3 * MAX_RECORDS, 1 << 20)
    frames = [frame for i in range(3 * MAX_RECORDS) for frame in writer.sample_failed(i, "FAILED_PRECONDITION", "x")]
    assert [len(records_of(frame)) for frame in frames] == [MAX_RECORDS, MAX_RECORDS]


def test_flush_of_an_empty_buffer_returns_no_frame():
    writer = FrameWriter(REQUEST, PLAN, ["key"], 1 << 20)
    assert writer.flush() == []
    assert writer.sample_failed(0, "FAILED_PRECONDITION", "x") == []
    assert len(writer.flush()) == 1
    assert writer.flush() == []


def test_example_client_in_the_documentation_decodes_the_same_tensors():
    (example,) = re.findall(r"```python\n(.*?)```", PROTOCOL.read_text(encoding="utf-8"), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(compile(example, PROTOCOL, "exec"), scope)
    sent = [sample_kv(i) for i in range(5)]
    plan = PLAN.model_dump(mode="json", exclude={"map"})  # The plan has none.
    keys = [scope["sample_key"](INFO.weights_digest, plan, text_sample(i).text, None, []) for i in range(5)]
    frames = [pb.KVFrame.FromString(frame) for frame in write_stream(sent, max_body=300)]
    decoded = scope["decode"](frames, keys)
    with pytest.raises(ValueError, match="another request for sample 0"):
        scope["decode"](frames, keys[::-1])
    for part in ("header", "body"):
        damaged = pb.KVFrame.FromString(frames[0].SerializeToString())
        setattr(damaged, part, getattr(damaged, part)[:-1] + b"\x7f")
        with pytest.raises(ValueError, match="damaged"):
            scope["decode"]([damaged], keys)
    assert decoded.keys() == {
        (i, layer, name) for i in range(5) for layer in PLAN.layers for name in ("positions", *sent[0].parts)
    }
    for (index, layer, name), array in decoded.items():
        kv = sent[index]
        tensor = (kv.positions if name == "positions" else kv.parts[name])[PLAN.layers.index(layer)]
        if name.endswith("scale"):
            assert array.tolist() == tensor.view(torch.uint16).tolist()
        else:
            assert array.tolist() == tensor.tolist()


def test_timings_are_written_to_the_frame():
    writer = FrameWriter(REQUEST, PLAN.model_copy(update={"layers": (0,)}), ["key"], 1 << 20)
    write_sample(writer, 0, sample_kv(0))
    write_layer(writer, [0], 0, [sample_kv(0)])
    writer.sample_end(0, Timings(0.5, 1.5, 2.5, network=9.0))
    (frame,) = writer.end()
    assert records_of(frame)[-2]["timings"] == {"queue": 0.5, "prefill": 1.5, "encode": 2.5}
