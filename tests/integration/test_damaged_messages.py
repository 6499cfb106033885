"""Tests of bit flips in transit: a call raises an error or returns exactly the requested K/V, never wrong K/V."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from kvcore.errors import ProtocolError, TeacherRefusedError, TeacherUnavailableError
from kvcore.plan import CodecSpec, KVPlan, SamplingParams, Selection
from kvcore.store.kv_store import KVStoreReader
from kvcore.types import EncodedSampleKV, Sample, Span
from protos import kv_cache_pb2 as pb
from student_trainer.kv_sources import retry_budget
from student_trainer.kv_sources.completions import CompletedSample, CompletionSource
from student_trainer.kv_sources.record import Record
from student_trainer.kv_sources.remote import RemoteSource
from teacher_server.engines import load_engine
from tests.support.damaging_proxy import DamagingProxy, flip, unchanged
from tests.support.kv_fakes import same_result
from tests.support.server_in_thread import ServerInThread

pytestmark = pytest.mark.slow

TEXT = "Tom has 3 apples. He buys 4 more: 3 + 4 = 7. The answer is 7."
SPANS = (Span("prompt", 0, 18), Span("reasoning", 18, 45), Span("answer", 45, 61))
SAMPLES = (
    Sample("text", text=TEXT, spans=SPANS),
    Sample("ids", token_ids=tuple(range(40, 70)), spans=(Span("reasoning", 5, 20), Span("answer", 20, 30))),
)
PLAN = KVPlan(
    layers=(0, 1),
    selection=Selection(selector="r_kv", budget=6, scope="head"),
    codec=CodecSpec(name="int8", max_relative_error=0.5),
)
PROMPTS = (Sample("p0", text="The start is 3. Add 4. "), Sample("p1", text="Größe? 思考"))
SAMPLING = SamplingParams(max_new_tokens=8, temperature=1.0, top_p=0.9, seed=7, stop=("\x00",))
FLIPS = 150


@pytest.fixture(scope="module")
def proxy() -> Iterator[DamagingProxy]:
    server = ServerInThread(load_engine)
    server.wait_ready()
    with DamagingProxy(server.endpoint) as between:
        yield between
    server.stop()


@pytest.fixture(autouse=True)
def _repeats_without_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request is damaged here, so that a rank's limit of repeated requests would take minutes."""
    monkeypatch.setattr(retry_budget, "ALLOWED", 1_000_000)


@pytest.fixture(autouse=True)
def _undamaged_afterwards(proxy: DamagingProxy) -> Iterator[None]:
    yield
    proxy.request = proxy.response = unchanged


@pytest.fixture
def source(proxy: DamagingProxy) -> Iterator[RemoteSource]:
    with closing(RemoteSource("math", proxy.endpoint, lambda _info: PLAN, patience_s=1.0)) as remote:
        remote.connect()
        yield remote


def random_bits(seed: int, count: int = FLIPS) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1 << 30) for _ in range(count)]


def flip_every(bit: int) -> Callable[[bytes], bytes]:
    """Damage every message, so that retries do not help."""
    return lambda message: flip(message, bit)


def flip_in(part: str, bit: int) -> Callable[[bytes], bytes]:
    """Damage one part of every frame that has it."""

    def damage(data: bytes) -> bytes:
        frame = pb.KVFrame.FromString(data)
        if content := getattr(frame, part):
            setattr(frame, part, flip(content, bit))
        return frame.SerializeToString()

    return damage


