"""From a request's bytes to samples that can be queued. Called in the tokenizer's thread: all of it takes time."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from kvcore.errors import FieldError
from kvcore.plan import KVPlan, SamplingParams
from kvcore.types import Sample, TeacherInfo
from kvcore.wire.messages import plan_from_proto, sample_from_proto, sampling_from_proto
from protos import kv_cache_pb2 as pb
from teacher_server.engines.base import PlannedSample, TeacherEngine, TokenizedSample
from teacher_server.generation import check_sampling
from teacher_server.plan_execution import check_plan, check_sample, encoded_bytes
from teacher_server.request_size import check_size, size_limits
from teacher_server.sample_queue import ClientStream, Job

RequestT = TypeVar("RequestT", pb.KVRequest, pb.GenerateRequest)
MessageT = TypeVar("MessageT", pb.KVRequest, pb.GenerateRequest, pb.Sample)


@dataclass(frozen=True, slots=True)
class KVQuery:
    """A request after the checks that need no tokenizer."""

    request_id: str
    plan: KVPlan
    samples: list[Sample]


@dataclass(frozen=True, slots=True)
class ParsedRequest(Generic[RequestT]):
    """A request whose sizes were checked. `head`: all but the samples, which are parsed one by one."""

    head: RequestT
    samples: list[memoryview]


def parse_request(data: bytes, kind: type[RequestT], info: TeacherInfo) -> ParsedRequest[RequestT]:
    """The protobuf message of a request, whose sizes are checked before it is built.

    Raises:
        FieldError: naming the field that is too large, or the bytes are no such message.
    """
    places = check_size(data, cast("Descriptor", kind.DESCRIPTOR), size_limits(info))
    view = memoryview(data)
    ends = [0, *(place.end for place in places)]
    starts = [*(place.tag for place in places), len(data)]
    rest = b"".join(view[end:start] for end, start in zip(ends, starts, strict=True))
    return ParsedRequest(_parsed(rest, kind, "request"), [view[place.start : place.end] for place in places])


def _parsed(data: bytes, kind: type[MessageT], field: str) -> MessageT:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise FieldError(field, f"is not a valid {kind.DESCRIPTOR.name}: {error}") from error


def read_query(request: ParsedRequest[Any], info: TeacherInfo) -> KVQuery:
    """Checks what can be checked of a request as a whole.

    Raises:
        FieldError: naming the request's field.
    """
    plan = plan_from_proto(request.head.plan)
    check_plan(plan, info)
    if not request.samples:
        raise FieldError("samples", f"is empty; a request holds 1 to {info.max_samples_per_request}")
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    for index, data in enumerate(request.samples):
        field = f"samples.{index}"
        # Parsing holds the interpreter: other threads have their turn between two samples.
        sample = sample_from_proto(_parsed(bytes(data), pb.Sample, field), field)
        if seen.setdefault(sample.id, index) != index:
            raise FieldError(f"{field}.id", f"'{sample.id}' is the id of samples.{seen[sample.id]} too")
        samples.append(sample)
    return KVQuery(request.head.request_id or uuid.uuid4().hex, plan, samples)


def read_generate_query(
    request: ParsedRequest[pb.GenerateRequest], info: TeacherInfo
) -> tuple[KVQuery, SamplingParams]:
    """Checks what can be checked of a request to write.

    Raises:
        FieldError: naming the request's field.
    """
    query, sampling = read_query(request, info), sampling_from_proto(request.head.sampling)
    check_sampling(sampling, query.plan, query.samples, info)
    return query, sampling


def tokenize(engine: TeacherEngine, query: KVQuery) -> list[TokenizedSample | FieldError]:
    """Reads every sample as the teacher does; one that cannot be read or served is no reason to refuse the others."""
    read: list[TokenizedSample | FieldError] = []
    for sample in query.samples:
        try:
            tokens = engine.tokenize(sample)
            check_sample(tokens, query.plan, f"samples[{sample.id}]")
            read.append(tokens)
        except FieldError as error:
            read.append(error)
    return read


def read_jobs(
    lane: ClientStream, query: KVQuery, engine: TeacherEngine
) -> tuple[list[TokenizedSample | FieldError], list[Job]]:
    """Reads every sample, and what the queue has to know of those that can be served."""
    read = tokenize(engine, query)
    jobs = [
        Job(lane, index, PlannedSample(tokens, query.plan), encoded_bytes(query.plan, tokens, engine.info))
        for index, tokens in enumerate(read)
        if not isinstance(tokens, FieldError)
    ]
    return read, jobs
