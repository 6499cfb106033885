"""Tests of streams from a broken or hostile server with correct hashes: each is refused before memory is allocated."""

from __future__ import annotations

import re
import struct
import tracemalloc
from collections.abc import Callable

import pytest
import torch

from kvcore.errors import ProtocolError
from kvcore.plan import Selection
from kvcore.wire.frames import FrameWriter, unpack_frame
from tests.support.streams import (
    PLAN,
    REQUEST,
    SENT,
    Forged,
    forge,
    keys_of,
    read_stream,
    sample_kv,
    stream,
    write_layer,
    write_sample,
    write_stream,
)

Change = Callable[[list[Forged]], object]


def edit(kind: str, /, **fields: object) -> Change:
    """Returns a change that sets fields of the first record of a kind."""
    return lambda frames: next(
        record for frame in frames for record in frame.header["records"] if record["kind"] == kind
    ).update(fields)


def resize(kind: str, size: int) -> Change:
    """Returns a change that sets the size of the first record of a kind in its frame."""
    return edit(kind, bytes=size)


def write_position(value: int, slot: int) -> Change:
    """Returns a change that overwrites a position of the first sample's first layer and keeps its digest."""

    def change(frames: list[Forged]) -> None:
        start = sum(r["bytes"] for r in frames[0].header["records"] if r["kind"] == "sample")
        struct.pack_into("<i", frames[0].body, start + 4 * slot, value)

    return change


def drop(kind: str) -> Change:
    """Returns a change that removes the first record of a kind and its bytes."""

    def change(frames: list[Forged]) -> None:
        for frame in frames:
            at = 0
            for record in frame.header["records"]:
                if record["kind"] == kind:
                    frame.header["records"].remove(record)
                    del frame.body[at : at + record.get("bytes", 0)]
                    return
                at += record.get("bytes", 0)

    return change


def repeat(kind: str) -> Change:
    """Returns a change that repeats the first record of a kind."""

    def change(frames: list[Forged]) -> None:
        for frame in frames:
            at = 0
            for place, record in enumerate(frame.header["records"]):
                end = at + record.get("bytes", 0)
                if record["kind"] == kind:
                    frame.header["records"].insert(place, record)
                    frame.body[end:end] = frame.body[at:end]
                    return
                at = end

    return change


def swap_layers(frames: list[Forged]) -> None:
    frames[1], frames[2] = frames[2], frames[1]


PARTS = unpack_frame(stream()[1])[0]["records"][0]["parts"]


