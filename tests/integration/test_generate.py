"""Tests of the Generate call over real gRPC, with a real model and with engines that the test controls."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import grpc
import msgpack
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.records import load_records
from kvcore.errors import TeacherRefusedError
from kvcore.plan import CodecSpec, KVPlan, SamplingParams, Selection
from kvcore.types import EncodedSampleKV, MissingKV, Sample, Span
from kvcore.wire import messages
from protos import kv_cache_pb2 as pb
from protos import kv_cache_pb2_grpc as pb_grpc
from student_trainer.kv_sources.completions import CompletedSample, CompletionSource
from teacher_server.config import ServeConfig
from teacher_server.engines import load_engine
from teacher_server.engines.base import GeneratedText, SampleFailure, TokenizedSample, Wanted
from teacher_server.engines.fake import FakeEngine, FakeFaults, FakeModel
from tests.support.server_in_thread import CONFIG, ServerInThread
from tests.support.servers import TeacherClient, refused, wait_until
from tests.support.tiny_models import save_tiny_model, tiny_spec

BUF = Path(sys.executable).with_name("buf")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "teachers.md"
PROMPTS = tuple(
    Sample(f"p{index}", text=text)
    for index, text in enumerate(("The start is 3. Add 4. ", "Größe? 思考", "1", "Then multiply by 2, all modulo 7. "))
)
GREEDY = SamplingParams(max_new_tokens=30)
DRAWN = SamplingParams(max_new_tokens=30, temperature=1.0, top_p=0.95, seed=7)
SELECTION = Selection(selector="right", budget=6, span="reasoning", scope="head")
IDLE = {"open_streams": 0, "queued_samples": 0, "queued_tokens": 0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"), tiny_spec("llama", layers=2))


@pytest.fixture(scope="module")
def teacher(directory: Path) -> Iterator[ServerInThread]:
    """A Llama whose batches hold two or three of the prompts."""
    config = ServeConfig(model=str(directory), device="cpu", dtype="fp32", max_sample_tokens=120, max_batch_tokens=150)
    server = ServerInThread(load_engine, config)
    server.wait_ready()
    yield server
    server.stop()


@pytest.fixture
def start() -> Iterator[Callable[..., ServerInThread]]:
    servers: list[ServerInThread] = []

    def start_one(*arguments: Any) -> ServerInThread:
        servers.append(ServerInThread(*arguments))
        servers[-1].wait_ready()
        return servers[-1]

    yield start_one
    for server in servers:
        server.stop()


def plan_of(selection: Selection = SELECTION) -> KVPlan:
    return KVPlan(layers=(0, 1), selection=selection, codec=CodecSpec(name="raw"))


def write(
    server: ServerInThread,
    sampling: SamplingParams,
    prompts: Sequence[Sample] = PROMPTS,
    selection: Selection = SELECTION,
) -> list[CompletedSample]:
    with closing(CompletionSource("teacher", server.endpoint, lambda _info: plan_of(selection), sampling)) as writer:
        writer.connect()
        return writer.complete(prompts)


def texts(written: Sequence[CompletedSample]) -> list[str]:
    """The generated texts without the prompts."""
    found: list[str] = []
    for prompt, one in zip(PROMPTS, written, strict=True):
        assert one.completion is not None
        assert one.completion.sample.text is not None
        assert prompt.text is not None
        found.append(one.completion.sample.text.removeprefix(prompt.text))
    return found


def kv(one: CompletedSample) -> EncodedSampleKV:
    assert isinstance(one.kv, EncodedSampleKV), one.kv
    return one.kv


def assert_kv_of_its_text(
    server: ServerInThread, written: Sequence[CompletedSample], plan: KVPlan, atol: float = 0.0
) -> None:
    """Compare with StreamKV on the same text and spans alone: bit for bit, unless a tolerance is given."""
    samples = [one.completion.sample for one in written if one.completion is not None]
    with TeacherClient(server.endpoint) as client:
        read = [client.fetch(plan, [sample])[0] for sample in samples]
    for one, expected in zip(written, read, strict=True):
        assert isinstance(expected, EncodedSampleKV)
        got = kv(one)
        assert (got.key, got.sample_id) == (expected.key, expected.sample_id)
        assert torch.equal(got.positions, expected.positions)
        assert torch.equal(got.token_ids_T, expected.token_ids_T)
        assert torch.equal(got.byte_ends_T, expected.byte_ends_T)
        assert got.parts.keys() == expected.parts.keys()
        for name, part in got.parts.items():
            torch.testing.assert_close(part, expected.parts[name], rtol=0, atol=atol)


def request_of(**changes: Any) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        request_id="r",
        plan=messages.plan_to_proto(plan_of()),
        samples=[messages.sample_to_proto(sample) for sample in PROMPTS[:2]],
        sampling=messages.sampling_to_proto(GREEDY),
    )
    for path, value in changes.items():
        *parents, last = path.split("__")
        target: Any = request
        for name in parents:
            target = getattr(target, name)
        setattr(target, last, value)
    return request


# ------------------------------------------------------------------------------------------------------ a real model


def test_greedy_texts_match_the_model_and_their_kv_match_stream_kv(teacher: ServerInThread, directory: Path) -> None:
    written = write(teacher, GREEDY)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    for prompt, text in zip(PROMPTS, texts(written), strict=True):
        inputs = tokenizer(prompt.text, return_tensors="pt")
        ids_1T = model.generate(**inputs, max_new_tokens=GREEDY.max_new_tokens, do_sample=False)
        expected = tokenizer.decode(ids_1T[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        assert text == expected.rstrip("\ufffd")
    alone = [one for prompt in PROMPTS for one in write(teacher, GREEDY, [prompt])]
    assert texts(alone) == texts(written)
    assert_kv_of_its_text(teacher, alone, plan_of())
    # Padding in a batch may change the last bits.
    assert_kv_of_its_text(teacher, written, plan_of(), atol=1e-5)
    for prompt, one in zip(PROMPTS, written, strict=True):
        assert one.completion is not None
        assert prompt.text is not None
        end, whole = len(prompt.text), len(one.completion.sample.text or "")
        assert one.completion.sample.spans == (Span("prompt", 0, end), Span("reasoning", end, whole))
        assert (one.completion.finish_reason, one.completion.tokens) == ("length", GREEDY.max_new_tokens)


def test_sampled_texts_depend_only_on_seed_and_prompt(teacher: ServerInThread) -> None:
    drawn = texts(write(teacher, DRAWN))
    assert texts(write(teacher, DRAWN, PROMPTS[::-1])[::-1]) == drawn
    others = texts(write(teacher, DRAWN.model_copy(update={"seed": 8})))
    assert all(one != other for one, other in zip(drawn, others, strict=True))
    assert drawn != texts(write(teacher, GREEDY))


def test_r_kv_uses_the_answer_between_the_marker_and_the_stop_text(teacher: ServerInThread) -> None:
    plain = texts(write(teacher, GREEDY))[0]
    marker, stop = plain[8], plain[plain.index(plain[8]) + 4 :][:2]
    sampling = GREEDY.model_copy(update={"answer_marker": marker, "stop": (stop,)})
    selection = Selection(selector="r_kv", budget=4, span="reasoning", scope="layer")
    (one,) = write(teacher, sampling, PROMPTS[:1], selection)
    assert one.completion is not None
    sample = one.completion.sample
    assert sample.text is not None
    found = {span.kind: sample.text[span.start : span.end] for span in sample.spans}
    before, _, after = plain[: plain.index(stop)].partition(marker)
    assert found == {"prompt": PROMPTS[0].text, "reasoning": before + marker, "answer": after}
    assert one.completion.finish_reason == "stop"
    assert_kv_of_its_text(teacher, [one], plan_of(selection))


def test_a_prompt_that_is_too_long_or_gets_no_answer_fails_alone(teacher: ServerInThread) -> None:
    plain = texts(write(teacher, GREEDY))
    marker = next(character for character in plain[0][4:-4] if character not in "".join(plain[1:3]))
    sampling = GREEDY.model_copy(update={"answer_marker": marker})
    prompts = (PROMPTS[0], Sample("long", text="1 2 3 4 5 6 7 8 9 " * 6), PROMPTS[1], PROMPTS[2])
    first, long, second, third = write(teacher, sampling, prompts, Selection(selector="full", span="answer"))
    assert kv(first).slots > 0
    assert isinstance(long.kv, MissingKV)
    assert long.completion is None
    assert long.kv.reason.startswith("INVALID_ARGUMENT: samples[long].text: has ")
    assert "up to 30 are generated (sampling.max_new_tokens); together this teacher takes at most 120" in long.kv.reason
    for one, text in ((second, plain[1]), (third, plain[2])):
        assert isinstance(one.kv, MissingKV)
        assert one.kv.reason.startswith("FAILED_PRECONDITION: ")
        assert "no token lies in the span 'answer'" in one.kv.reason
        assert (
            f"generated 30 tokens (finish_reason: length), with no answer after the marker {marker!r}" in one.kv.reason
        )
        # The completion is sent although its K/V failed.
        assert one.completion is not None
        assert (one.completion.sample.text or "").endswith(text)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"sampling__max_new_tokens": 0},
            "sampling.max_new_tokens: Input should be greater than or equal to 1",
        ),
        ({"sampling__max_new_tokens": 120}, "sampling.max_new_tokens: got 120; a sample of this teacher"),
        ({"sampling__temperature": -1.0}, "sampling.temperature: "),
        ({"sampling__top_p": 2.0}, "sampling.top_p: "),
        ({"sampling__seed": 2**63}, "sampling.seed: "),
        ({"plan__selection__selector": "r_kv"}, "sampling.answer_marker: is empty"),
        ({"plan__selection__span": pb.SPAN_KIND_ANSWER}, "sampling.answer_marker: is empty"),
        ({"plan__selection__selector": "best"}, "plan.selection.selector: "),
    ],
)
def test_invalid_sampling_is_refused_by_field(teacher: ServerInThread, changes: dict[str, Any], problem: str) -> None:
    with grpc.insecure_channel(teacher.endpoint) as channel:
        refusal = refused(lambda: list(pb_grpc.TeacherKVStub(channel).Generate(request_of(**changes), timeout=30)))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.details.startswith(problem)


@pytest.mark.parametrize(
    ("sample", "problem"),
    [
        (Sample("x", token_ids=(1, 2)), "samples.0.token_ids: a prompt to generate from must be text"),
        (
            Sample("x", text="abc", spans=(Span("prompt", 0, 1), Span("reasoning", 1, 3))),
            "samples.0.spans.1.kind: must be prompt (got reasoning)",
        ),
    ],
)
def test_an_invalid_prompt_is_refused_by_field(teacher: ServerInThread, sample: Sample, problem: str) -> None:
    with pytest.raises(TeacherRefusedError, match="refused: " + problem.replace("(", r"\(").replace(")", r"\)")):
        write(teacher, GREEDY, [sample])


def test_a_plain_protobuf_client_gets_the_text_from_the_frames(teacher: ServerInThread) -> None:
    request = json.dumps(
        {
            "plan": {
                "layers": [0],
                "selection": {"selector": "full", "span": "SPAN_KIND_ALL", "scope": "SCOPE_SAMPLE"},
                "codec": {"name": "bf16"},
            },
            "samples": [{"id": "p0", "text": PROMPTS[0].text}],
            "sampling": {"maxNewTokens": 30},
        }
    )
    command = [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", request]
    url = f"http://{teacher.endpoint}/kvcache.v1.TeacherKV/Generate"
    answer = subprocess.run([*command, url], capture_output=True, text=True, check=True, timeout=60).stdout
    frames: list[dict[str, str]] = json.loads("[" + answer.replace("}\n{", "},{") + "]")
    headers: list[Any] = [msgpack.unpackb(base64.b64decode(frame["header"])) for frame in frames]
    records = [record for header in headers for record in header["records"]]
    assert [record["kind"] for record in records] == ["written", "sample", "layer", "sample_end", "end"]
    text = base64.b64decode(frames[0]["body"])[: records[0]["bytes"]].decode()
    assert text == texts(write(teacher, GREEDY))[0]


def test_generated_tokens_are_counted_and_logged(teacher: ServerInThread) -> None:
    def counted(name: str) -> float:
        lines = teacher.get("/metrics").text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(name)))

    before = counted("kvdistill_written_tokens_total")
    write(teacher, GREEDY)
    assert counted("kvdistill_written_tokens_total") - before == len(PROMPTS) * GREEDY.max_new_tokens
    assert counted("kvdistill_writing_seconds_total") > 0
    assert counted('kvdistill_requests_total{code="OK",method="Generate"}') > 0
    assert teacher.get("/info").json()["load"] == IDLE


# ------------------------------------------------------------------------------------------- controlled engines


class WaitingEngine(FakeEngine):
    """Generates when its gate opens, or when the prompt is no longer wanted."""

    def __init__(self, config: ServeConfig) -> None:
        super().__init__(config, FakeModel(layers=2))
        self.gate, self.writes = threading.Event(), threading.Event()

    def generate(
        self, prompts: Sequence[TokenizedSample], sampling: SamplingParams, wanted: Wanted
    ) -> list[GeneratedText | SampleFailure]:
        self.writes.set()
        while not self.gate.is_set() and any(wanted(row) for row in range(len(prompts))):
            time.sleep(0.005)
        self.writes.clear()
        return super().generate(prompts, sampling, wanted)


def start_waiting(start: Callable[..., ServerInThread], **limits: Any) -> tuple[ServerInThread, WaitingEngine]:
    config = CONFIG.model_copy(update=limits)
    engine = WaitingEngine(config)
    return start(lambda _config: engine, config), engine


def test_cancelling_frees_the_engine_and_the_slot(start: Callable[..., ServerInThread]) -> None:
    server, engine = start_waiting(start, max_streams=1)
    with grpc.insecure_channel(server.endpoint) as channel:
        stub = pb_grpc.TeacherKVStub(channel)
        call = cast("Any", stub.Generate(request_of(), timeout=60))
        assert engine.writes.wait(20)
        refusal = refused(lambda: list(stub.Generate(request_of(), timeout=60)))
        assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "max_streams" in refusal.details
        call.cancel()
        wait_until(lambda: server.get("/info").json()["load"] == IDLE)
        # The engine has stopped too: it serves the next caller.
        with TeacherClient(server.endpoint) as client:
            assert isinstance(client.fetch(plan_of(Selection(span="all")), PROMPTS[:1])[0], EncodedSampleKV)
        assert not engine.writes.is_set()


def test_a_deadline_ends_generation(start: Callable[..., ServerInThread]) -> None:
    server, engine = start_waiting(start)
    with grpc.insecure_channel(server.endpoint) as channel:
        stub = pb_grpc.TeacherKVStub(channel)
        refusal = refused(lambda: list(stub.Generate(request_of(), timeout=0.5)))
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: server.get("/info").json()["load"] == IDLE and not engine.writes.is_set())


def test_max_request_seconds_limits_generation(start: Callable[..., ServerInThread]) -> None:
    server, _engine = start_waiting(start, max_request_seconds=0.3)
    with grpc.insecure_channel(server.endpoint) as channel:
        stub = pb_grpc.TeacherKVStub(channel)
        refusal = refused(lambda: list(stub.Generate(request_of(), timeout=60)))
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "max_request_seconds" in refusal.details


def test_a_full_queue_counts_max_new_tokens_and_returns_a_retry_time(start: Callable[..., ServerInThread]) -> None:
    server, engine = start_waiting(start, max_queued_tokens=100)
    with ThreadPoolExecutor(1) as pool, grpc.insecure_channel(server.endpoint) as channel:
        first = pool.submit(write, server, SamplingParams(max_new_tokens=60), PROMPTS[:1])
        assert engine.writes.wait(20)
        stub = pb_grpc.TeacherKVStub(channel)
        refusal = refused(lambda: list(stub.Generate(request_of(), timeout=60)))
        engine.gate.set()
        assert isinstance(first.result(30)[0].kv, EncodedSampleKV)
    assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "the limit is 100" in refusal.details
    assert refusal.pushback_ms is not None


def test_draining_finishes_generation_and_its_kv(start: Callable[..., ServerInThread]) -> None:
    server, engine = start_waiting(start, drain_seconds=20.0)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(write, server, GREEDY)
        assert engine.writes.wait(20)
        server.request_stop()
        wait_until(lambda: server.get("/readyz").status_code == 503)
        engine.gate.set()
        assert all(isinstance(one.kv, EncodedSampleKV) for one in first.result(30))
    assert server.ended.result(20)


def test_an_engine_error_during_generation_fails_only_its_batch(start: Callable[..., ServerInThread]) -> None:
    faults = FakeFaults(fail=frozenset({"p1"}), not_finite=frozenset({"p2"}))
    server = start(lambda config: FakeEngine(config, FakeModel(layers=2), faults))
    one, broken, unwritten, other = write(server, GREEDY)
    # The client requested the other sample of the failed batch again.
    assert kv(one).slots == kv(other).slots == 6
    assert isinstance(broken.kv, MissingKV)
    assert broken.kv.reason.startswith("INTERNAL: the engine failed on this sample's batch")
    assert isinstance(unwritten.kv, MissingKV)
    assert unwritten.kv.reason == "FAILED_PRECONDITION: injected fault: no text"
    assert server.get("/readyz").status_code == 200


def test_concurrent_generate_and_stream_kv_do_not_mix(start: Callable[..., ServerInThread]) -> None:
    server = start(lambda config: FakeEngine(config, FakeModel(layers=2)))
    alone, plan = write(server, GREEDY), plan_of()
    samples = [one.completion.sample for one in alone if one.completion is not None]

    def read() -> list[Any]:
        with TeacherClient(server.endpoint) as client:
            return [client.fetch(plan, samples) for _ in range(5)]

    with ThreadPoolExecutor(6) as pool:
        reading = [pool.submit(read) for _ in range(2)]
        writing = [pool.submit(write, server, sampling) for sampling in (GREEDY, DRAWN, GREEDY, DRAWN)]
        read_kv = [kv for future in reading for kv in future.result(60)]
        greedy, drawn, greedy_again, drawn_again = (future.result(60) for future in writing)
    assert texts(greedy) == texts(greedy_again) == texts(alone)
    assert texts(drawn) == texts(drawn_again) != texts(greedy)
    for outcomes in (*read_kv, list(map(kv, greedy)), list(map(kv, greedy_again))):
        for outcome, expected in zip(outcomes, alone, strict=True):
            assert outcome.key == kv(expected).key
            assert all(torch.equal(part, kv(expected).parts[name]) for name, part in outcome.parts.items())


def test_the_documented_example_writes_training_records(
    start: Callable[..., ServerInThread], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"max_sample_tokens": 1000})
    server = start(lambda config: FakeEngine(config, FakeModel(layers=2)), config)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert example.count("127.0.0.1:50051") == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(example.replace("127.0.0.1:50051", server.endpoint), PAGE, "exec"), {})
    records = load_records(tmp_path / "written.jsonl")
    assert [record.id for record in records] == ["q1", "q2"]
    for record in records:
        assert record.prompt.endswith("\nA:")
        assert record.reasoning.endswith("Answer:")
        assert int(record.answer) > 0
