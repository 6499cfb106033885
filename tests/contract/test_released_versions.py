"""Tests that clients and servers of each released version understand this one, and the other way round."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvcore.types import EncodedSampleKV
from kvcore.wire import messages
from kvcore.wire.frames import unpack_frame
from kvcore.wire.stream_reader import CompletionReader, RefusedSample, StreamReader
from protos import kv_cache_pb2 as pb
from teacher_server.requests.request_parsing import parse_request, read_generate_query, read_query
from tests.support import golden
from tests.support.streams import assert_same

VERSIONS = sorted(path for path in golden.RELEASED.iterdir() if path.is_dir())
BUF = Path(sys.executable).with_name("buf")

each_version = pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)


def breaking(tmp_path: Path, now: str, version: Path) -> str:
    """What `buf breaking` reports about a .proto file against a released one; empty if nothing breaks."""
    for name, text in (("now", now), ("released", (version / golden.PROTO).read_text(encoding="utf-8"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / golden.PROTO).write_text(text, encoding="utf-8")
    command = [BUF, "breaking", "now", "--against", "released"]
    return subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True).stdout


def proto() -> str:
    return (golden.ROOT / "protos" / golden.PROTO).read_text(encoding="utf-8")


@each_version
def test_the_protocol_has_no_breaking_change(version: Path, tmp_path: Path) -> None:
    assert breaking(tmp_path, proto(), version) == ""


@each_version
def test_buf_reports_a_field_with_another_number(version: Path, tmp_path: Path) -> None:
    reported = breaking(tmp_path, proto().replace("int32 kv_heads = 5;", "int32 kv_heads = 55;"), version)
    assert 'field "5" with name "kv_heads" on message "DescribeResponse" was deleted' in reported


@each_version
def test_requests_of_a_released_client_are_understood(version: Path) -> None:
    query = read_query(parse_request((version / "kv_request.bin").read_bytes(), pb.KVRequest, golden.INFO), golden.INFO)
    assert (query.request_id, query.plan, tuple(query.samples)) == (golden.REQUEST_ID, golden.PLAN, golden.SAMPLES)
    data = (version / "generate_request.bin").read_bytes()
    prompts = read_generate_query(parse_request(data, pb.GenerateRequest, golden.INFO), golden.INFO)
    assert (prompts.samples, prompts.sampling) == ([golden.PROMPT], golden.SAMPLING)


@each_version
def test_a_released_server_understands_requests(version: Path) -> None:
    assert golden.kv_request() == (version / "kv_request.bin").read_bytes()
    assert golden.generate_request() == (version / "generate_request.bin").read_bytes()


@each_version
def test_sample_keys_stay_equal(version: Path) -> None:
    # They name the samples in stores and in answers.
    assert golden.keys() == json.loads((version / "keys.json").read_text(encoding="utf-8"))


@each_version
def test_answers_of_a_released_server_are_read(version: Path) -> None:
    description = pb.DescribeResponse.FromString((version / "description.bin").read_bytes())
    assert messages.info_from_proto(description) == golden.INFO
    reader = StreamReader(golden.REQUEST_ID, golden.PLAN, golden.SAMPLES, golden.INFO)
    frames = golden.read_frames(version / "kv_frames.bin")
    outcomes = dict(outcome for frame in frames for outcome in reader.feed(frame))
    reader.finish()
    for index in (0, 1):
        got = outcomes[index]
        assert isinstance(got, EncodedSampleKV)
        assert_same(got, golden.sample_kv(index))
    assert isinstance(outcomes[2], RefusedSample)


@each_version
def test_generated_texts_of_a_released_server_are_read(version: Path) -> None:
    reader = CompletionReader(golden.REQUEST_ID, golden.PLAN, [golden.PROMPT], golden.INFO, golden.SAMPLING)
    for frame in golden.read_frames(version / "generate_frames.bin"):
        list(reader.feed(frame))
    reader.finish()
    assert reader.completions[0] == golden.COMPLETION


@each_version
def test_a_released_client_reads_answers(version: Path) -> None:
    for name, frames in (("kv_frames.bin", golden.kv_frames()), ("generate_frames.bin", golden.generate_frames())):
        released = golden.read_frames(version / name)
        assert len(frames) == len(released)
        for frame, old in zip(frames, released, strict=True):
            (header, body), (old_header, old_body) = unpack_frame(frame), unpack_frame(old)
            assert bytes(body) == bytes(old_body)
            assert header.keys() >= old_header.keys()
            assert without_new_keys(header["records"], old_header["records"]) == old_header["records"]


def without_new_keys(records: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records without the keys that old ones do not have: clients ignore unknown keys."""
    return [
        {key: value for key, value in record.items() if key in before}
        for record, before in zip(records, old, strict=True)
    ]
