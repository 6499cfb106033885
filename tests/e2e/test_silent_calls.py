"""Tests of calls in which the teacher sends nothing for 30 s, as in a long prefill or queue."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from kvcore.plan import KVPlan, Selection
from kvcore.types import EncodedSampleKV
from student_trainer.kv_sources.remote import RemoteSource
from tests.support import kv_fakes
from tests.support.scripted_teacher import ScriptedTeacher
from tests.support.servers import kv_request, running_teacher, token_samples

pytestmark = pytest.mark.slow

SILENCE_SECONDS = 30
PLAN = KVPlan(layers=(0,), selection=Selection(span="all"))


@pytest.mark.nightly
def test_the_server_accepts_client_pings_during_a_silent_call(tmp_path: Path) -> None:
    pinging = [("grpc.keepalive_time_ms", 5000), ("grpc.http2.max_pings_without_data", 0)]
    # The self-test takes 7 s, this sample 30 s.
    with (
        running_teacher("fake:layers=1,delay_ms=100", tmp_path / "log", engine="fake") as teacher,
        grpc.insecure_channel(teacher.endpoint, options=pinging) as channel,
    ):
        stream = channel.unary_stream("/kvcache.v1.TeacherKV/StreamKV")
        request = kv_request(PLAN, token_samples(1, 10 * SILENCE_SECONDS)).SerializeToString()
        assert list(stream(request, timeout=4 * SILENCE_SECONDS))


def test_client_pings_respect_grpc_default_limits_of_a_server() -> None:
    teacher, over = ScriptedTeacher(), threading.Event()

    # After the first frame, gRPC's core measures the bandwidth with a ping, which counts too.
    def be_silent_after_the_first_frame(frames: int, _context: grpc.ServicerContext) -> None:
        if frames == 1:
            over.wait(SILENCE_SECONDS)

    teacher.script = be_silent_after_the_first_frame
    try:
        timeout_s = 1.2 * SILENCE_SECONDS
        with closing(RemoteSource("a", teacher.endpoint, lambda _info: kv_fakes.PLAN, timeout_s)) as source:
            source.connect()
            answers = source.fetch(kv_fakes.samples(2))
        assert all(isinstance(answer, EncodedSampleKV) for answer in answers)
        assert source.retries == 0
    finally:
        over.set()
        teacher.stop()
