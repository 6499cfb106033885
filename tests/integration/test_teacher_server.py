"""Tests of the teacher server from the client's side: real processes, real gRPC, real models."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import msgpack
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.tensors.codec import decode
from kvcore.types import EncodedSampleKV, Sample, Span
from kvcore.wire.frames import unpack_frame
from kvcore.wire.stream_reader import RefusedSample, StreamReader
from protos import kv_cache_pb2 as pb
from protos import kv_cache_pb2_grpc as pb_grpc
from tests.support.servers import (
    Outcome,
    TeacherClient,
    TeacherProcess,
    kv_request,
    refused,
    running_teacher,
    start_teacher,
    token_samples,
)
from tests.support.tiny_models import CORPUS, FAMILIES, Family, save_tiny_model, tiny_spec

RAW, INT8 = CodecSpec(name="raw"), CodecSpec(name="int8", group_size=8)
FULL = Selection(selector="full", span="all")
TEXTS = (*CORPUS, "2 x 3 = 6.", "The answer is 2. " * 6)
BUF = Path(sys.executable).with_name("buf")

NAME = "<script>alert(1)</script>"

# A teacher with 8 KiB of raw K/V per token.
WIDE = "fake:layers=4,heads=4,dim=64"


class RunningFamilies:
    """One server per model family, started together."""

    def __init__(self, root: Path) -> None:
        self.directories = {family: save_tiny_model(root / family, tiny_spec(family)) for family in FAMILIES}
        self.teachers = {
            family: start_teacher(path, root / f"{family}.log", max_batch_tokens=256)
            for family, path in self.directories.items()
        }

    def wait_ready(self) -> None:
        for teacher in self.teachers.values():
            teacher.wait_ready()

    def stop(self) -> None:
        for teacher in self.teachers.values():
            teacher.signal(signal.SIGTERM)
        for teacher in self.teachers.values():
            teacher.stop()


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFamilies]:
    running = RunningFamilies(tmp_path_factory.mktemp("families"))
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    """A server with small limits and a hostile name."""
    options = {
        "max_sample_tokens": 200,
        "max_samples_per_request": 8,
        "max_batch_tokens": 200,
        "name": NAME,
    }
    log = tmp_path_factory.mktemp("fake") / "server.log"
    with running_teacher("fake:layers=3,heads=2,dim=16", log, engine="fake", **options) as teacher:
        yield teacher


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    """A server with stream windows of 8 MiB."""
    log = tmp_path_factory.mktemp("wide") / "server.log"
    options = {"stream_window_bytes": 8 << 20, "max_batch_tokens": 1024}
    with running_teacher(WIDE, log, engine="fake", **options) as teacher:
        yield teacher


def text_samples(texts: tuple[str, ...] = TEXTS) -> list[Sample]:
    """Each text with its first third as prompt, then reasoning, then answer."""
    return [
        Sample(
            f"t{i}",
            text=text,
            spans=(
                Span("prompt", 0, len(text) // 3),
                Span("reasoning", len(text) // 3, 2 * len(text) // 3),
                Span("answer", 2 * len(text) // 3, len(text)),
            ),
        )
        for i, text in enumerate(texts)
    ]


def full_plan(client: TeacherClient, codec: CodecSpec = RAW) -> KVPlan:
    return KVPlan(layers=tuple(range(client.info.layers)), selection=FULL, codec=codec)


def kv(outcome: Outcome) -> EncodedSampleKV:
    assert isinstance(outcome, EncodedSampleKV), outcome
    return outcome


def decoded(sample: EncodedSampleKV, kind: str) -> torch.Tensor:
    """[L,H,M,D] in fp32."""
    parts = {name.removeprefix(f"{kind}."): part for name, part in sample.parts.items() if name.startswith(f"{kind}.")}
    return decode(parts, kind, sample.codec)  # type: ignore[arg-type]


class Reference:
    """A direct transformers forward pass: the values of the cache, and its keys, un-rotated in fp64."""

    def __init__(self, directory: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(directory)

    def kv(self, text: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Keys and values [L,H,T,D] and the token ids of one text, alone in its batch."""
        ids = self._tokenizer(text, return_tensors="pt").input_ids
        # A plain cache keeps every token, also those outside a sliding window.
        cache: Any = DynamicCache()
        with torch.no_grad():
            self._model(input_ids=ids, past_key_values=cache, use_cache=True)
        k = torch.stack([self._unrotated(layer.keys[0].double()) for layer in cache.layers])
        return k, torch.stack([layer.values[0].double() for layer in cache.layers]), ids[0].tolist()

    def _unrotated(self, k_HTD: torch.Tensor) -> torch.Tensor:
        rotary = self._model.model.rotary_emb
        angle_TF = torch.arange(k_HTD.shape[1]).double()[:, None] * rotary.inv_freq.double()
        angle_TD = torch.cat([angle_TF, angle_TF], dim=-1)
        first, second = k_HTD.chunk(2, dim=-1)
        turned_HTD = torch.cat([-second, first], dim=-1)
        return (k_HTD * angle_TD.cos() - turned_HTD * angle_TD.sin()) / rotary.attention_scaling


