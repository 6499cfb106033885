"""Parses and checks a request: from its bytes to samples that the queue can take.

All of it runs in the tokenizer's thread, because its time grows with the request.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, cast

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from kvcore.errors import FieldError
from kvcore.plan import KVPlan, SamplingParams
from kvcore.tensors.select import needs_importance
from kvcore.types import Sample, TeacherInfo
from kvcore.wire.messages import plan_from_proto, sample_from_proto, sampling_from_proto
from protos import kv_cache_pb2 as pb
from teacher_server.engines.base import TeacherEngine, TokenizedSample
from teacher_server.plan_execution import check_plan, check_sample
from teacher_server.requests.request_size import check_size, size_limits

RequestT = TypeVar("RequestT", pb.KVRequest, pb.GenerateRequest)
MessageT = TypeVar("MessageT", pb.KVRequest, pb.GenerateRequest, pb.Sample)
SampleCheck = Callable[[TokenizedSample], None]

# Other callers wait at most for the tokenizing of this much text, or of one longer sample.
PART_BYTES = 1 << 16
_BYTES_PER_ID = 4


@dataclass(frozen=True, slots=True)
class KVQuery:
    """A request that passed the checks that need no tokenizer. `sampling`: of a request to generate."""

    request_id: str
    plan: KVPlan
    samples: list[Sample]
    sampling: SamplingParams | None = None

    def sample_keys(self, info: TeacherInfo) -> list[str]:
        """The sample key of each sample as the server understood it."""
        return [sample.key(info.weights_digest, self.plan, self.sampling) for sample in self.samples]


@dataclass(frozen=True, slots=True)
class ParsedRequest(Generic[RequestT]):
    """A request whose sizes were checked. `head` has no samples: they are parsed one by one from `samples`."""

    head: RequestT
    samples: list[memoryview]


def parse_request(data: bytes, kind: type[RequestT], info: TeacherInfo) -> ParsedRequest[RequestT]:
    """Check a request's sizes, then parse its protobuf message.

    Raises:
        FieldError: a field is too large, or the bytes are not such a message.
    """
    ranges = check_size(data, cast("Descriptor", kind.DESCRIPTOR), size_limits(info))
    view = memoryview(data)
    ends = [0, *(part.end for part in ranges)]
    starts = [*(part.tag for part in ranges), len(data)]
    rest = b"".join(view[end:start] for end, start in zip(ends, starts, strict=True))
    return ParsedRequest(
        _parsed(rest, kind, "request"), [view[sample_range.start : sample_range.end] for sample_range in ranges]
    )


def _parsed(data: bytes, kind: type[MessageT], field: str) -> MessageT:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise FieldError(field, f"is not a valid {kind.DESCRIPTOR.name}: {error}") from error


def read_query(request: ParsedRequest[Any], info: TeacherInfo) -> KVQuery:
    """Check a request as a whole: its plan, and its samples' ids and fields.

    Raises:
        FieldError: names the request's field.
    """
    plan = plan_from_proto(request.head.plan)
    check_plan(plan, info)
    if not request.samples:
        raise FieldError("samples", f"is empty; a request holds 1 to {info.max_samples_per_request}")
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    for index, data in enumerate(request.samples):
        field = f"samples.{index}"
        # Parsing holds the interpreter lock: other threads can run between two samples.
        sample = sample_from_proto(_parsed(bytes(data), pb.Sample, field), field)
        if seen.setdefault(sample.id, index) != index:
            raise FieldError(f"{field}.id", f"'{sample.id}' is already the id of samples.{seen[sample.id]}")
        samples.append(sample)
    return KVQuery(request.head.request_id or uuid.uuid4().hex, plan, samples)


def read_generate_query(request: ParsedRequest[pb.GenerateRequest], info: TeacherInfo) -> KVQuery:
    """Check a request to generate, as `read_query`, and its sampling.

    Raises:
        FieldError: names the request's field.
    """
    query, sampling = read_query(request, info), sampling_from_proto(request.head.sampling)
    if sampling.max_new_tokens >= info.max_sample_tokens:
        raise FieldError(
            "sampling.max_new_tokens",
            f"got {sampling.max_new_tokens}; a sample of this teacher, prompt included, has at most "
            f"{info.max_sample_tokens} tokens (max_sample_tokens)",
        )
    selection = query.plan.selection
    if (selection.span == "answer" or needs_importance(selection)) and not sampling.answer_marker:
        raise FieldError(
            "sampling.answer_marker",
            "is empty, but the plan selects tokens by the answer; set the text after which the answer begins",
        )
    for index, sample in enumerate(query.samples):
        if sample.token_ids is not None:
            raise FieldError(f"samples.{index}.token_ids", "a prompt to generate from must be text")
        if sample.chat is not None:
            raise FieldError(f"samples.{index}.chat", "Generate reads prompts as they are, without a chat template")
        for at, span in enumerate(sample.spans):
            if span.kind != "prompt":
                raise FieldError(f"samples.{index}.spans.{at}.kind", f"must be prompt (got {span.kind})")
    return KVQuery(query.request_id, query.plan, query.samples, sampling)


def parts_of(samples: Sequence[Sample]) -> Iterator[tuple[int, list[Sample]]]:
    """The samples in parts of about `PART_BYTES`, at least one sample each, with the size of each part."""
    part: list[Sample] = []
    size = 0
    for sample in samples:
        part.append(sample)
        size += len(sample.text or "") + _BYTES_PER_ID * len(sample.token_ids or ())
        if size >= PART_BYTES:
            yield size, part
            part, size = [], 0
    if part:
        yield size, part


def sample_check(query: KVQuery, limit: int) -> SampleCheck:
    """What to check of a query's tokenized samples: that the plan can be executed on them.

    For prompts to generate from: that `max_new_tokens` more have room within the teacher's `limit`.
    """
    if query.sampling is None:
        return partial(check_sample, plan=query.plan)
    new = query.sampling.max_new_tokens

    def check_room(tokens: TokenizedSample) -> None:
        count = len(tokens.token_ids)
        if count + new > limit:
            raise FieldError(
                f"samples[{tokens.sample.id}].text",
                f"has {count} tokens, and up to {new} are generated (sampling.max_new_tokens); together this teacher "
                f"takes at most {limit} (max_sample_tokens)",
            )

    return check_room


def tokenize(
    engine: TeacherEngine, samples: Sequence[Sample], check: SampleCheck
) -> list[TokenizedSample | FieldError]:
    """Tokenize samples; returns the error of a sample that is not valid or does not pass `check`."""
    outcomes: list[TokenizedSample | FieldError] = []
    for sample in samples:
        try:
            tokens = engine.tokenize(sample)
            check(tokens)
            outcomes.append(tokens)
        except FieldError as error:
            outcomes.append(error)
    return outcomes
