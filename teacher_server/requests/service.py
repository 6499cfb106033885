"""The gRPC service TeacherKV: reads a request, queues its samples, and sends the answer. Steps: see the package."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import grpc
import grpc.aio

from kvcore.errors import FieldError
from kvcore.types import TeacherInfo
from kvcore.wire.frames import FrameWriter
from kvcore.wire.messages import TEACHER_METADATA, info_to_proto, teacher_metadata
from protos import kv_cache_pb2 as pb
from teacher_server.engines.base import PlannedSample, TokenizedSample
from teacher_server.monitoring.activity import Call, current_call
from teacher_server.plan_execution import encoded_bytes
from teacher_server.requests.answer_stream import AnswerStream
from teacher_server.requests.connection_limits import read_request
from teacher_server.requests.generation import Generation
from teacher_server.requests.request_parsing import (
    KVQuery,
    ParsedRequest,
    RequestT,
    parse_request,
    read_generate_query,
    read_query,
    tokenize,
    tokenize_prompts,
)
from teacher_server.sample_queue import ClientStream, Job
from teacher_server.state import Backend, ServerState

SERVICE = pb.DESCRIPTOR.services_by_name["TeacherKV"].full_name

Send = Callable[[bytes], Awaitable[None]]
ResultT = TypeVar("ResultT")


class TeacherKVService:
    """The methods Describe, StreamKV and Generate of one server."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        # One thread: tokenizers release the GIL for long texts, but not all of them are thread-safe.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def close(self) -> None:
        """End the tokenizer's thread."""
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

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
        with self._state.open_stream():
            async with asyncio.timeout(self._state.config.max_request_seconds):
                request = await self._receive(context, pb.KVRequest)
                query = await self._in_thread(read_query, request, self._info)
                await self.answer(query, self._sender(context))

    async def generate(self, context: grpc.aio.ServicerContext) -> None:
        """Answer a request to generate. `call_interceptor.status_of` maps its errors."""
        with self._state.open_stream():
            async with asyncio.timeout(self._state.config.max_request_seconds):
                request = await self._receive(context, pb.GenerateRequest)
                query = await self._in_thread(read_generate_query, request, self._info)
                await self._answer_generate(query, self._sender(context))

    @property
    def _info(self) -> TeacherInfo:
        return self._state.loaded().engine.info

    async def _receive(self, context: grpc.aio.ServicerContext, kind: type[RequestT]) -> ParsedRequest[RequestT]:
        request = await self._in_thread(parse_request, await read_request(context), kind, self._info)
        current_call().request_id = request.head.request_id
        return request

    async def _in_thread(self, function: Callable[..., ResultT], *arguments: object) -> ResultT:
        """Run work whose time grows with the request, without blocking the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function, *arguments)

    def _sender(self, context: grpc.aio.ServicerContext) -> Send:
        metadata = ((TEACHER_METADATA, teacher_metadata(self._info)),)
        call = current_call()

        async def send(frame: bytes) -> None:
            # Not before the first frame: gRPC clients retry a refused call only if they received no metadata.
            if not call.frames:
                await context.send_initial_metadata(metadata)
            await context.write(frame)

        return send

    async def answer(self, query: KVQuery, send: Send) -> None:
        """Run a query and send its frames.

        Raises:
            BusyError: the queue has no room for its samples.
        """
        backend, call, answer = await self._open(query)
        stream = ClientStream(answer)
        samples, jobs = await self._in_thread(_tokenize_to_jobs, stream, query, backend)
        call.tokens = sum(job.tokens for job in jobs)
        try:
            if jobs:
                backend.scheduler.queue.admit(stream, jobs)
            _refuse_invalid(samples, answer)
            await _send_frames(answer, stream, backend, call, send)
        finally:
            backend.scheduler.queue.remove(stream)

    async def _answer_generate(self, query: KVQuery, send: Send) -> None:
        """Generate from a query's prompts, run the completed samples, and send all frames.

        Raises:
            BusyError: the queue has no room for its prompts.
        """
        assert query.sampling is not None
        backend, call, answer = await self._open(query)
        prompts = await self._in_thread(tokenize_prompts, backend.engine, query)

        def count_tokens(generated: int, in_samples: int) -> None:
            call.generated_tokens += generated
            call.tokens += in_samples

        generation = Generation(query.plan, query.sampling, backend, answer, self._tokenizing, count_tokens)
        try:
            generation.admit(prompts)
            _refuse_invalid(prompts, answer)
            await _send_frames(answer, generation.samples, backend, call, send)
        finally:
            generation.close()

    async def _open(self, query: KVQuery) -> tuple[Backend, Call, AnswerStream]:
        """Returns the backend that answers a query, the call's log record, and the stream of its frames."""
        backend, call, metric = self._state.loaded(), current_call(), self._state.metrics.samples
        call.request_id, call.codec, call.samples = query.request_id, query.plan.codec.name, len(query.samples)

        def count_sample(status: str) -> None:
            metric.labels(status).inc()
            call.failed_samples += status != "ok"

        keys = await self._in_thread(query.sample_keys, backend.engine.info)
        writer = FrameWriter(query.request_id, query.plan, keys, self._state.config.max_frame_bytes)
        return backend, call, AnswerStream(writer, len(query.samples), count_sample)


def _tokenize_to_jobs(
    stream: ClientStream, query: KVQuery, backend: Backend
) -> tuple[list[TokenizedSample | FieldError], list[Job]]:
    samples = tokenize(backend.engine, query)
    jobs = [
        Job(stream, index, PlannedSample(tokens, query.plan), encoded_bytes(query.plan, tokens, backend.engine.info))
        for index, tokens in enumerate(samples)
        if not isinstance(tokens, FieldError)
    ]
    return samples, jobs


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