INVALID_STREAMS = [
    (lambda frames: frames[0].header.update(v=2), "protocol version 2"),
    (lambda frames: frames[0].header.pop("v"), "protocol version None"),
    (lambda frames: frames[0].header.update(request="another"), "request 'another'"),
    (lambda frames: frames[0].header.update(records={"kind": "end"}), "not a list of maps"),
    (lambda frames: frames[0].header.update(records=[1]), "not a list of maps"),
    (lambda frames: frames[0].body.extend(b"x"), "belong to no record"),
    (lambda frames: frames[0].body.pop(), "'bytes' must be"),
    (edit("sample", kind="prompt"), "unknown record kind 'prompt'"),
    (edit("sample", kind=[]), r"unknown record kind \[\]"),
    (edit("sample", index=3), "sample 3, the request has 3"),
    (edit("sample", index=-1), "sample -1, the request has 3"),
    (edit("sample", index="0"), "sample '0', the request has 3"),
    (edit("sample", index=None), "sample None"),
    (edit("sample", id="s1"), "sample id 's1', expected 's0'"),
    (edit("sample", key=SENT[1].key), "sample 's0': the teacher answered another request than the one sent"),
    (edit("sample", key=None), "sample key None"),
    (edit("sample", tokens=0), "'tokens' must be"),
    (edit("sample", tokens=65), "'tokens' must be a whole number between 1 and 64, got 65"),
    (edit("sample", tokens=8), "has 72 bytes, its shapes need 64"),
    (edit("sample", tokens=9.0), "'tokens' must be"),
    (repeat("sample"), "opened twice"),
    (drop("sample"), "sample that has not been opened"),
    (resize("sample", 71), "its shapes need 72"),
    (resize("sample", 10**12), "'bytes' must be a whole number"),
    (resize("sample", -1), "'bytes' must be a whole number"),
    (edit("sample", size=10**15), "its shapes need 72"),
    (edit("layer", indices=[]), "without sample indices"),
    (edit("layer", indices={}), "without sample indices"),
    (edit("layer", indices="01"), "without sample indices"),
    (edit("layer", indices=[0, 0]), "twice"),
    (edit("layer", indices=[0, 7]), "sample 7"),
    (edit("layer", indices=[0], errors={"k": [0.0], "v": [0.0]}), "its shapes need"),
    (edit("layer", indices=[0, 1, 2]), "one error for each of 3"),
    (edit("layer", layer=2), "layer 2 of sample 's0' is not the next layer of the plan"),
    (edit("layer", layer=1), "layer 1 of sample 's0' is not the next layer of the plan"),
    (edit("layer", layer=None), "layer None"),
    (swap_layers, "layer 4 of sample 's0' is not the next layer of the plan"),
    (repeat("layer"), "layer 0 of sample 's0' is not the next layer of the plan"),
    (drop("layer"), "layer 2 of sample 's0' is not the next layer of the plan"),
    (edit("layer", slots=4), "'slots' must be a whole number between 1 and 3, got 4"),
    (edit("layer", slots=0), "'slots' must be"),
    (edit("layer", slots=2), "the plan needs"),
    (edit("layer", codec="raw"), "the plan needs"),
    (edit("layer", parts=PARTS[:-1]), "the plan needs"),
    (edit("layer", parts=[*PARTS[:-1], ["v.scale", "float32", [2, 3, 2]]]), "the plan needs"),
    (edit("layer", parts=[*PARTS[:-1], ["v.scale", "bfloat16", [2, 2, 3]]]), "the plan needs"),
    (edit("layer", parts=[PARTS[0], *PARTS[:0:-1]]), "the plan needs"),
    (edit("layer", parts=None), "the plan needs"),
    (edit("layer", errors={"k": [0.0, 0.0]}), "has the errors"),
    (edit("layer", errors=None), "has the errors"),
    (edit("layer", errors={"k": [0.0, 0.0], "v": [0.0]}), "one error for each of 2"),
    (edit("layer", errors={"k": [0.0, 0.0], "v": [0.0, float("nan")]}), "finite numbers"),
    (edit("layer", errors={"k": [0.0, 0.0], "v": [0.0, -1.0]}), "finite numbers"),
    (edit("layer", errors={"k": [0.0, 0.0], "v": [0.0, "0"]}), "finite numbers"),
    (write_position(-1, 0), "outside the sample"),
    (write_position(9, 2), "outside the sample"),
    (write_position(2**31 - 1, 1), "not ascending"),
    (write_position(-(2**31), 2), "not ascending"),
    (write_position(int(SENT[0].positions[0, 0, 0]), 1), "not ascending"),
    (edit("sample_end", digest=0), "does not match its digest"),
    (edit("sample_end", digest=None), "does not match its digest"),
    (edit("sample_end", tokens=8), "tokens 8, but 9 arrived"),
    (edit("sample_end", slots=2), "slots 2, but 3 arrived"),
    (edit("sample_end", layers=2), "layers 2, but 3 arrived"),
    (edit("sample_end", status=""), "ended with the status ''"),
    (edit("sample_end", status=None), "ended with the status None"),
    (edit("sample_end", status=5), "ended with the status 5"),
    (edit("sample_end", status=[]), r"ended with the status \[\]"),
    (edit("sample_end", status="OK", message=""), "ended with the status 'OK'"),
    (edit("sample_end", status="not finite", message=""), "ended with the status 'not finite'"),
    (edit("sample_end", status="INTERNAL", message=5), "'INTERNAL' and the message 5"),
    (edit("sample_end", status="INTERNAL", message="", key=SENT[1].key), "'s0': the teacher answered another"),
    (edit("sample_end", timings=None), "has no timings"),
    (edit("sample_end", timings={"queue": 0.0}), "'prefill' must hold finite"),
    (
        edit("sample_end", timings={"queue": 0.0, "prefill": float("inf"), "encode": 0.0}),
        "'prefill' must hold finite",
    ),
    (repeat("sample_end"), "after its end"),
    (drop("sample_end"), "ended after 2 of 3 samples"),
    (repeat("end"), "after the stream's end"),
    (drop("end"), "ended early, after 3 of 3"),
    (edit("end", samples=2), "naming 2"),
    (
        lambda frames: frames.append(Forged(dict(frames[0].header, records=[]), bytearray())),
        "after the stream's end",
    ),
    (edit("layer", kind="more"), "'index' must be"),
]


@pytest.mark.parametrize(("change", "problem"), INVALID_STREAMS, ids=range(len(INVALID_STREAMS)))
def test_invalid_stream_is_refused(change, problem):
    with pytest.raises(ProtocolError, match=problem):
        read_stream(forge(stream(), change), 3)


def test_sample_that_ends_without_all_layers_is_refused():
    with pytest.raises(ProtocolError, match=r"sample 's0' ended without its layers \[2, 4\]"):
        read_stream(forge(stream(), lambda frames: frames.__delitem__(slice(1, 3))), 3)


def sample_body(change: Callable[[torch.Tensor], object]) -> Change:
    """Returns a change of the first sample's token ids and byte ends [2, T]."""

    def apply(frames: list[Forged]) -> None:
        values = torch.frombuffer(frames[0].body, dtype=torch.int32, count=18).view(2, 9)
        change(values)

    return apply


@pytest.mark.parametrize(("row", "token", "value"), [(0, 4, -1), (1, 4, -2), (1, 4, 0), (1, 4, 1), (1, 8, 10)])
def test_token_ids_or_byte_ends_out_of_range_are_refused(row, token, value):
    with pytest.raises(ProtocolError, match="token ids or byte ends out of range"):
        read_stream(forge(stream(), sample_body(lambda values: values[row, token].fill_(value))), 3)


