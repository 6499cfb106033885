"""Tests of the status that callers see for an error."""

from __future__ import annotations

from urllib.parse import quote

import grpc
import pytest

from kvcore.errors import FieldError
from kvcore.wire.channel_arguments import MAX_METADATA_BYTES
from teacher_server.requests.call_interceptor import status_of
from teacher_server.sample_queue import BusyError


@pytest.mark.parametrize("name", ["x" * 100_000, "字" * 50_000, "\x00" * 9000, "\udc80" * 9000])
def test_details_that_repeat_a_long_name_fit_into_the_metadata(name: str) -> None:
    status = status_of(FieldError("samples.0.id", f"'{name}' is unknown"))
    assert status.code is grpc.StatusCode.INVALID_ARGUMENT
    assert status.details.startswith("samples.0.id: '")
    assert len(quote(status.details)) < MAX_METADATA_BYTES / 2


def test_a_busy_server_tells_when_to_retry() -> None:
    status = status_of(BusyError("x" * 5000, 250))
    assert (status.code, status.trailers) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        (("grpc-retry-pushback-ms", "250"),),
    )
