"""Tests of StreamReader: bit-exact samples from any order of frames, and an error for every kind of damage."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.errors import ProtocolError
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.types import EncodedSampleKV, Sample, Timings
from kvcore.wire.frames import FrameWriter, unpack_frame
from kvcore.wire.stream_reader import RefusedSample, StreamReader
from tests.support.streams import (
    INFO,
    PLAN,
    REQUEST,
    SENT,
    UNMAPPED_CODECS,
    assert_same,
    keys_of,
    read_stream,
    sample_kv,
    stream,
    text_sample,
    write_layer,
    write_sample,
    write_shuffled,
    write_stream,
)

plans = st.builds(
    lambda layers, selector, scope, codec, group_size: KVPlan(
        layers=tuple(sorted(layers)),
        selection=Selection(selector=selector, budget=5 if selector == "right" else 0, scope=scope),
        codec=CodecSpec(name=codec, group_size=group_size),
    ),
    st.sets(st.integers(0, 4), min_size=1),
    st.sampled_from(["right", "full"]),
    st.sampled_from(["head", "layer", "sample"]),
    st.sampled_from(UNMAPPED_CODECS),
    st.integers(1, 5),
)
shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(5, 12)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(plans, shapes, st.integers(1, 700), st.sets(st.integers(0, 5)), st.randoms(use_true_random=False))
def test_samples_are_read_from_any_split_grouping_and_interleaving(plan, shapes, max_body, failing, rng):
    sent = [sample_kv(i, plan, slots, tokens) for i, (slots, tokens) in enumerate(shapes)]
    frames = write_shuffled(sent, plan, max_body, failing, rng)
    got = read_stream(frames, len(sent), plan, [tokens for _, tokens in shapes])
    assert got.keys() == set(range(len(sent)))
    for index, result in got.items():
        if index in failing:
            assert result == RefusedSample("FAILED_PRECONDITION", f"sample {index}")
        else:
            assert_same(result, sent[index])


def test_samples_are_returned_when_their_last_frame_arrives():
    sent = [sample_kv(i) for i in range(2)]
    writer = FrameWriter(REQUEST, PLAN, keys_of(sent), 1 << 20)
    reader = StreamReader(REQUEST, PLAN, [text_sample(0), text_sample(1)], INFO)
    for index in (1, 0):
        write_sample(writer, index, sent[index])
        for at in range(3):
            write_layer(writer, [index], at, sent)
        writer.sample_end(index, sent[index].timings)
        (frame,) = writer.flush()
        ((returned, kv),) = reader.feed(frame)
        assert returned == index
        assert_same(kv, sent[index])
    assert reader.feed(writer.end()[0]) == []
    reader.finish()


def test_response_to_token_ids_must_have_the_same_token_ids():
    kv = sample_kv(0)
    ids = tuple(kv.token_ids_T.tolist())
    right, wrong = Sample("s0", token_ids=ids), Sample("s0", token_ids=(*ids[:-1], 5000))
    assert feed_all(right, frames_for(right, kv))
    with pytest.raises(ProtocolError, match="other tokens"):
        feed_all(wrong, frames_for(wrong, kv))


def frames_for(asked: Sample, kv: EncodedSampleKV) -> list[bytes]:
    """The frames of a server that answers a request for `asked` with these K/V."""
    return write_stream([dataclasses.replace(kv, key=asked.key(INFO.weights_digest, PLAN))])


def feed_all(sample: Sample, frames: list[bytes]) -> list[object]:
    reader = StreamReader(REQUEST, PLAN, [sample], INFO)
    return [result for frame in frames for result in reader.feed(frame)]


def test_failed_samples_do_not_affect_the_others():
    sent = [sample_kv(i) for i in range(3)]
    writer = FrameWriter(REQUEST, PLAN, keys_of(sent), 1 << 20)
    frames = writer.sample_failed(0, "FAILED_PRECONDITION", "never opened")
    for index in (1, 2):
        frames += write_sample(writer, index, sent[index])
    frames += write_layer(writer, [1, 2], 0, sent)
    frames += writer.sample_failed(1, "INTERNAL", "0.2 passes 0.1")
    frames += write_layer(writer, [2], 1, sent) + write_layer(writer, [2], 2, sent)
    frames += writer.sample_end(2, sent[2].timings) + writer.end()
    got = read_stream(frames, 3)
    assert got[0] == RefusedSample("FAILED_PRECONDITION", "never opened")
    assert got[1] == RefusedSample("INTERNAL", "0.2 passes 0.1")
    assert_same(got[2], sent[2])


def test_undamaged_stream_is_read():
    for max_body in (50, 1 << 20):
        got = read_stream(stream(max_body), 3)
        for index, kv in enumerate(SENT):
            assert_same(got[index], kv)


def test_flipped_bit_is_detected_or_has_no_effect():
    frames = stream()
    for at, frame in enumerate(frames):
        for offset in range(len(frame)):
            damaged = bytearray(frame)
            damaged[offset] ^= 1 << offset % 8
            try:
                got = read_stream([*frames[:at], bytes(damaged), *frames[at + 1 :]], 3)
            except ProtocolError:
                continue
            for index, kv in enumerate(SENT):
                assert_same(got[index], kv)


def test_response_to_another_request_is_refused_for_completed_and_failed_samples():
    asked = text_sample(0)
    kv = sample_kv(0)
    misread = dataclasses.replace(kv, key=dataclasses.replace(asked, text="000000001").key("w", PLAN))
    writer = FrameWriter(REQUEST, PLAN, [misread.key], 1 << 20)
    failed = writer.sample_failed(0, "INVALID_ARGUMENT", "nothing to select") + writer.end()
    for frames in (write_stream([misread]), failed):
        with pytest.raises(ProtocolError, match="sample 's0': the teacher answered another request than the one sent"):
            feed_all(asked, frames)


@pytest.mark.parametrize("max_body", [50, 1 << 20])
def test_dropped_repeated_and_swapped_frames_are_detected(max_body):
    frames = stream(max_body)
    for at in range(len(frames)):
        dropped = frames[:at] + frames[at + 1 :]
        repeated = frames[: at + 1] + frames[at:]
        swapped = [*frames[:at], *frames[at + 1 : at + 2], frames[at], *frames[at + 2 :]]
        for damaged in (dropped, repeated, swapped):
            if damaged != frames:
                with pytest.raises(ProtocolError, match=r"expected frame|ended early|after the stream's end"):
                    read_stream(damaged, 3)


def test_truncated_stream_is_detected():
    frames = stream()
    for at, frame in enumerate(frames):
        with pytest.raises(ProtocolError, match="ended early, after"):
            read_stream(frames[:at], 3)
        for length in range(len(frame)):
            with pytest.raises(ProtocolError):
                read_stream([*frames[:at], frame[:length]], 3)


def test_samples_completed_before_the_damage_are_unchanged():
    writer = FrameWriter(REQUEST, PLAN, keys_of(SENT), 1 << 20)
    frames = []
    for index in range(2):
        frames += write_sample(writer, index, SENT[index])
        for at in range(3):
            frames += write_layer(writer, [index], at, SENT)
        frames += writer.sample_end(index, Timings()) + writer.flush()
    reader = StreamReader(REQUEST, PLAN, [text_sample(0), text_sample(1)], INFO)
    ((_, kv),) = reader.feed(frames[0])
    with pytest.raises(ProtocolError):
        reader.feed(frames[1][:-1])
    assert isinstance(kv, EncodedSampleKV)
    assert_same(kv, SENT[0], timings=False)


def test_unusual_but_valid_byte_ends_are_accepted():
    kv = sample_kv(0)
    kv.token_ids_T[0] = 0
    kv.byte_ends_T[4] = -1
    kv.byte_ends_T[3] = kv.byte_ends_T[2]
    # The text has nine bytes, so 9 is the largest valid end.
    kv.byte_ends_T[8] = 9
    assert_same(read_stream(write_stream([kv]), 1)[0], kv)


def test_body_of_exactly_the_teachers_limit_is_accepted():
    frames = stream()
    info = dataclasses.replace(INFO, max_frame_bytes=max(len(unpack_frame(frame)[1]) for frame in frames))
    reader = StreamReader(REQUEST, PLAN, [text_sample(i) for i in range(3)], info)
    assert sum(len(reader.feed(frame)) for frame in frames) == 3


def test_tensors_are_contiguous_and_have_the_codecs_dtypes():
    got = read_stream(stream(), 3)[1]
    assert isinstance(got, EncodedSampleKV)
    assert {name: part.dtype for name, part in got.parts.items()} == {
        "k.codes": torch.int8,
        "k.scale": torch.bfloat16,
        "v.codes": torch.int8,
        "v.scale": torch.bfloat16,
    }
    assert all(part.is_contiguous() for part in [*got.parts.values(), got.positions])
