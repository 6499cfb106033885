"""Tests of the Prometheus metrics of a server that has answered and refused calls."""

from __future__ import annotations

from pathlib import Path

import grpc
from prometheus_client.parser import text_string_to_metric_families

from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.types import EncodedSampleKV
from tests.support.servers import TeacherClient, refused, running_teacher, token_samples
from tests.support.tiny_models import save_tiny_model, tiny_spec

ALL = Selection(selector="full", span="all")
NAME = 'a "quoted" name'


def test_metrics_count_calls_samples_tokens_bytes_and_times(tmp_path: Path) -> None:
    flags = {"engine": "fake", "name": NAME, "max_streams": 7, "max_queued_tokens": 5000}
    with running_teacher("fake:layers=3,heads=2,dim=16", tmp_path / "log", **flags) as server:
        with TeacherClient(server.endpoint) as client:
            client.fetch(KVPlan(layers=(0, 1), selection=ALL, codec=CodecSpec(name="int8")), token_samples(5, 10))
            wrong = KVPlan(layers=(99,), selection=ALL)
            assert (
                refused(lambda: list(client.call(wrong, token_samples(1, 4)))).code is grpc.StatusCode.INVALID_ARGUMENT
            )
        text = server.get("/metrics").text
        sent = server.events("call")[-2]["sent_bytes"]
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    # The self-test is one sample in one batch, and is not a call.
    expected = {
        ("kvdistill_requests_total", "Describe", "OK"): 1,
        ("kvdistill_requests_total", "OK", "StreamKV"): 1,
        ("kvdistill_requests_total", "INVALID_ARGUMENT", "StreamKV"): 1,
        ("kvdistill_request_tokens_total", "OK", "StreamKV"): 50,
        ("kvdistill_samples_total", "ok"): 6,
        ("kvdistill_sent_bytes_total", "int8"): sent,
        ("kvdistill_request_seconds_count", "StreamKV"): 1,
        ("kvdistill_first_frame_seconds_count", "StreamKV"): 1,
        ("kvdistill_queue_wait_seconds_count",): 6,
        ("kvdistill_ready",): 1,
        ("kvdistill_open_streams",): 0,
        ("kvdistill_open_streams_limit",): 7,
        ("kvdistill_queued_tokens",): 0,
        ("kvdistill_queued_tokens_limit",): 5000,
        ("kvdistill_engine_errors_total",): 0,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["kvdistill_batch_samples_sum",] == 6
    assert found["kvdistill_prefill_seconds_total",] > 0
    teacher = [key for key in found if key[0] == "kvdistill_teacher_info"]
    assert len(teacher) == 1
    assert {NAME, "fake", "fp32"} < set(teacher[0])


def test_padding_is_counted_and_samples_of_similar_length_share_a_batch(tmp_path: Path) -> None:
    lengths = (100, 40, 98, 41)
    samples = [token_samples(1, tokens, prefix=f"{tokens}-")[0] for tokens in lengths]
    model = save_tiny_model(tmp_path / "model", tiny_spec("llama"))
    with running_teacher(model, tmp_path / "log") as server, TeacherClient(server.endpoint) as client:
        outcomes = client.fetch(KVPlan(layers=(0, 2), selection=ALL, codec=CodecSpec(name="raw")), samples)
        text = server.get("/metrics").text
    found = {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
    assert found["kvdistill_padding_tokens_total"] == (100 - 98) + (41 - 40)
    assert found["kvdistill_batch_samples_count"] == 1 + 2  # the self-test and two batches
    # Results keep the order of the request.
    assert [len(outcome.token_ids_T) for outcome in outcomes if isinstance(outcome, EncodedSampleKV)] == list(lengths)