def test_layer_after_the_plans_last_is_refused():
    frames = forge(stream(), lambda frames: frames.insert(3, frames[2]))
    with pytest.raises(ProtocolError, match="layer 4 of sample 's0' is not the next layer of the plan"):
        read_stream(frames, 3)


def test_samples_at_different_layers_cannot_share_a_record():
    writer = FrameWriter(REQUEST, PLAN, keys_of(SENT), 1 << 20)
    for index in range(2):
        write_sample(writer, index, SENT[index])
    write_layer(writer, [0], 0, SENT)
    write_layer(writer, [0, 1], 1, SENT)
    with pytest.raises(ProtocolError, match="is not the next layer of the plan"):
        read_stream(writer.flush(), 2)


def test_end_record_with_too_few_samples_is_refused():
    def change(frames: list[Forged]) -> None:
        drop("sample_end")(frames)
        edit("end", samples=2)(frames)

    with pytest.raises(ProtocolError, match="ended after 2 of 3 samples, naming 2"):
        read_stream(forge(stream(), change), 3)


def test_sample_scope_positions_must_be_the_same_in_all_layers():
    plan = PLAN.model_copy(update={"selection": Selection(selector="right", budget=3, scope="sample")})
    sent = [sample_kv(0, plan)]
    frames = write_stream(sent, plan)
    first = [int(p) for p in sent[0].positions[0, 0]]
    other = next([a, b, c] for a in range(9) for b in range(a + 1, 9) for c in range(b + 1, 9) if [a, b, c] != first)
    with pytest.raises(ProtocolError, match="differ between the layers"):
        read_stream(forge(frames, lambda frames: struct.pack_into("<3i", frames[1].body, 0, *other)), 1, plan)


def test_slot_count_that_changes_between_layers_is_refused():
    sent = [sample_kv(0), sample_kv(0, slots=2)]
    writer = FrameWriter(REQUEST, PLAN, keys_of(sent), 1 << 20)
    write_sample(writer, 0, sent[0])
    write_layer(writer, [0], 0, sent)
    write_layer(writer, [0], 1, sent[1:])
    with pytest.raises(ProtocolError, match="layer 2 has another number of slots"):
        read_stream(writer.flush(), 1)


def split_frames() -> list[bytes]:
    """One sample whose records are split into pieces of at most 40 bytes."""
    return write_stream([sample_kv(0)], max_body=40)


INVALID_PIECES = [
    (lambda frames: frames.pop(1), "inside another"),
    (lambda frames: frames.insert(1, frames[1]), "bytes, which no record expects|inside another"),
    (lambda frames: frames.insert(2, frames[0]), "opened twice"),
    (lambda frames: frames.insert(1, frames[0]), "inside another"),
    (lambda frames: frames.pop(0), "bytes, which no record expects"),
    (lambda frames: frames[0].header["records"][0].update(size=73), "its shapes need 72"),
    (lambda frames: frames[0].header["records"][0].update(size=2**62), "its shapes need 72"),
    (lambda frames: frames[0].header["records"][0].update(size=39), "'size' must be"),
    (lambda frames: frames[1].header["records"][0].update(index=9), "'index' must be"),
    (lambda frames: frames[1].header["records"][0].update(bytes=0), "no record expects"),
]


@pytest.mark.parametrize(("change", "problem"), INVALID_PIECES, ids=range(len(INVALID_PIECES)))
def test_invalid_pieces_of_a_record_are_refused(change, problem):
    with pytest.raises(ProtocolError, match=problem):
        read_stream(forge(split_frames(), change), 1)


def test_layer_record_of_several_samples_cannot_be_split():
    def change(frames: list[Forged]) -> None:
        record = frames[1].header["records"][0]
        record["size"] = record["bytes"]
        record["bytes"] -= 10
        frames[1].header["records"].insert(1, {"kind": "more", "index": 0, "bytes": 10})

    with pytest.raises(ProtocolError, match="may not be split"):
        read_stream(forge(stream(), change), 3)


def test_body_above_the_teachers_limit_is_refused():
    frames = forge(stream(), lambda frames: frames[0].body.extend(bytes(1 << 20)))
    with pytest.raises(ProtocolError, match=re.escape("the limit is 1048576")):
        read_stream(frames, 3)


HOSTILE = [
    edit("sample", tokens=2**31 - 1, size=8 * (2**31 - 1)),
    edit("sample", tokens=64, size=2**50),
    edit("layer", slots=2**40),
    edit("layer", size=2**60),
    edit("layer", parts=[["positions", "int32", [2**30, 2**30]]]),
    edit("layer", indices=list(range(100000))),
    edit("sample", bytes=2**63),
]


@pytest.mark.parametrize("change", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_sizes_allocate_nothing(change):
    frames = forge(stream(), change)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            read_stream(frames, 3)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def test_hostile_protobuf_length_allocates_nothing():
    frame = b"\x0a" + b"\xff" * 4 + b"\x0f" + b"x" * 10
    with pytest.raises(ProtocolError, match="truncated"):
        read_stream([frame], 3)
