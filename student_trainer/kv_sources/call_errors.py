"""Maps a failed call at one endpoint to the errors of `kvcore.errors`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import Any

import grpc

from kvcore.errors import (
    EndpointRefusedError,
    KVDistillError,
    ProtocolError,
    TeacherRefusedError,
    TeacherUnavailableError,
)
from kvcore.printable import printable
from kvcore.types import Sample
from student_trainer.kv_sources.channel import Transport, without_address
from student_trainer.kv_sources.proxies import proxy_note

DEFAULT_PUSHBACK_S = 0.5
# Samples that an error names.
MAX_IDS_NAMED = 5

_REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
}
# Statuses about the endpoint, not about the request: another replica may serve it.
_ENDPOINT_REFUSALS = {
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
}


class BusyError(Exception):
    """The teacher's queue is full. `wait_s`: the delay before a retry that it asks for."""

    def __init__(self, wait_s: float, details: str) -> None:
        super().__init__(details)
        self.wait_s = wait_s


class UnknownMapError(Exception):
    """The server does not hold the map that the plan names."""


class CallErrors:
    """The errors of one endpoint's calls.

    Args:
        teacher: the teacher's name in the configuration.
        endpoint: host:port.
        transport: TLS and token of the calls.
        ended: whether the source was closed or its fetch cancelled; calls then fail for that reason.
        knows_map: whether the client can send the map that its plan names.
    """

    def __init__(
        self, teacher: str, endpoint: str, transport: Transport, ended: Callable[[], bool], *, knows_map: bool
    ) -> None:
        self._teacher, self._endpoint, self._transport = teacher, endpoint, transport
        self._ended, self._knows_map = ended, knows_map

    def of_status(
        self, error: Any, *, connects: bool = False
    ) -> KVDistillError | BusyError | UnknownMapError | CancelledError:
        """Maps a gRPC status to an error.

        Args:
            error: a grpc.RpcError that is also a grpc.Call.
            connects: whether this was the first call of a connection.
        """
        code, details = error.code(), without_address(printable(error.details() or "no details"))
        if self._ended():
            return self.closed()
        if code in _ENDPOINT_REFUSALS:
            return EndpointRefusedError(self._teacher, f"{self._endpoint} refused: {details}")
        if code in _REFUSALS:
            return TeacherRefusedError(self._teacher, f"{self._endpoint} refused: {details}")
        if code is grpc.StatusCode.NOT_FOUND and self._knows_map:
            return UnknownMapError(details)
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return self._exhausted(details, dict(error.trailing_metadata() or ()))
        note = proxy_note(self._endpoint) if code is grpc.StatusCode.UNAVAILABLE else ""
        if code is grpc.StatusCode.UNAVAILABLE and connects:
            note += self._transport.note(details)
        return self.unavailable(f"{code.name}: {details}{note}")

    def damage(self, error: ProtocolError, requested: Sequence[Sample] = ()) -> ProtocolError:
        """Adds the endpoint and the requested samples to the error."""
        ids = ", ".join(f"'{sample.id}'" for sample in requested[:MAX_IDS_NAMED])
        more = f" and {len(requested) - MAX_IDS_NAMED} more" if len(requested) > MAX_IDS_NAMED else ""
        request = f" (request for the samples {ids}{more})" if requested else ""
        return ProtocolError(f"teacher '{self._teacher}' at {self._endpoint}: {error}{request}")

    def unavailable(self, problem: str) -> TeacherUnavailableError:
        """The endpoint does not answer."""
        return TeacherUnavailableError(self._teacher, problem)

    def closed(self) -> CancelledError:
        """The source was closed, or its fetch was cancelled."""
        return CancelledError(f"teacher '{self._teacher}': the source was closed")

    def _exhausted(self, details: str, trailers: dict[str, Any]) -> KVDistillError | BusyError:
        pushback = trailers.get("grpc-retry-pushback-ms")
        if pushback is None and "larger than max" in details:
            return TeacherRefusedError(self._teacher, f"{self._endpoint}: a message was too large: {details}")
        try:
            wait_s = DEFAULT_PUSHBACK_S if pushback is None else int(pushback) / 1000
        except ValueError:
            wait_s = -1.0
        # In gRPC's retry design a negative or malformed pushback means: do not retry.
        return BusyError(wait_s, details) if wait_s >= 0 else self.unavailable(f"full: {details}")