@pytest.mark.parametrize("family", FAMILIES)
def test_describe_returns_identity_geometry_and_limits(families: RunningFamilies, family: Family) -> None:
    teacher = families.teachers[family]
    with TeacherClient(teacher.endpoint) as client:
        info = client.info
    assert (info.layers, info.kv_heads, info.head_dim) == (3, 2, 16)
    assert info.engine == "hf"
    assert info.dtype == "fp32"
    assert info.max_samples_per_request == 256
    assert set(info.codecs) == {"raw", "bf16", "int8", "int6", "int4", "pca"}
    assert teacher.info()["teacher"]["weights_digest"] == info.weights_digest


@pytest.mark.parametrize("family", FAMILIES)
def test_served_kv_equals_a_direct_forward(families: RunningFamilies, family: Family) -> None:
    reference = Reference(families.directories[family])
    with TeacherClient(families.teachers[family].endpoint) as client:
        samples = text_samples()
        raw = [kv(outcome) for outcome in client.fetch(full_plan(client), samples)]
        int8 = [kv(outcome) for outcome in client.fetch(full_plan(client, INT8), samples)]
    for sample, exact, packed in zip(samples, raw, int8, strict=True):
        assert sample.text is not None
        k, v, token_ids = reference.kv(sample.text)
        assert exact.token_ids_T.tolist() == token_ids
        kept = exact.positions[0, 0].long()
        assert kept.tolist() == [t for t, end in enumerate(exact.byte_ends_T.tolist()) if end >= 0]
        for kind, wanted in (("k", k[:, :, kept]), ("v", v[:, :, kept])):
            assert torch.allclose(decoded(exact, kind).double(), wanted, rtol=1e-5, atol=1e-5)
            error_L = (decoded(packed, kind).double() - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
            stated_L = torch.tensor(packed.relative_error[kind], dtype=torch.float64)
            assert torch.allclose(error_L, stated_L, rtol=0.01, atol=1e-5)
            assert float(stated_L.max()) < 0.02


def test_concurrent_requests_with_different_plans_get_their_own_answers(families: RunningFamilies) -> None:
    endpoint = families.teachers["qwen2"].endpoint
    plans = [
        KVPlan(layers=(0, 1, 2), selection=FULL, codec=RAW),
        KVPlan(layers=(2,), selection=FULL, codec=RAW),
        KVPlan(layers=(0, 2), selection=Selection(selector="r_kv", budget=3), codec=RAW),
        KVPlan(layers=(1,), selection=Selection(selector="uniform", budget=2, scope="head"), codec=RAW),
        KVPlan(layers=(0, 1), selection=Selection(selector="right", budget=4, scope="layer"), codec=RAW),
    ]
    samples = text_samples()
    with TeacherClient(endpoint) as client:
        alone = {plan: [kv(client.fetch(plan, [sample])[0]) for sample in samples] for plan in plans}
    turns = [(plan, samples[turn:] + samples[:turn]) for turn in range(3) for plan in plans]

    def ask(turn: tuple[KVPlan, list[Sample]]) -> list[Outcome]:
        with TeacherClient(endpoint) as client:
            return client.fetch(*turn)

    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(ask, turns))
    for (plan, asked), outcomes in zip(turns, answers, strict=True):
        for sample, outcome in zip(asked, outcomes, strict=True):
            wanted, got = alone[plan][samples.index(sample)], kv(outcome)
            assert torch.equal(got.positions, wanted.positions)
            assert got.parts.keys() == wanted.parts.keys()
            for name, part in wanted.parts.items():
                assert torch.allclose(got.parts[name], part, rtol=1e-5, atol=1e-5)


