"""The gRPC service TeacherKV: reads a request, queues its samples, and sends the answer. Steps: see the package."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import TypeVar

import grpc
import grpc.aio

from kvcore.errors import FieldError
from kvcore.tensors.kv_map import KVMap
from kvcore.types import TeacherInfo
from kvcore.wire.frames import FrameWriter
from kvcore.wire.messages import TEACHER_METADATA, info_to_proto, teacher_metadata
from kvcore.wire.shared_memory import MEMORY_METADATA, USED
from protos import kv_cache_pb2 as pb
from teacher_server.engines.base import PlannedSample, TeacherEngine, TokenizedSample
from teacher_server.fair_share import Caller, caller_of
from teacher_server.monitoring.activity import Call, current_call
from teacher_server.monitoring.logs import log_event
from teacher_server.plan_execution import encoded_bytes
from teacher_server.requests.answer_stream import AnswerStream
from teacher_server.requests.chaos import Chaos
from teacher_server.requests.connection_limits import read_message, read_request
from teacher_server.requests.generation import Generation
from teacher_server.requests.map_store import receive_map
from teacher_server.requests.request_parsing import (
    KVQuery,
    ParsedRequest,
    RequestT,
    parse_request,
    parts_of,
    read_generate_query,
    read_query,
    sample_check,
    tokenize,
)
from teacher_server.requests.shared_frames import Send, through_memory
from teacher_server.requests.work_thread import WorkThread
from teacher_server.sample_queue import ClientStream, Job, Reservation
from teacher_server.state import Backend, ServerState

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["TeacherKV"].full_name

ResultT = TypeVar("ResultT")


class TeacherKVService:
    """The methods of one server."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._work = WorkThread()
        self._chaos = None if state.config.chaos is None else Chaos(state.config.chaos)
        # Of the requests so far, the self-test first. An average that follows the latest ones.
        self._bytes_per_token = 0.0
        self._warnings: set[str] = set()

    def close(self) -> None:
        """End the tokenizer's thread, and free the memory that clients share."""
        self._work.close()
        self._state.shared.close()

    def handler(self) -> grpc.GenericRpcHandler:
        """The service's handler for gRPC. Frames are bytes already and need no serializer.

        Every method is registered with a request stream, so that gRPC reads the request only when the method asks for
        it: a call that is refused for its metadata or the server's load leaves its request unread. `CallInterceptor`
        calls the methods with the context alone.
        """
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Describe": grpc.stream_unary_rpc_method_handler(
                    self.describe, response_serializer=pb.DescribeResponse.SerializeToString
                ),
                "StreamKV": grpc.stream_stream_rpc_method_handler(self.stream_kv),
                "Generate": grpc.stream_stream_rpc_method_handler(self.generate),
                "LoadMap": grpc.stream_unary_rpc_method_handler(
                    self.load_map, response_serializer=pb.LoadMapResponse.SerializeToString
                ),
                "OpenMemory": grpc.stream_unary_rpc_method_handler(
                    self.open_memory, response_serializer=pb.OpenMemoryResponse.SerializeToString
                ),
            },
        )

    async def describe(self, _context: grpc.aio.ServicerContext) -> pb.DescribeResponse:
        """The teacher's identity, geometry and limits.

        Raises:
            NotReadyError: the teacher is not loaded.
        """
        return info_to_proto(self._info)

    async def stream_kv(self, context: grpc.aio.ServicerContext) -> None:
        """Answer a request for K/V. `call_interceptor.status_of` maps its errors."""
        with self._state.open_stream(_caller()):
            async with asyncio.timeout(self._state.config.max_request_seconds):
                data = await read_request(context)
                with self._reserve(len(data)) as reserved:
                    request = await self._parse(data, pb.KVRequest)
                    query = await self._in_thread(len(data), read_query, request, self._info)
                    async with self._sending(context) as send:
                        await self.answer(query, reserved, send)

    async def generate(self, context: grpc.aio.ServicerContext) -> None:
        """Answer a request to generate. `call_interceptor.status_of` maps its errors."""
        with self._state.open_stream(_caller()):
            async with asyncio.timeout(self._state.config.max_request_seconds):
                data = await read_request(context)
                with self._reserve(len(data)) as reserved:
                    request = await self._parse(data, pb.GenerateRequest)
                    query = await self._in_thread(len(data), read_generate_query, request, self._info)
                    async with self._sending(context) as send:
                        await self._answer_generate(query, reserved, send)

    async def load_map(self, context: grpc.aio.ServicerContext) -> pb.LoadMapResponse:
        """Receive a map that plans can name. `call_interceptor.status_of` maps its errors."""
        with self._state.open_stream(_caller()):
            async with asyncio.timeout(self._state.config.max_request_seconds):
                await receive_map(partial(read_message, context), self._state.maps, self._info)
        return pb.LoadMapResponse()

    async def open_memory(self, _context: grpc.aio.ServicerContext) -> pb.OpenMemoryResponse:
        """Memory for the bodies of frames to a client on this machine."""
        return await self._state.shared.offer(current_call().peer)

    @property
    def _info(self) -> TeacherInfo:
        return self._state.loaded().engine.info

    def _reserve(self, nbytes: int) -> Reservation:
        """Reserve room for a request by its size, before it is parsed and tokenized.

        Raises:
            BusyError: the queue has no room for it.
        """
        tokens = round(nbytes / self._bytes_per_token) if self._bytes_per_token else nbytes
        return self._state.loaded().scheduler.queue.reserve(_caller(), nbytes, tokens)

    async def _parse(self, data: bytes, kind: type[RequestT]) -> ParsedRequest[RequestT]:
        request = await self._in_thread(len(data), parse_request, data, kind, self._info)
        current_call().request_id = request.head.request_id
        return request

    async def _in_thread(self, nbytes: int, function: Callable[..., ResultT], *arguments: object) -> ResultT:
        """Run work whose time grows with the request, without blocking the event loop."""
        return await self._work.run(_caller(), id(current_call()), nbytes, function, *arguments)

    async def _tokenize(self, query: KVQuery, engine: TeacherEngine) -> list[TokenizedSample | FieldError]:
        check = sample_check(query, engine.info.max_sample_tokens)
        outcomes: list[TokenizedSample | FieldError] = []
        for size, part in parts_of(query.samples):
            outcomes += await self._in_thread(size, tokenize, engine, part, check)
        return outcomes

    @asynccontextmanager
    async def _sending(self, context: grpc.aio.ServicerContext) -> AsyncIterator[Send]:
        metadata = [(TEACHER_METADATA, teacher_metadata(self._info))]
        slots = self._state.shared.named_by(context.invocation_metadata() or ())
        if slots is not None:
            metadata.append((MEMORY_METADATA, USED))
        named = False

        async def send(frame: bytes) -> None:
            nonlocal named
            # Not before the first frame: gRPC clients retry a refused call only if they received no metadata.
            if not named:
                named = True
                await context.send_initial_metadata(metadata)
            await context.write(frame)

        async with nullcontext(send) if self._chaos is None else self._chaos.spoiled(send) as passed_on:
            yield passed_on if slots is None else through_memory(passed_on, slots, current_call())

    async def answer(self, query: KVQuery, reserved: Reservation, send: Send) -> None:
        """Run a query, which takes its room in the queue, and send its frames.

        Raises:
            UnknownMapError: the server does not hold the plan's map.
        """
        kv_map = self._state.maps.named_by(query.plan)
        backend, call, answer = await self._open(query, reserved.nbytes, kv_map)
        stream = ClientStream(answer, caller=reserved.caller)
        samples = await self._tokenize(query, backend.engine)
        jobs = await self._in_thread(reserved.nbytes, _to_jobs, stream, query, samples, backend.engine.info, kv_map)
        call.tokens = sum(job.tokens for job in jobs)
        if jobs and len(jobs) == len(samples):
            measured = reserved.nbytes / call.tokens
            self._bytes_per_token += (measured - self._bytes_per_token) / (8 if self._bytes_per_token else 1)
        try:
            backend.scheduler.queue.resize(reserved, 0)
            backend.scheduler.queue.extend(stream, jobs)
            _refuse_invalid(samples, answer)
            await _send_frames(answer, stream, backend, call, send)
        finally:
            backend.scheduler.queue.remove(stream)

    async def _answer_generate(self, query: KVQuery, reserved: Reservation, send: Send) -> None:
        """Generate from a query's prompts, run the completed samples, and send all frames.

        Raises:
            BusyError: the queue has no room for its prompts.
            UnknownMapError: the server does not hold the plan's map.
        """
        assert query.sampling is not None
        kv_map = self._state.maps.named_by(query.plan)
        reserved.add(query.sampling.max_new_tokens * len(query.samples))
        backend, call, answer = await self._open(query, reserved.nbytes, kv_map)
        prompts = await self._tokenize(query, backend.engine)

        def count_tokens(generated: int, in_samples: int) -> None:
            call.generated_tokens += generated
            call.tokens += in_samples

        generation = Generation(
            query.plan, kv_map, query.sampling, backend, answer, reserved.caller, self._work, count_tokens
        )
        try:
            backend.scheduler.queue.resize(reserved, 0)
            generation.queue(prompts)
            _refuse_invalid(prompts, answer)
            await _send_frames(answer, generation.samples, backend, call, send)
        finally:
            generation.close()

    async def _open(self, query: KVQuery, nbytes: int, kv_map: KVMap | None) -> tuple[Backend, Call, AnswerStream]:
        """Returns the backend that answers a query, the call's log record, and the stream of its frames."""
        self._warn_once(query.plan.selection.warning)
        backend, call, metric = self._state.loaded(), current_call(), self._state.metrics.samples
        call.request_id, call.codec, call.samples = query.request_id, query.plan.codec.name, len(query.samples)

        def count_sample(status: str) -> None:
            metric.labels(status).inc()
            call.failed_samples += status != "ok"

        keys = await self._in_thread(nbytes, query.sample_keys, backend.engine.info)
        writer = FrameWriter(query.request_id, query.plan, keys, self._state.config.max_frame_bytes, kv_map)
        return backend, call, AnswerStream(writer, len(query.samples), count_sample)

    def _warn_once(self, warning: str | None) -> None:
        if warning is not None and warning not in self._warnings:
            self._warnings.add(warning)
            log_event(log, "plan_warning", level=logging.WARNING, problem=warning)