def assert_right(got: Sequence[object], wanted: Sequence[object]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert isinstance(one, EncodedSampleKV), one
        assert isinstance(other, EncodedSampleKV), other
        assert same_result(one, other)


def problem_of(fetch: Callable[[], None]) -> str:
    """The message of the error that `fetch` raised; empty if it raised none."""
    try:
        fetch()
    except (ProtocolError, TeacherRefusedError, TeacherUnavailableError) as error:
        return str(error)
    return ""


def assert_noticed(problems: Sequence[str], at_least: float, names: str) -> None:
    """Check that enough of the damage was detected, and that every error contains `names`."""
    noticed = list(filter(None, problems))
    assert len(noticed) >= at_least
    assert all(names in problem for problem in noticed)


def test_a_flipped_bit_in_a_request_never_gives_wrong_kv(proxy: DamagingProxy, source: RemoteSource) -> None:
    wanted = source.fetch(SAMPLES)
    problems: list[str] = []
    for bit in random_bits(1):
        proxy.request = flip_every(bit)
        problems.append(problem_of(lambda: assert_right(source.fetch(SAMPLES), wanted)))
    assert_noticed(problems, FLIPS / 2, "teacher 'math'")


def test_a_flipped_bit_that_the_server_accepts_is_reported_with_its_sample(
    proxy: DamagingProxy, source: RemoteSource
) -> None:
    proxy.request = lambda message: message.replace(b"3 apples", b"2 apples")
    problem = f"teacher 'math' at {proxy.endpoint}: sample 'text': the teacher answered another request than"
    with pytest.raises(ProtocolError, match=problem):
        source.fetch(SAMPLES)


def test_a_sample_that_fails_because_of_damage_is_not_missing(proxy: DamagingProxy, source: RemoteSource) -> None:
    def drop_reasoning(message: bytes) -> bytes:
        request = pb.KVRequest.FromString(message)
        del request.samples[0].spans[1]
        return request.SerializeToString()

    proxy.request = drop_reasoning
    with pytest.raises(ProtocolError, match="sample 'text': the teacher answered another request than the one sent"):
        source.fetch(SAMPLES)


@pytest.mark.parametrize("part", ["header", "body", "frame"])
def test_a_flipped_bit_in_an_answer_never_gives_wrong_kv(proxy: DamagingProxy, source: RemoteSource, part: str) -> None:
    wanted = source.fetch(SAMPLES)
    problems: list[str] = []
    for bit in random_bits(2):
        proxy.response = flip_every(bit) if part == "frame" else flip_in(part, bit)
        problems.append(problem_of(lambda: assert_right(source.fetch(SAMPLES), wanted)))
    assert_noticed(problems, FLIPS / 2 if part == "frame" else FLIPS, f"teacher 'math' at {proxy.endpoint}")


@pytest.mark.parametrize("direction", ["request", "response"])
def test_a_flipped_bit_never_gives_a_wrong_completion(proxy: DamagingProxy, direction: str) -> None:
    plan = PLAN.model_copy(update={"selection": Selection(selector="right", budget=4)})
    with closing(CompletionSource("math", proxy.endpoint, lambda _info: plan, SAMPLING)) as writer:
        writer.connect()
        wanted = writer.complete(PROMPTS)

        def write() -> None:
            got: list[CompletedSample] = writer.complete(PROMPTS)
            assert_right([one.kv for one in got], [one.kv for one in wanted])
            for one, other in zip(got, wanted, strict=True):
                assert one.completion is not None
                assert other.completion is not None
                assert one.completion.sample == other.completion.sample

        problems: list[str] = []
        for bit in random_bits(3):
            setattr(proxy, direction, flip_every(bit))
            problems.append(problem_of(write))
    assert_noticed(problems, FLIPS / 2, "teacher 'math'")


def test_recording_never_stores_wrong_kv(proxy: DamagingProxy, source: RemoteSource, tmp_path: Path) -> None:
    asked = [
        Sample(
            f"s{i}", text=f"{i} and {i} more make {2 * i}.", spans=(Span("reasoning", 0, 12), Span("answer", 12, 20))
        )
        for i in range(20, 20 + FLIPS)
    ]
    plan = source.plan
    wanted = source.fetch(asked)
    record = Record(source, tmp_path, "rank0", merges_index=True)
    for sample, bit in zip(asked, random_bits(4), strict=True):
        proxy.request = flip_every(bit)
        with contextlib.suppress(ProtocolError, TeacherRefusedError, TeacherUnavailableError):
            record.fetch([sample])
    record.close()
    with closing(KVStoreReader(tmp_path)) as reader:
        for sample, right in zip(asked, wanted, strict=True):
            stored = reader.get(sample.key(source.info.weights_digest, plan))
            if stored is not None:
                stored.sample_id = sample.id
                assert_right([stored], [right])
