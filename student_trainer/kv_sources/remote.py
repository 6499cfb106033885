"""One endpoint of a teacher over gRPC. Maps gRPC errors to the errors of `kvcore.errors`."""

from __future__ import annotations

import itertools
import logging
import operator
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import grpc
from google.protobuf.message import Message
from grpc.experimental import ChannelOptions
from opentelemetry.trace import SpanKind

from kvcore.errors import (
    EndpointRefusedError,
    FieldError,
    ProtocolError,
    TeacherBusyError,
    TeacherRefusedError,
)
from kvcore.monitoring import tracing
from kvcore.plan import KVPlan
from kvcore.printable import printable
from kvcore.tensors.kv_map import KVMap
from kvcore.types import EncodedSampleKV, MissingKV, Sample, TeacherInfo, Timings
from kvcore.wire import messages
from kvcore.wire.channel_arguments import client_arguments
from kvcore.wire.shared_memory import MEMORY_METADATA, USED
from kvcore.wire.stream_reader import StreamReader
from protos import kv_cache_pb2 as pb
from student_trainer.kv_sources.base import KVResult, KVSource
from student_trainer.kv_sources.call_errors import BusyError, CallErrors, UnknownMapError
from student_trainer.kv_sources.channel import Transport, open_channel, transport_from_environment
from student_trainer.kv_sources.parity import parity_plan, parity_sample
from student_trainer.kv_sources.replica import busy_delay
from student_trainer.kv_sources.request_sizes import chunks_of
from student_trainer.kv_sources.retry_budget import RetryBudget
from student_trainer.kv_sources.shared_memory import MemoryOfEndpoint

logger = logging.getLogger(__name__)

PlanFactory = Callable[[TeacherInfo], KVPlan]