def _caller() -> Caller:
    return caller_of(current_call().peer)


def _to_jobs(
    stream: ClientStream,
    query: KVQuery,
    samples: Sequence[TokenizedSample | FieldError],
    info: TeacherInfo,
    kv_map: KVMap | None,
) -> list[Job]:
    return [
        Job(stream, index, PlannedSample(tokens, query.plan, kv_map), encoded_bytes(query.plan, tokens, info))
        for index, tokens in enumerate(samples)
        if not isinstance(tokens, FieldError)
    ]


def _refuse_invalid(samples: Sequence[TokenizedSample | FieldError], answer: AnswerStream) -> None:
    for index, tokens in enumerate(samples):
        if isinstance(tokens, FieldError):
            answer.refuse(index, grpc.StatusCode.INVALID_ARGUMENT.name, str(tokens))
    answer.settle()


async def _send_frames(answer: AnswerStream, stream: ClientStream, backend: Backend, call: Call, send: Send) -> None:
    while (outgoing := await answer.next()) is not None:
        if outgoing.frame:
            await send(outgoing.frame)
            if call.first_frame_s is None:
                call.first_frame_s = time.perf_counter() - call.started
            call.frames += 1
            call.sent_bytes += len(outgoing.frame)
        if outgoing.releases:
            backend.scheduler.queue.release(stream, outgoing.releases)