def test_a_plain_protobuf_client_decodes_the_same_frames(fake: TeacherProcess) -> None:
    plan, samples = KVPlan(layers=(0, 2), selection=FULL, codec=RAW), token_samples(3, 9)
    with TeacherClient(fake.endpoint) as client, grpc.insecure_channel(fake.endpoint) as channel:
        ours = list(client.call(plan, samples, "same"))
        theirs = list(pb_grpc.TeacherKVStub(channel).StreamKV(kv_request(plan, samples, "same"), timeout=30))
        wanted = client.fetch(plan, samples)
        reader = StreamReader("same", plan, samples, client.info)
        again = dict(outcome for frame in theirs for outcome in reader.feed(frame.SerializeToString()))
    assert all(isinstance(frame, pb.KVFrame) for frame in theirs)
    headers: list[Any] = [msgpack.unpackb(frame.header) for frame in theirs]
    assert [header["seq"] for header in headers] == list(range(len(theirs)))
    assert {header["request"] for header in headers} == {"same"}
    assert b"".join(frame.body for frame in theirs) == b"".join(bytes(unpack_frame(frame)[1]) for frame in ours)
    for index, outcome in enumerate(wanted):
        assert torch.equal(decoded(kv(again[index]), "k"), decoded(kv(outcome), "k"))


def test_records_follow_the_protocols_order(fake: TeacherProcess) -> None:
    plan, samples = KVPlan(layers=(0, 1, 2), selection=FULL, codec=RAW), token_samples(2, 9)
    with TeacherClient(fake.endpoint) as client:
        frames = [unpack_frame(frame)[0] for frame in client.call(plan, samples)]
    records = [record for header in frames for record in header["records"]]
    assert [record["kind"] for record in records[:2]] == ["sample", "sample"]
    assert [record["layer"] for record in records if record["kind"] == "layer"] == [0, 1, 2]
    assert [record["kind"] for record in records[-3:]] == ["sample_end", "sample_end", "end"]


