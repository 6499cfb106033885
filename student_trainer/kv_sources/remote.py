"""One endpoint of a teacher over gRPC. The only place where gRPC's errors become ours."""

from __future__ import annotations

import logging
import operator
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any, ClassVar

import grpc
from google.protobuf.message import Message
from grpc.experimental import ChannelOptions
from opentelemetry.trace import SpanKind

from kvcore.errors import FieldError, KVDistillError, ProtocolError, TeacherRefusedError, TeacherUnavailableError
from kvcore.monitoring import tracing
from kvcore.plan import KVPlan
from kvcore.types import EncodedSampleKV, MissingKV, Sample, TeacherInfo, Timings
from kvcore.wire import messages as wire
from kvcore.wire.channel_arguments import client_arguments
from kvcore.wire.stream_reader import StreamReader
from protos import kv_cache_pb2 as pb
from student_trainer.kv_sources.base import KVResult
from student_trainer.kv_sources.channel import Transport, transport_from_environment

logger = logging.getLogger(__name__)

PlanFactory = Callable[[TeacherInfo], KVPlan]

DESCRIBE_TIMEOUT_S = 5.0
DEFAULT_PUSHBACK_S = 0.5
# A frame's header comes on top of its body: at most 1024 records of a few hundred bytes.
HEADER_ALLOWANCE_BYTES = 1 << 20
DEFAULT_RECEIVE_BYTES = 4 << 20
# Below the 4 MiB that gRPC servers accept unless told otherwise; a single sample may still be larger.
REQUEST_BYTES = 3 << 20
# How many samples an error names.
MOST_IDS_NAMED = 5

_REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
}