DESCRIBE_TIMEOUT_S = 5.0
# Room for a frame's header: at most 1024 records of a few hundred bytes.
HEADER_ALLOWANCE_BYTES = 1 << 20
DEFAULT_RECEIVE_BYTES = 4 << 20
# How soon a wait notices that the fetch was cancelled.
CANCEL_CHECK_SECONDS = 0.1
# Size of the pieces in which a map is sent.
MAP_PIECE_BYTES = 1 << 20
# Statuses of single samples that are not caused by the sample itself.
_TRANSIENT_FAILURES = {"INTERNAL", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED", "DEADLINE_EXCEEDED", "UNKNOWN"}


class RemoteSource(KVSource):
    """Pulls K/V from one server. Call `connect` first: it learns the geometry that the plan is made from.

    One thread fetches; `close` and `cancel` may be called from any other. `waits_when_busy`: whether it waits and
    retries when the teacher's queue is full; otherwise `fetch_into` raises TeacherBusyError. `budget`: limits how often
    requests are repeated.

    Args:
        teacher: the teacher's name in the configuration.
        endpoint: host:port of the gRPC service.
        plan_for: makes the plan for a teacher of this geometry.
        timeout_s: deadline of one request.
        patience_s: how long to retry while the teacher's queue is full.
        transport: TLS and token; the environment variables by default.
        kv_map: the map that the plan names. It is sent when the server does not hold it, as after a restart.
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
        kv_map: KVMap | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.retries = 0
        self.waits_when_busy = True
        self.budget = RetryBudget()
        self._busy_in_a_row = 0
        self._teacher = teacher
        self._plan_for = plan_for
        self._map = kv_map
        self._memory = MemoryOfEndpoint(teacher, endpoint)
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        transport = transport_from_environment() if transport is None else transport
        self._credentials = transport.credentials()
        self._info: TeacherInfo | None = None
        self._plan: KVPlan | None = None
        self._plan_message: pb.Plan | None = None
        self._closed, self._cancelled = threading.Event(), threading.Event()
        self._running: grpc.RpcContext | None = None
        self._errors = CallErrors(teacher, endpoint, transport, self._ended, knows_map=kv_map is not None)
        self._open_channel(DEFAULT_RECEIVE_BYTES)

    @property
    def info(self) -> TeacherInfo:
        """The server's last description of itself."""
        assert self._info is not None, "call connect() first"
        return self._info

    @property
    def plan(self) -> KVPlan:
        """The plan made for this teacher."""
        assert self._plan is not None, "call connect() first"
        return self._plan

    def connect(self, wait_s: float = 0.0) -> TeacherInfo:
        """Fetches the teacher's description and makes the plan.

        Args:
            wait_s: how long to wait for a server that is not up yet; by default it fails at once.

        Raises:
            TeacherUnavailableError: the endpoint does not answer.
            EndpointRefusedError: the server is not a teacher of this protocol, or requires another token.
            TeacherRefusedError: the server does not take the plan's map.
            ProtocolError: the description was damaged in transit.
        """
        if self._current_credentials() is not self._used_credentials and not self._closed.is_set():
            self._channel.close()
            self._open_channel(self._receive_bytes)
        try:
            timeout_s = max(wait_s, DESCRIBE_TIMEOUT_S)
            response = self._describe(
                pb.DescribeRequest(), timeout=timeout_s, wait_for_ready=wait_s > 0, metadata=tracing.headers()
            )
        except grpc.RpcError as error:
            raise self._errors.of_status(error, connects=True) from error
        except ValueError as error:
            raise self._errors.closed() from error
        try:
            info = messages.info_from_proto(response)
        except FieldError as error:
            raise EndpointRefusedError(
                self._teacher, f"{self.endpoint} sent an invalid description of itself: {error}"
            ) from error
        except ProtocolError as error:
            raise self._errors.damage(error) from error
        self._info, self._plan = info, self._plan_for(info)
        self._check_map()
        self._plan_message = messages.plan_to_proto(self._plan)
        needed = info.max_frame_bytes + HEADER_ALLOWANCE_BYTES
        if needed > self._receive_bytes:
            self._channel.close()
            self._open_channel(needed)
        return info

    def fetch(self, samples: Sequence[Sample]) -> list[KVResult]:
        """Fetches every sample from this endpoint.

        Raises:
            TeacherUnavailableError: the endpoint does not answer.
            TeacherRefusedError: the teacher will not serve this.
            ProtocolError: damaged bytes, again after a retry.
        """
        received: dict[str, KVResult] = {}
        self.budget.note_request()
        self.fetch_into(samples, received)
        return [received[sample.id] for sample in samples]

    def fetch_into(self, samples: Sequence[Sample], received: dict[str, KVResult]) -> None:
        """Adds the results that `received`, by sample id, does not have. Those received before an error are kept.

        Raises:
            As `fetch`.
            concurrent.futures.CancelledError: `cancel` or `close` was called.
        """
        missing = {sample.id: sample for sample in samples if sample.id not in received}
        for chunk in chunks_of(list(missing.values()), self.info.max_samples_per_request):
            self._fetch_chunk(chunk, received)

    def parity_kv(self) -> KVResult:
        """The K/V by which replicas are compared (`parity`). Fails at once if the server is full.

        Raises:
            TeacherBusyError: the server is full.
            TeacherUnavailableError: the endpoint does not answer.
            ProtocolError: damaged bytes.
        """
        plan, sample, request_id = parity_plan(self.info), parity_sample(self.info), uuid.uuid4().hex
        sent = [messages.sample_to_proto(sample)]
        request = pb.KVRequest(request_id=request_id, plan=messages.plan_to_proto(plan), samples=sent)
        received: dict[str, KVResult] = {}
        try:
            self._exchange(request, StreamReader(request_id, plan, [sample], self.info), [sample], received, set())
        except BusyError as busy:
            raise TeacherBusyError(self._teacher, f"its queue is full ({busy})", busy.wait_s) from busy
        if sample.id not in received:
            raise self._errors.unavailable("could not compute the K/V by which replicas are compared")
        return received[sample.id]

    def cancel(self) -> None:
        """Ends the request in progress, and every later one at once until `resume`."""
        self._cancelled.set()
        running = self._running
        if running is not None:
            running.cancel()

    def resume(self) -> None:
        """Requests can be made again after `cancel`."""
        self._cancelled.clear()

    def close(self) -> None:
        """Closes the connection and cancels a request in progress."""
        self._closed.set()
        self._memory.close()
        self._channel.close()

    def _fetch_chunk(self, samples: Sequence[Sample], received: dict[str, KVResult]) -> None:
        """Sends one request; repeats it while the server is full, and once after damaged bytes.

        A sample with a transient failure (the engine failed on its batch) is requested once more, on its own.
        """
        give_up_at = time.monotonic() + self._patience_s
        damaged = sent_map = False
        failed_once: set[str] = set()
        while missing := [sample for sample in samples if sample.id not in received]:
            requested = [sample for sample in missing if sample.id not in failed_once] or missing[:1]
            try:
                with tracing.span(f"kvcache.v1.TeacherKV/{self._METHOD}", SpanKind.CLIENT, self._attributes(requested)):
                    self._stream(requested, received, failed_once)
            except BusyError as busy:
                self._wait_for_room(busy, give_up_at)
            except UnknownMapError as error:
                if sent_map:
                    raise self._errors.unavailable(f"does not keep the map that it was sent: {error}") from error
                sent_map = self._send_map(give_up_at)
            except ProtocolError as error:
                if damaged:
                    raise self._errors.damage(error, requested) from error
                damaged = True
                logger.warning("teacher '%s' at %s: %s; retrying once", self._teacher, self.endpoint, error)
            if any(sample.id not in received for sample in requested):
                self._repeat()

    def _repeat(self) -> None:
        """Counts a repeated request, as soon as one is allowed."""
        while not self._ended() and (wait_s := self.budget.wait_s()):
            self._closed.wait(min(wait_s, CANCEL_CHECK_SECONDS))
        self.budget.spend()
        self.retries += 1

    def _ended(self) -> bool:
        return self._closed.is_set() or self._cancelled.is_set()

    def _begun(self, call: grpc.RpcContext) -> None:
        """Makes a call one that `cancel` ends."""
        self._running = call
        if self._cancelled.is_set():
            call.cancel()

    def _stream(self, samples: Sequence[Sample], received: dict[str, KVResult], failed_once: set[str]) -> None:
        """Sends one request. Adds each complete sample to `received`; a first transient failure to `failed_once`."""
        request, reader = self._request(uuid.uuid4().hex, samples)
        reader.memory = self._memory.for_request(self._ask_for_memory)
        self._exchange(request, reader, samples, received, failed_once)

    def _ask_for_memory(self) -> pb.OpenMemoryResponse:
        request, headers = pb.OpenMemoryRequest(), tracing.headers()
        asking = self._open_memory.future(request, timeout=DESCRIBE_TIMEOUT_S, metadata=headers)
        self._begun(asking)
        try:
            return asking.result()
        except grpc.FutureCancelledError as error:
            raise self._errors.closed() from error

    def _exchange(
        self,
        request: Message,
        reader: StreamReader,
        samples: Sequence[Sample],
        received: dict[str, KVResult],
        failed_once: set[str],
    ) -> None:
        started = time.monotonic()
        named = () if reader.memory is None else ((MEMORY_METADATA, reader.memory.key),)
        try:
            call = self._call(request, timeout=self._timeout_s, metadata=(*tracing.headers(), *named))
        except ValueError as error:
            raise self._errors.closed() from error
        self._begun(call)
        try:
            for number, data in enumerate(call):
                if number == 0:
                    metadata = dict(call.initial_metadata())
                    self._check_teacher(metadata)
                    if reader.memory is not None and metadata.get(MEMORY_METADATA) != USED:
                        self._memory.forget()
                self._memory.note_frame(len(data))
                self._busy_in_a_row = 0
                outcomes = reader.feed(data)
                elapsed = time.monotonic() - started
                for index, outcome in outcomes:
                    sample_id = samples[index].id
                    if isinstance(outcome, EncodedSampleKV):
                        received[sample_id] = _with_network_time(outcome, elapsed)
                    elif outcome.code in _TRANSIENT_FAILURES and sample_id not in failed_once:
                        failed_once.add(sample_id)
                    else:
                        received[sample_id] = MissingKV(sample_id, f"{outcome.code}: {printable(outcome.message)}")
            reader.finish()
        except grpc.RpcError as error:
            raise self._errors.of_status(error) from error
        finally:
            call.cancel()
            # A reader that is kept would keep the memory.
            reader.memory = None

    def _request(self, request_id: str, samples: Sequence[Sample]) -> tuple[Message, StreamReader]:
        """A request, and the reader of its response stream."""
        sent = [messages.sample_to_proto(sample) for sample in samples]
        request = pb.KVRequest(request_id=request_id, plan=self._plan_message, samples=sent)
        return request, StreamReader(request_id, self.plan, samples, self.info, kv_map=self._map)

    def _check_map(self) -> None:
        """Checks that the server takes the map."""
        if self._map is None:
            return
        assert self.plan.map == self._map.named, "the plan names another map"
        size, limit = len(self._map.content()), self.info.max_map_bytes
        if size > limit:
            problem = "does not support maps; update it" if limit == 0 else f"takes maps of up to {limit} bytes"
            raise TeacherRefusedError(
                self._teacher,
                f"{self.endpoint} {problem} (max_map_bytes); the map has {size} bytes (align.basis_rank, align.map_at "
                "or kv.codec.name pca)",
            )

    def _send_map(self, give_up_at: float) -> bool:
        """Sends the map, and waits while the server receives others. Returns True once the server holds it."""
        assert self._map is not None, "the server knows the map of no plan that names none"
        content, digest = self._map.content(), self._map.named.digest
        logger.info("teacher '%s': sending the map %s to %s", self._teacher, digest, self.endpoint)
        while True:
            first = pb.LoadMapRequest(digest=digest, size=len(content))
            starts = range(0, len(content), MAP_PIECE_BYTES)
            pieces = (pb.LoadMapRequest(data=content[start : start + MAP_PIECE_BYTES]) for start in starts)
            try:
                loading = self._load_map.future(
                    itertools.chain([first], pieces), timeout=self._timeout_s, metadata=tracing.headers()
                )
                self._begun(loading)
                loading.result()
            except grpc.FutureCancelledError as error:
                raise self._errors.closed() from error
            except grpc.RpcError as error:
                mapped = self._errors.of_status(error)
                if not isinstance(mapped, BusyError):
                    raise mapped from error
                self._wait_for_room(mapped, give_up_at)
            except ValueError as error:
                raise self._errors.closed() from error
            else:
                return True

    def _attributes(self, requested: Sequence[Sample]) -> tracing.Attributes:
        """Attributes of a request's tracing span."""
        return {
            "rpc.system": "grpc",
            "rpc.service": "kvcache.v1.TeacherKV",
            "rpc.method": self._METHOD,
            "server.address": self.endpoint,
            "kvdistill.teacher": self._teacher,
            "kvdistill.samples": len(requested),
            "kvdistill.sample_ids": tracing.id_list(sample.id for sample in requested),
        }

    def _check_teacher(self, metadata: dict[str, Any]) -> None:
        """Checks who answers: a channel reconnects by itself to a restarted server, or to another one of a balancer."""
        teacher = metadata.get(messages.TEACHER_METADATA)
        if teacher is None:
            raise ProtocolError("the response does not name its teacher")
        if teacher != messages.teacher_metadata(self.info):
            raise self._errors.unavailable("another teacher answers at this endpoint than before")

    def _wait_for_room(self, busy: BusyError, give_up_at: float) -> None:
        if not self.waits_when_busy:
            raise TeacherBusyError(self._teacher, f"its queue is full ({busy})", busy.wait_s) from busy
        wait_s = busy_delay(busy.wait_s, self._busy_in_a_row)
        self._busy_in_a_row += 1
        if time.monotonic() + wait_s > give_up_at:
            raise self._errors.unavailable(f"still full after {self._patience_s:g} s ({busy})") from busy
        self._closed.wait(wait_s)

    def _current_credentials(self) -> grpc.ChannelCredentials | None:
        return None if self._credentials is None else self._credentials.current(at_once=True)

    def _open_channel(self, receive_bytes: int) -> None:
        self._receive_bytes = receive_bytes
        options = [*client_arguments(receive_bytes, self._timeout_s), (ChannelOptions.SingleThreadedUnaryStream, 1)]
        self._used_credentials = self._current_credentials()
        self._channel = open_channel(self.endpoint, self._used_credentials, options)
        self._describe = self._channel.unary_unary(
            "/kvcache.v1.TeacherKV/Describe",
            request_serializer=pb.DescribeRequest.SerializeToString,
            response_deserializer=pb.DescribeResponse.FromString,
        )
        self._load_map = self._channel.stream_unary(
            "/kvcache.v1.TeacherKV/LoadMap",
            request_serializer=pb.LoadMapRequest.SerializeToString,
            response_deserializer=pb.LoadMapResponse.FromString,
        )
        self._open_memory = self._channel.unary_unary(
            "/kvcache.v1.TeacherKV/OpenMemory",
            request_serializer=pb.OpenMemoryRequest.SerializeToString,
            response_deserializer=pb.OpenMemoryResponse.FromString,
        )
        # Without a deserializer every message arrives as raw bytes: no protobuf object, no copy.
        self._call = self._channel.unary_stream(
            f"/kvcache.v1.TeacherKV/{self._METHOD}", request_serializer=operator.methodcaller("SerializeToString")
        )


def _with_network_time(kv: EncodedSampleKV, elapsed_s: float) -> EncodedSampleKV:
    """Counts as network the time that the server's stages do not account for."""
    at_server = kv.timings
    network = max(0.0, elapsed_s - at_server.queue - at_server.prefill - at_server.encode)
    kv.timings = Timings(at_server.queue, at_server.prefill, at_server.encode, network)
    return kv
