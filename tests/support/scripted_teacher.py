"""A real gRPC server in this process that serves `kv_of`, and fails on demand."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from kvcore.types import Sample, TeacherInfo, Timings
from kvcore.wire import messages
from kvcore.wire.frames import FrameWriter
from protos import kv_cache_pb2 as pb
from student_trainer.kv_sources.parity import parity_sample
from tests.support.kv_fakes import INFO, kv_of

Script = Callable[[int, grpc.ServicerContext], None]


class ScriptedTeacher:
    """Answers one frame per sample. Before each frame `script(frames sent in this request, context)` runs.

    `failing`: ids of samples that end with the failure `failure_code`. `damage`: changes the bytes of each frame.
    `frames_at_most`: every answer ends without an error after this number of frames. `requests`: the ids of each
    request for samples; comparisons of replicas are not counted.
    """

    def __init__(self, info: TeacherInfo = INFO, port: int = 0) -> None:
        self.info = info
        self.requests: list[list[str]] = []
        self.describes = 0
        self.failing: set[str] = set()
        self.failure_code = "FAILED_PRECONDITION"
        self.frames_at_most = sys.maxsize
        self.script: Script = lambda _frames, _context: None
        self.damage: Callable[[bytes], bytes] = lambda frame: frame
        self.released = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        handlers = {
            "Describe": grpc.unary_unary_rpc_method_handler(
                self._describe,
                request_deserializer=pb.DescribeRequest.FromString,
                response_serializer=pb.DescribeResponse.SerializeToString,
            ),
            "StreamKV": grpc.unary_stream_rpc_method_handler(
                self._stream, request_deserializer=pb.KVRequest.FromString
            ),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("kvcache.v1.TeacherKV", handlers),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.released.set()
        self._server.stop(None).wait(5)

    def _describe(self, _request: pb.DescribeRequest, _context: Any) -> pb.DescribeResponse:
        self.describes += 1
        return messages.info_to_proto(self.info)

    def _stream(self, request: pb.KVRequest, context: Any) -> Iterator[bytes]:
        asked = [messages.sample_from_proto(sample) for sample in request.samples]
        plan = messages.plan_from_proto(request.plan)
        if asked[0].id != parity_sample(self.info).id:
            self.requests.append([sample.id for sample in asked])
        keys = [sample.key(self.info.weights_digest, plan) for sample in asked]
        writer = FrameWriter(request.request_id, plan, keys, self.info.max_frame_bytes)
        context.send_initial_metadata(((messages.TEACHER_METADATA, messages.teacher_metadata(self.info)),))
        sent = 0
        for index, sample in enumerate(asked):
            self.script(sent, context)
            for frame in self._frames(writer, plan, index, sample):
                if sent == self.frames_at_most:
                    return
                yield self.damage(frame)
                sent += 1
        self.script(sent, context)
        yield from writer.end()

    def _frames(self, writer: FrameWriter, plan: Any, index: int, sample: Sample) -> list[bytes]:
        kv = kv_of(sample, self.info, plan)
        frames = writer.sample(index, sample.id, kv.token_ids_T.tolist(), kv.byte_ends_T.tolist())
        if sample.id in self.failing:
            return [*frames, *writer.sample_failed(index, self.failure_code, "a key of layer 1"), *writer.flush()]
        for at, layer in enumerate(plan.layers):
            parts = {name: part[at] for name, part in kv.parts.items()}
            errors = {kind: values[at] for kind, values in kv.relative_error.items()}
            frames += writer.layer(index, layer, parts, kv.positions[0], errors)
        return [*frames, *writer.sample_end(index, Timings(0.001, 0.002, 0.003)), *writer.flush()]


def die_after(frames: int) -> Script:
    """Break the stream after `frames` frames, like a lost connection."""

    def script(sent: int, context: grpc.ServicerContext) -> None:
        if sent == frames:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    return script


def busy(times: int, pushback_ms: str = "20") -> Script:
    """Refuse the first `times` requests with RESOURCE_EXHAUSTED."""
    left = [times]

    def script(sent: int, context: grpc.ServicerContext) -> None:
        if sent == 0 and left[0]:
            left[0] -= 1
            context.set_trailing_metadata((("grpc-retry-pushback-ms", pushback_ms),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "1048576 tokens wait already")

    return script


def refuse(code: grpc.StatusCode, details: str) -> Script:
    """Refuse every request."""

    def script(_sent: int, context: grpc.ServicerContext) -> None:
        context.abort(code, details)

    return script