# Statuses of single samples that say nothing about the sample.
_PASSING_FAILURES = {"INTERNAL", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED", "DEADLINE_EXCEEDED", "UNKNOWN"}


class _BusyError(Exception):
    """The teacher is full and says when to come back."""

    def __init__(self, wait_s: float, details: str) -> None:
        super().__init__(details)
        self.wait_s = wait_s


class RemoteSource:
    """Pulls K/V from one server. `connect` comes first: the plan is made from the geometry it learns.

    For one fetching thread; `close` may come from any other.

    Args:
        teacher: the teacher's name in the configuration.
        endpoint: host:port of the gRPC service.
        plan_for: makes the plan for a teacher of this geometry.
        timeout_s: deadline of one request.
        patience_s: how long to keep coming back to a teacher that says it is full.
        transport: TLS and token; by default what the environment variables say.
    """

    _METHOD: ClassVar[str] = "StreamKV"

    def __init__(
        self,
        teacher: str,
        endpoint: str,
        plan_for: PlanFactory,
        timeout_s: float = 120.0,
        patience_s: float = 30.0,
        transport: Transport | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.retries = 0
        self._teacher = teacher
        self._plan_for = plan_for
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._transport = transport_from_environment() if transport is None else transport
        self._info: TeacherInfo | None = None
        self._plan: KVPlan | None = None
        self._plan_message: pb.Plan | None = None
        self._closed = threading.Event()
        self._open_channel(DEFAULT_RECEIVE_BYTES)

    @property
    def info(self) -> TeacherInfo:
        """What the server last said of itself."""
        assert self._info is not None, "connect() comes first"
        return self._info

    @property
    def plan(self) -> KVPlan:
        """The plan made for this teacher."""
        assert self._plan is not None, "connect() comes first"
        return self._plan

    def connect(self, wait_s: float = 0.0) -> TeacherInfo:
        """Asks who serves there.

        Args:
            wait_s: how long to wait for a server that is not up yet; by default not at all.

        Raises:
            TeacherUnavailableError: nobody answers.
            TeacherRefusedError: what answers is no teacher of this protocol.
            ProtocolError: the description was damaged on its way.
        """
        try:
            timeout_s = max(wait_s, DESCRIBE_TIMEOUT_S)
            response = self._describe(
                pb.DescribeRequest(), timeout=timeout_s, wait_for_ready=wait_s > 0, metadata=tracing.headers()
            )
        except grpc.RpcError as error:
            raise self._mapped(error) from error
        except ValueError as error:
            raise self._closed_error() from error
        try:
            info = wire.info_from_proto(response)
        except FieldError as error:
            raise TeacherRefusedError(self._teacher, f"{self.endpoint} describes itself wrongly: {error}") from error
        except ProtocolError as error:
            raise self._damage(error) from error
        self._info, self._plan = info, self._plan_for(info)
        self._plan_message = wire.plan_to_proto(self._plan)
        needed = info.max_frame_bytes + HEADER_ALLOWANCE_BYTES
        if needed > self._receive_bytes:
            self._channel.close()
            self._open_channel(needed)
        return info

    def announce(self, samples: Sequence[Sample]) -> None:
        """Does nothing: this source does not prefetch."""

    def fetch(self, samples: Sequence[Sample]) -> list[KVResult]:
        """Asks this endpoint alone, for everything.

        Raises:
            TeacherUnavailableError: it does not answer.
            TeacherRefusedError: it will not serve this.
            ProtocolError: damaged bytes, again after a retry.
        """
        answers: list[KVResult | None] = [None] * len(samples)
        self.fetch_into(samples, answers)
        return [answer for answer in answers if answer is not None]

    def fetch_into(self, samples: Sequence[Sample], answers: list[KVResult | None]) -> None:
        """Fills every `answers[i]` that is None with sample i's result; whole samples that came before an error stay.

        Raises:
            As `fetch`.
        """
        rows: dict[str, list[int]] = {}
        for row, sample in enumerate(samples):
            if answers[row] is None:
                rows.setdefault(sample.id, []).append(row)
        for chunk in _chunks([samples[first] for first, *_ in rows.values()], self.info.max_samples_per_request):
            got: dict[str, KVResult] = {}
            try:
                self._fetch_chunk(chunk, got)
            finally:
                for sample_id, result in got.items():
                    for row in rows[sample_id]:
                        answers[row] = result

    def close(self) -> None:
        """Closes the connection; a request under way is cancelled."""
        self._closed.set()
        self._channel.close()

    def _fetch_chunk(self, samples: Sequence[Sample], got: dict[str, KVResult]) -> None:
        """One request, repeated while the server is full, and once after damaged bytes.

        A sample that failed for no reason of its own (the engine broke on its batch) is asked for once more, alone.
        """
        give_up_at = time.monotonic() + self._patience_s
        damaged = False
        excused: set[str] = set()
        while missing := [sample for sample in samples if sample.id not in got]:
            asked = [sample for sample in missing if sample.id not in excused] or missing[:1]
            try:
                with tracing.span(f"kvcache.v1.TeacherKV/{self._METHOD}", SpanKind.CLIENT, self._attributes(asked)):
                    self._stream(asked, got, excused)
            except _BusyError as busy:
                self._wait_for_room(busy, give_up_at)
            except ProtocolError as error:
                if damaged:
                    raise self._damage(error, asked) from error
                damaged = True
                logger.warning("teacher '%s' at %s: %s; asking once more", self._teacher, self.endpoint, error)
            if any(sample.id not in got for sample in asked):
                self.retries += 1

    def _stream(self, samples: Sequence[Sample], got: dict[str, KVResult], excused: set[str]) -> None:
        """One request; adds each sample to `got` as soon as it is whole, or to `excused` for its first such failure."""
        request, reader = self._question(uuid.uuid4().hex, samples)
        started = time.monotonic()
        try:
            call = self._ask(request, timeout=self._timeout_s, metadata=tracing.headers())
        except ValueError as error:
            raise self._closed_error() from error
        try:
            for number, data in enumerate(call):
                if number == 0:
                    self._check_teacher(dict(call.initial_metadata()))
                arrived = reader.feed(data)
                elapsed = time.monotonic() - started
                for index, outcome in arrived:
                    sample_id = samples[index].id
                    if isinstance(outcome, EncodedSampleKV):
                        got[sample_id] = _timed(outcome, elapsed)
                    elif outcome.code in _PASSING_FAILURES and sample_id not in excused:
                        excused.add(sample_id)
                    else:
                        got[sample_id] = MissingKV(sample_id, f"{outcome.code}: {outcome.message}")
            reader.finish()
        except grpc.RpcError as error:
            raise self._mapped(error) from error
        finally:
            call.cancel()

    def _question(self, request_id: str, samples: Sequence[Sample]) -> tuple[Message, StreamReader]:
        """A request, and who reads its answer."""
        messages = [wire.sample_to_proto(sample) for sample in samples]
        request = pb.KVRequest(request_id=request_id, plan=self._plan_message, samples=messages)
        return request, StreamReader(request_id, self.plan, samples, self.info)

    def _attributes(self, asked: Sequence[Sample]) -> tracing.Attributes:
        """What a request's span says of it."""
        return {
            "rpc.system": "grpc",
            "rpc.service": "kvcache.v1.TeacherKV",
            "rpc.method": self._METHOD,
            "server.address": self.endpoint,
            "kvdistill.teacher": self._teacher,
            "kvdistill.samples": len(asked),
            "kvdistill.sample_ids": tracing.id_list(sample.id for sample in asked),
        }

    def _check_teacher(self, metadata: dict[str, Any]) -> None:
        """An endpoint may be restarted, or balanced over servers, behind a channel that reconnects by itself."""
        answering = metadata.get(wire.TEACHER_METADATA)
        if answering is None:
            raise ProtocolError("the answer does not say which teacher it comes from")
        if answering != wire.teacher_metadata(self.info):
            raise self._unavailable("another teacher answers there than the one that was connected to")

    def _wait_for_room(self, busy: _BusyError, give_up_at: float) -> None:
        if time.monotonic() + busy.wait_s > give_up_at:
            raise self._unavailable(f"still full after {self._patience_s:g} s ({busy})") from busy
        self._closed.wait(busy.wait_s)

    def _open_channel(self, receive_bytes: int) -> None:
        self._receive_bytes = receive_bytes
        options = [*client_arguments(receive_bytes, self._timeout_s), (ChannelOptions.SingleThreadedUnaryStream, 1)]
        self._channel = self._transport.open_channel(self.endpoint, options)
        self._describe = self._channel.unary_unary(
            "/kvcache.v1.TeacherKV/Describe",
            request_serializer=pb.DescribeRequest.SerializeToString,
            response_deserializer=pb.DescribeResponse.FromString,
        )
        # Without a deserialiser every message arrives as the bytes that were sent: no protobuf object, no copy.
        self._ask = self._channel.unary_stream(
            f"/kvcache.v1.TeacherKV/{self._METHOD}", request_serializer=operator.methodcaller("SerializeToString")
        )

    def _mapped(self, error: Any) -> KVDistillError | _BusyError | CancelledError:
        """The error that a gRPC status means. `error` is a grpc.RpcError that is also a grpc.Call."""
        code, details = error.code(), error.details() or "no details"
        if self._closed.is_set():
            return self._closed_error()
        if code in _REFUSALS:
            return TeacherRefusedError(self._teacher, f"{self.endpoint} refused: {details}")
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return self._exhausted(details, dict(error.trailing_metadata() or ()))
        return self._unavailable(f"{code.name}: {details}")

    def _exhausted(self, details: str, trailers: dict[str, Any]) -> KVDistillError | _BusyError:
        pushback = trailers.get("grpc-retry-pushback-ms")
        if pushback is None and "larger than max" in details:
            return TeacherRefusedError(self._teacher, f"{self.endpoint}: a message was too large: {details}")
        try:
            wait_s = DEFAULT_PUSHBACK_S if pushback is None else int(pushback) / 1000
        except ValueError:
            wait_s = -1.0
        # By gRPC's retry design a pushback that is negative or no number means: do not come back.
        return _BusyError(wait_s, details) if wait_s >= 0 else self._unavailable(f"full: {details}")

    def _damage(self, error: ProtocolError, asked: Sequence[Sample] = ()) -> ProtocolError:
        """The error with where it came from, and the samples whose request it ended."""
        ids = ", ".join(f"'{sample.id}'" for sample in asked[:MOST_IDS_NAMED])
        more = f" and {len(asked) - MOST_IDS_NAMED} more" if len(asked) > MOST_IDS_NAMED else ""
        request = f" (request for the samples {ids}{more})" if asked else ""
        return ProtocolError(f"teacher '{self._teacher}' at {self.endpoint}: {error}{request}")

    def _unavailable(self, problem: str) -> TeacherUnavailableError:
        return TeacherUnavailableError(self._teacher, problem)

    def _closed_error(self) -> CancelledError:
        return CancelledError(f"teacher '{self._teacher}': the source was closed")


def _chunks(samples: Sequence[Sample], most: int) -> Iterator[list[Sample]]:
    """Cuts samples into requests of at most `most`, and of a size that any server takes."""
    chunk: list[Sample] = []
    size = 0
    for sample in samples:
        # At most 4 bytes for a character in UTF-8, 5 for a token id below 2^35 as a varint.
        weight = 4 * len(sample.text or "") + 5 * len(sample.token_ids or ())
        if chunk and (len(chunk) == most or size + weight > REQUEST_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(sample)
        size += weight
    if chunk:
        yield chunk


def _timed(kv: EncodedSampleKV, elapsed_s: float) -> EncodedSampleKV:
    """Counts as network what the server's stages do not account for."""
    at_server = kv.timings
    network = max(0.0, elapsed_s - at_server.queue - at_server.prefill - at_server.encode)
    kv.timings = Timings(at_server.queue, at_server.prefill, at_server.encode, network)
    return kv
