"""The gRPC service: reads a request, has its samples run, and sends the answer as it comes."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import grpc.aio

from kvcore.errors import FieldError
from kvcore.frames import FrameWriter
from kvcore.plan import KVPlan, Sampling
from kvcore.types import Sample
from kvcore.wire import (
    TEACHER_METADATA,
    info_to_proto,
    plan_from_proto,
    sample_from_proto,
    sampling_from_proto,
    teacher_metadata,
)
from protos import kv_cache_pb2 as pb
from teacher_server.activity import Call, current_call
from teacher_server.engines.base import PlannedSample, TeacherEngine, TokenizedSample
from teacher_server.generation import Generation, check_sampling, read_prompts
from teacher_server.plan_execution import check_plan, check_sample, encoded_bytes
from teacher_server.sample_queue import Job, Lane
from teacher_server.state import Backend, ServerState
from teacher_server.streams import AnswerStream

SERVICE = pb.DESCRIPTOR.services_by_name["TeacherKV"].full_name
MAX_ID_LENGTH = 256

Write = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class KVQuery:
    """A request after the checks that need no tokenizer."""

    request_id: str
    plan: KVPlan
    samples: list[Sample]


class TeacherKVService:
    """Describe, StreamKV and Generate over one server's state."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        # One thread: tokenizers release the GIL for long texts, but not all of them stand two callers at once.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def close(self) -> None:
        """Ends the tokenizer's thread."""
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    def handler(self) -> grpc.GenericRpcHandler:
        """How gRPC calls the service. Frames pass through as the bytes that they already are."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Describe": grpc.unary_unary_rpc_method_handler(
                    self.describe,
                    request_deserializer=pb.DescribeRequest.FromString,
                    response_serializer=pb.DescribeResponse.SerializeToString,
                ),
                "StreamKV": grpc.unary_stream_rpc_method_handler(
                    self.stream_kv, request_deserializer=pb.KVRequest.FromString, response_serializer=None
                ),
                "Generate": grpc.unary_stream_rpc_method_handler(
                    self.generate, request_deserializer=pb.GenerateRequest.FromString, response_serializer=None
                ),
            },
        )

    async def describe(self, _request: pb.DescribeRequest, _context: grpc.aio.ServicerContext) -> pb.DescribeResponse:
        """Which teacher this is.

        Raises:
            NotReadyError: it is not loaded.
        """
        return info_to_proto(self._state.loaded().engine.info)

    async def stream_kv(self, request: pb.KVRequest, context: grpc.aio.ServicerContext) -> None:
        """Answers one request; errors are mapped by `interceptors.status_of`."""
        current_call().request_id = request.request_id[:MAX_ID_LENGTH]
        with self._state.open_stream():
            query = read_query(request, self._state)
            async with asyncio.timeout(self._state.config.max_request_seconds):
                await self.answer(query, self._writer(context))

    async def generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        """Answers one request to write; errors are mapped by `interceptors.status_of`."""
        current_call().request_id = request.request_id[:MAX_ID_LENGTH]
        with self._state.open_stream():
            query = read_query(request, self._state)
            sampling = sampling_from_proto(request.sampling)
            check_sampling(sampling, query.plan, query.samples, self._state.loaded().engine.info)
            async with asyncio.timeout(self._state.config.max_request_seconds):
                await self._write_on(query, sampling, self._writer(context))

    def _writer(self, context: grpc.aio.ServicerContext) -> Write:
        metadata = ((TEACHER_METADATA, teacher_metadata(self._state.loaded().engine.info)),)
        call = current_call()

        async def write(frame: bytes) -> None:
            # Not before the first frame: gRPC retries a refused call by itself only if nothing had been answered.
            if not call.frames:
                await context.send_initial_metadata(metadata)
            await context.write(frame)

        return write

    async def answer(self, query: KVQuery, write: Write) -> None:
        """Runs a query and writes its frames.

        Raises:
            BusyError: its samples do not fit into the queue at the moment.
        """
        backend, call, stream = self._open(query)
        loop = asyncio.get_running_loop()
        read = await loop.run_in_executor(self._tokenizing, tokenize, backend.engine, query)
        lane = Lane(stream)
        jobs = _jobs(lane, query.plan, read, backend)
        call.tokens = sum(job.tokens for job in jobs)
        try:
            if jobs:
                backend.scheduler.queue.admit(lane, jobs)
            _refuse_unreadable(read, stream)
            await _send(stream, lane, backend, call, write)
        finally:
            backend.scheduler.queue.remove(lane)

    async def _write_on(self, query: KVQuery, sampling: Sampling, write: Write) -> None:
        """Has the teacher write on from a query's prompts, runs what comes of them, and writes all that as frames.

        Raises:
            BusyError: its samples do not fit into the queue at the moment.
        """
        backend, call, stream = self._open(query, sampling)
        loop = asyncio.get_running_loop()
        read = await loop.run_in_executor(self._tokenizing, read_prompts, backend.engine, query.samples, sampling)

        def count_tokens(written: int, in_samples: int) -> None:
            call.written_tokens += written
            call.tokens += in_samples

        generation = Generation(query.plan, sampling, backend, stream, self._tokenizing, count_tokens)
        try:
            generation.admit(read)
            _refuse_unreadable(read, stream)
            await _send(stream, generation.samples, backend, call, write)
        finally:
            generation.close()

    def _open(self, query: KVQuery, sampling: Sampling | None = None) -> tuple[Backend, Call, AnswerStream]:
        """Who answers a query, under which name it is logged, and where its frames go."""
        backend, call = self._state.loaded(), current_call()
        call.request_id, call.codec, call.samples = query.request_id, query.plan.codec.name, len(query.samples)
        weights = backend.engine.info.weights_digest
        keys = [sample.content_key(weights, query.plan, sampling) for sample in query.samples]
        writer = FrameWriter(query.request_id, query.plan, keys, self._state.config.max_frame_bytes)
        return backend, call, AnswerStream(writer, len(query.samples), self._counter(call))

    def _counter(self, call: Call) -> Callable[[str], None]:
        metric = self._state.metrics.samples

        def count(status: str) -> None:
            metric.labels(status).inc()
            call.failed_samples += status != "ok"

        return count


def _refuse_unreadable(read: Sequence[TokenizedSample | FieldError], stream: AnswerStream) -> None:
    for index, tokens in enumerate(read):
        if isinstance(tokens, FieldError):
            stream.refuse(index, grpc.StatusCode.INVALID_ARGUMENT.name, str(tokens))
    stream.settle()


async def _send(stream: AnswerStream, lane: Lane, backend: Backend, call: Call, write: Write) -> None:
    while (outgoing := await stream.next()) is not None:
        if outgoing.frame:
            await write(outgoing.frame)
            if call.first_frame_s is None:
                call.first_frame_s = time.perf_counter() - call.started
            call.frames += 1
            call.sent_bytes += len(outgoing.frame)
        if outgoing.releases:
            backend.scheduler.queue.release(lane, outgoing.releases)


def read_query(request: pb.KVRequest | pb.GenerateRequest, state: ServerState) -> KVQuery:
    """Checks what can be checked of a request as a whole.

    Raises:
        FieldError: naming the request's field.
    """
    info = state.loaded().engine.info
    if len(request.request_id) > MAX_ID_LENGTH:
        raise FieldError("request_id", f"has {len(request.request_id)} characters; the limit is {MAX_ID_LENGTH}")
    plan = plan_from_proto(request.plan)
    check_plan(plan, info)
    if not 1 <= len(request.samples) <= info.max_samples_per_request:
        raise FieldError("samples", f"got {len(request.samples)}; a request holds 1 to {info.max_samples_per_request}")
    samples = [sample_from_proto(sample, f"samples.{index}") for index, sample in enumerate(request.samples)]
    seen: dict[str, int] = {}
    for index, sample in enumerate(samples):
        if len(sample.id) > MAX_ID_LENGTH:
            raise FieldError(f"samples.{index}.id", f"has {len(sample.id)} characters; the limit is {MAX_ID_LENGTH}")
        if seen.setdefault(sample.id, index) != index:
            raise FieldError(f"samples.{index}.id", f"'{sample.id}' is the id of samples.{seen[sample.id]} too")
    return KVQuery(request.request_id or uuid.uuid4().hex, plan, samples)


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


def _jobs(lane: Lane, plan: KVPlan, read: Sequence[TokenizedSample | FieldError], backend: Backend) -> list[Job]:
    info = backend.engine.info
    return [
        Job(lane, index, PlannedSample(tokens, plan), encoded_bytes(plan, tokens, info))
        for index, tokens in enumerate(read)
        if not isinstance(tokens, FieldError)
    ]