REFUSED: dict[str, tuple[Callable[[pb.KVRequest], object], str]] = {
    "layer beyond the last": (lambda request: request.plan.layers.append(3), "plan.layers"),
    "layers not ascending": (lambda request: request.plan.layers.insert(0, 1), "plan.layers"),
    "unknown selector": (
        lambda request: setattr(request.plan.selection, "selector", "psychic"),
        "plan.selection.selector",
    ),
    "budget of full": (lambda request: setattr(request.plan.selection, "budget", 5), "plan.selection.budget"),
    "unknown codec": (lambda request: setattr(request.plan.codec, "name", "zip"), "plan.codec.name"),
    "negative error": (
        lambda request: setattr(request.plan.codec, "max_relative_error", -1.0),
        "plan.codec.max_relative_error",
    ),
    "no samples": (lambda request: request.ClearField("samples"), "samples"),
    "too many samples": (lambda request: request.samples.extend([request.samples[0]] * 8), "samples"),
    "an id twice": (lambda request: request.samples.append(request.samples[0]), "samples.1.id"),
    "no id": (lambda request: setattr(request.samples[0], "id", ""), "samples.0.id"),
    "long id": (lambda request: setattr(request.samples[0], "id", "x" * 300), "samples.0.id"),
    "empty text": (lambda request: setattr(request.samples[0], "text", ""), "samples.0.text"),
    "span outside": (
        lambda request: request.samples[0].spans.add(kind=pb.SPAN_KIND_REASONING, start=0, end=99),
        "samples.0.spans.0.end",
    ),
    "long request id": (lambda request: setattr(request, "request_id", "x" * 300), "request_id"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_invalid_request_is_refused_by_field(fake: TeacherProcess, case: str) -> None:
    change, field = REFUSED[case]
    request = kv_request(KVPlan(layers=(0, 1), selection=FULL, codec=RAW), [Sample("a", text="abc")])
    change(request)
    with grpc.insecure_channel(fake.endpoint) as channel:
        refusal = refused(lambda: list(pb_grpc.TeacherKVStub(channel).StreamKV(request, timeout=30)))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.details.startswith(f"{field}: ")


def test_an_invalid_sample_fails_alone(fake: TeacherProcess) -> None:
    plan = KVPlan(layers=(0,), selection=Selection(selector="right", budget=2, span="reasoning"), codec=RAW)
    good = Sample("good", text="abcdef", spans=(Span("reasoning", 2, 6),))
    long = Sample("long", text="a" * 500, spans=(Span("reasoning", 0, 500),))
    bare = Sample("bare", text="abcdef")
    unknown = Sample("unknown", token_ids=(1, 99_999), spans=(Span("reasoning", 0, 2),))
    with TeacherClient(fake.endpoint) as client:
        answers = client.fetch(plan, [long, good, bare, unknown])
        nothing_left = client.fetch(plan, [long, bare])
    assert kv(answers[1]).positions.tolist() == [[[5, 6]]]
    for index, hint in ((0, "200"), (2, "reasoning"), (3, "99999")):
        failure = answers[index]
        assert isinstance(failure, RefusedSample)
        assert failure.code == "INVALID_ARGUMENT"
        assert hint in failure.message
    assert all(isinstance(outcome, RefusedSample) for outcome in nothing_left)


def test_a_sample_over_its_error_budget_fails_alone(families: RunningFamilies) -> None:
    with TeacherClient(families.teachers["llama"].endpoint) as client:
        plan = full_plan(client, INT8)
        samples = text_samples()
        errors = [max(*kv(o).relative_error["k"], *kv(o).relative_error["v"]) for o in client.fetch(plan, samples)]
        limit = sorted(errors)[len(errors) // 2]
        strict = plan.model_copy(update={"codec": CodecSpec(name="int8", group_size=8, max_relative_error=limit)})
        answers = client.fetch(strict, samples)
    assert [isinstance(answer, RefusedSample) for answer in answers] == [error > limit for error in errors]
    failure = next(answer for answer in answers if isinstance(answer, RefusedSample))
    assert failure.code == "FAILED_PRECONDITION"
    assert "max_relative_error" in failure.message


def test_a_slow_reader_does_not_grow_memory_or_block_others(wide: TeacherProcess) -> None:
    with TeacherClient(wide.endpoint) as slow, TeacherClient(wide.endpoint) as quick:
        plan = full_plan(slow)
        quick.fetch(plan, token_samples(8, 512, "w"))
        before = wide.memory_mb()
        samples = token_samples(64, 512)
        stalled = slow.call(plan, samples, "stalled", timeout=120)
        frames = [next(stalled)]
        # Other clients are served while this stream waits. Their answers would increase the server's memory too.
        for turn in range(4):
            assert len(quick.fetch(plan, token_samples(4, 512, f"q{turn}-"))) == 4
        load = wide.info()["load"]
        assert load["open_streams"] == 1
        assert wide.memory_mb() - before < 64  # the answer has 256 MiB
        frames += stalled
        reader = StreamReader("stalled", plan, samples, slow.info)
        assert sum(len(reader.feed(frame)) for frame in frames) == len(samples)
        reader.finish()


def test_buf_lists_the_service_by_reflection_and_describes(fake: TeacherProcess) -> None:
    def curl(*arguments: str) -> str:
        command = [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    methods = curl("--list-methods", f"http://{fake.endpoint}").split()
    assert {"kvcache.v1.TeacherKV/Describe", "kvcache.v1.TeacherKV/StreamKV", "grpc.health.v1.Health/Check"} <= set(
        methods
    )
    described = json.loads(curl(f"http://{fake.endpoint}/kvcache.v1.TeacherKV/Describe"))
    assert described["layers"] == 3
    assert described["limits"]["maxSampleTokens"] == 200


def test_http_serves_probes_metrics_and_an_escaped_page(fake: TeacherProcess) -> None:
    with TeacherClient(fake.endpoint) as client:
        client.fetch(KVPlan(layers=(0, 1), selection=FULL, codec=INT8), token_samples(5, 10))
    assert fake.get("/healthz").status_code == 200
    assert fake.get("/readyz").text == "ready\n"
    metrics = fake.get("/metrics").text
    call = fake.events("call")[-1]
    assert (call["code"], call["samples"], call["tokens"], call["failed_samples"]) == ("OK", 5, 50, 0)
    assert f'kvdistill_sent_bytes_total{{codec="int8"}} {float(call["sent_bytes"])}' in metrics
    assert 'kvdistill_requests_total{code="OK",method="StreamKV"}' in metrics
    assert "kvdistill_batch_samples_bucket" in metrics
    page = fake.get("/").text
    assert page.count("<script") == 4, "the data of the charts and three scripts"
    assert "&lt;script&gt;" in page
    assert "http://" not in page
