"""Tests of the size limits on serialized requests: valid requests pass, oversized ones are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.errors import FieldError
from kvcore.plan import KVPlan, Selection
from kvcore.types import Chat, Sample, Span, Turn
from protos import kv_cache_pb2 as pb
from teacher_server.requests.request_parsing import parse_request, read_generate_query, read_query
from teacher_server.requests.request_size import MAX_SPANS, MAX_TURNS, MAX_UNKNOWN_FIELDS
from tests.support.servers import kv_request
from tests.support.streams import INFO

PLAN = KVPlan(layers=(0, 1), selection=Selection(span="all"))
TEXT = Sample("text", text="añb", spans=(Span("prompt", 0, 1), Span("reasoning", 1, 2), Span("answer", 2, 3)))


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    size, length = len(content), b""
    while size > 0x7F:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


@given(
    st.lists(
        st.one_of(
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
            st.lists(st.integers(0, 2**31 - 1), min_size=1).map(tuple),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_valid_request_round_trips(contents: list[str | tuple[int, ...]]) -> None:
    samples = [
        Sample(f"é{i}", text=content) if isinstance(content, str) else Sample(f"é{i}", token_ids=content)
        for i, content in enumerate(contents)
    ]
    data = kv_request(PLAN, [*samples, TEXT], "request").SerializeToString()
    query = read_query(parse_request(data, pb.KVRequest, INFO), INFO)
    assert (query.request_id, query.plan, query.samples) == ("request", PLAN, [*samples, TEXT])


def test_unpacked_numbers_are_accepted() -> None:
    ids = b"\x08\x05\x08\x87\x01"
    data = kv_request(PLAN, [TEXT]).SerializeToString() + field(3, field(1, b"a") + field(3, ids))
    query = read_query(parse_request(data, pb.KVRequest, INFO), INFO)
    assert query.samples[1].token_ids == (5, 135)


VALID = kv_request(PLAN, [TEXT]).SerializeToString()
OVERSIZED_FIELDS: dict[str, tuple[bytes, str]] = {
    "spans": (field(3, b"\x22\x00" * (MAX_SPANS + 1)), "samples.1.spans: has more than 3 entries; the limit is 3"),
    "turns": (
        field(3, field(5, field(1, b"") * (MAX_TURNS + 1))),
        "samples.1.chat.turns: has more than 64 entries; the limit is 64",
    ),
    "role": (
        field(3, field(5, field(1, field(1, b"x" * 17)))),
        "samples.1.chat.turns.0.role: has 17 characters; the limit is 16",
    ),
    "samples": (
        b"\x1a\x00" * INFO.max_samples_per_request,
        f"samples: has more than {INFO.max_samples_per_request} entries; the limit is {INFO.max_samples_per_request}",
    ),
    "a second plan": (field(2, b""), "plan: has more than 1 entries; the limit is 1"),
    "id": (field(3, field(1, b"x" * 257)), "samples.1.id: has 257 characters; the limit is 256"),
    "long id": (field(3, field(1, b"x" * 5000)), "samples.1.id: has 5000 bytes; the limit is 256 characters"),
    "token ids": (
        field(3, field(3, field(1, b"\x01" * ((1 << 20) + 1)))),
        "samples.1.token_ids.ids: has 1048577 entries; the limit is 1048576",
    ),
    "unknown fields": (b"\xf8\x01\x01" * (MAX_UNKNOWN_FIELDS + 1), "KVRequest has more than 64 unknown fields"),
    "a group": (b"\xfb\x01", "wire type 3"),
    "cut short": (b"\x1a\x05a", "past the end"),
    "an endless number": (b"\xff" * 11, "does not end"),
}
OVERSIZED_REQUESTS: dict[str, tuple[bytes, str]] = {
    "layers": (
        field(2, field(1, b"\x01" * (INFO.layers + 1))),
        f"plan.layers: has {INFO.layers + 1} entries; the limit is {INFO.layers}",
    ),
    "layers one by one": (field(2, b"\x08\x01" * (INFO.layers + 1)), f"plan.layers: has more than {INFO.layers}"),
    "very many layers": (field(2, field(1, b"\x01" * 10_000)), "plan.layers: has at least 1000 entries"),
    "selector": (
        field(2, field(2, field(1, b"x" * 65))),
        "plan.selection.selector: has 65 characters; the limit is 64",
    ),
    "codec": (field(2, field(3, field(1, b"x" * 65))), "plan.codec.name: has 65 characters; the limit is 64"),
    "request id": (field(1, "é".encode() * 257), "request_id: has 257 characters; the limit is 256"),
    "fields": (
        field(3, field(3, b"\x08\x01" * (1 << 17))),
        "it has more than",
    ),
}


@pytest.mark.parametrize("case", [*OVERSIZED_FIELDS, *OVERSIZED_REQUESTS])
def test_oversized_request_is_refused_with_field_and_limit(case: str) -> None:
    data, problem = (
        (VALID + OVERSIZED_FIELDS[case][0], OVERSIZED_FIELDS[case][1])
        if case in OVERSIZED_FIELDS
        else OVERSIZED_REQUESTS[case]
    )
    with pytest.raises(FieldError) as caught:
        parse_request(data, pb.KVRequest, INFO)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("sampling", "problem"),
    [
        (b"\x2a\x01x" * 17, "sampling.stop: has more than 16 entries; the limit is 16"),
        (field(5, b"x" * 257), "sampling.stop.0: has 257 characters; the limit is 256"),
        (field(6, b"x" * 257), "sampling.answer_marker: has 257 characters; the limit is 256"),
    ],
)
def test_oversized_sampling_is_refused_with_field_and_limit(sampling: bytes, problem: str) -> None:
    with pytest.raises(FieldError, match=problem):
        parse_request(VALID + field(4, sampling), pb.GenerateRequest, INFO)


def test_text_that_is_not_utf8_is_refused_with_its_field() -> None:
    text = field(3, field(1, b"a") + field(2, b"\xff"))
    with pytest.raises(FieldError, match=r"^samples\.1\.text: is not valid UTF-8 at byte 0"):
        read_query(parse_request(VALID + text, pb.KVRequest, INFO), INFO)


def test_generate_request_with_a_chat_is_refused() -> None:
    prompt = kv_request(PLAN, [Sample("p", text="ab", chat=Chat((Turn("user", 0, 2),)))], "r").SerializeToString()
    data = prompt + pb.GenerateRequest(sampling=pb.Sampling(max_new_tokens=2)).SerializeToString()
    with pytest.raises(FieldError, match=r"samples\.0\.chat: Generate reads prompts as they are"):
        read_generate_query(parse_request(data, pb.GenerateRequest, INFO), INFO)


def test_generate_request_is_read_with_its_sampling() -> None:
    prompt = kv_request(PLAN, [Sample("p", text="ab")], "r").SerializeToString()
    data = prompt + pb.GenerateRequest(sampling=pb.Sampling(max_new_tokens=2, stop=["x"])).SerializeToString()
    query = read_generate_query(parse_request(data, pb.GenerateRequest, INFO), INFO)
    assert query.sampling is not None
    assert (query.samples, query.sampling.max_new_tokens, query.sampling.stop) == ([Sample("p", text="ab")], 2, ("x",))
