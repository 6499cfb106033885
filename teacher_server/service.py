"""The gRPC service: reads a request, has its samples run, and sends the answer as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import grpc
import grpc.aio

from kvcore.errors import FieldError
from kvcore.plan import SamplingParams
from kvcore.types import TeacherInfo
from kvcore.wire.frames import FrameWriter
from kvcore.wire.messages import TEACHER_METADATA, info_to_proto, teacher_metadata
from protos import kv_cache_pb2 as pb
from teacher_server.answer_stream import AnswerStream
from teacher_server.engines.base import TokenizedSample
from teacher_server.generation import Generation, read_prompts
from teacher_server.limits import read_request
from teacher_server.monitoring.activity import Call, current_call
from teacher_server.query import (
    KVQuery,
    ParsedRequest,
    RequestT,
    parse_request,
    read_generate_query,
    read_jobs,
    read_query,
)
from teacher_server.sample_queue import ClientStream
from teacher_server.state import Backend, ServerState

SERVICE = pb.DESCRIPTOR.services_by_name["TeacherKV"].full_name

Write = Callable[[bytes], Awaitable[None]]
ResultT = TypeVar("ResultT")


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
        """How gRPC calls the service. Frames pass through as the bytes that they already are.

        To gRPC each call's one request is a stream, so that it is read when the method asks for it: a call that its
        metadata or the server's load refuses leaves its request unread. `CallInterceptor` calls the methods with the
        context alone.
        """
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Describe": grpc.stream_unary_rpc_method_handler(
                    self.describe, response_serializer=pb.DescribeResponse.SerializeToString
                ),
                "StreamKV": grpc.stream_stream_rpc_method_handler(self.stream_kv),
                "Generate": grpc.stream_stream_rpc_method_handler(self.generate),
            },
        )

    async def describe(self, _context: grpc.aio.ServicerContext) -> pb.DescribeResponse:
        """Which teacher this is.

        Raises:
            NotReadyError: it is not loaded.
        """
        return info_to_proto(self._state.loaded().engine.info)

    async def stream_kv(self, context: grpc.aio.ServicerContext) -> None:
        """Answers one request; errors are mapped by `interceptors.status_of`."""
        with self._state.open_stream():
            async with asyncio.timeout(self._state.config.max_request_seconds):
                request = await self._receive(context, pb.KVRequest)
                query = await self._in_thread(read_query, request, self._info)
                await self.answer(query, self._writer(context))

    async def generate(self, context: grpc.aio.ServicerContext) -> None:
        """Answers one request to write; errors are mapped by `interceptors.status_of`."""
        with self._state.open_stream():
            async with asyncio.timeout(self._state.config.max_request_seconds):
                request = await self._receive(context, pb.GenerateRequest)
                query, sampling = await self._in_thread(read_generate_query, request, self._info)
                await self._write_on(query, sampling, self._writer(context))

    @property
    def _info(self) -> TeacherInfo:
        return self._state.loaded().engine.info

    async def _receive(self, context: grpc.aio.ServicerContext, kind: type[RequestT]) -> ParsedRequest[RequestT]:
        request = await self._in_thread(parse_request, await read_request(context), kind, self._info)
        current_call().request_id = request.head.request_id
        return request

    async def _in_thread(self, function: Callable[..., ResultT], *arguments: object) -> ResultT:
        """Runs what takes longer the more a request holds, without holding up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function, *arguments)

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
        backend, call, stream = await self._open(query)
        lane = ClientStream(stream)
        read, jobs = await self._in_thread(read_jobs, lane, query, backend.engine)
        call.tokens = sum(job.tokens for job in jobs)
        try:
            if jobs:
                backend.scheduler.queue.admit(lane, jobs)
            _refuse_unreadable(read, stream)
            await _send(stream, lane, backend, call, write)
        finally:
            backend.scheduler.queue.remove(lane)

    async def _write_on(self, query: KVQuery, sampling: SamplingParams, write: Write) -> None:
        """Has the teacher write on from a query's prompts, runs what comes of them, and writes all that as frames.

        Raises:
            BusyError: its samples do not fit into the queue at the moment.
        """
        backend, call, stream = await self._open(query, sampling)
        read = await self._in_thread(read_prompts, backend.engine, query.samples, sampling)

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

    async def _open(self, query: KVQuery, sampling: SamplingParams | None = None) -> tuple[Backend, Call, AnswerStream]:
        """Returns the backend that answers a query, the call's log record, and the stream that takes its frames."""
        backend, call = self._state.loaded(), current_call()
        call.request_id, call.codec, call.samples = query.request_id, query.plan.codec.name, len(query.samples)
        keys = await self._in_thread(sample_keys, query, backend.engine.info, sampling)
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


def sample_keys(query: KVQuery, info: TeacherInfo, sampling: SamplingParams | None) -> list[str]:
    """Returns the key of each sample as the server understood it. Its time grows with the request."""
    return [sample.key(info.weights_digest, query.plan, sampling) for sample in query.samples]


async def _send(stream: AnswerStream, lane: ClientStream, backend: Backend, call: Call, write: Write) -> None:
    while (outgoing := await stream.next()) is not None:
        if outgoing.frame:
            await write(outgoing.frame)
            if call.first_frame_s is None:
                call.first_frame_s = time.perf_counter() - call.started
            call.frames += 1
            call.sent_bytes += len(outgoing.frame)
        if outgoing.releases:
            backend.scheduler.queue.release(lane, outgoing.releases)
