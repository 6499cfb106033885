"""Tests of `kvdistill serve --chaos`: faults on purpose, which clients survive with the same K/V."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from kvcore.config import parse
from kvcore.errors import FieldError, ProtocolError, TeacherUnavailableError
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.types import Sample
from student_trainer.kv_sources.base import KVResult
from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.remote import RemoteSource
from teacher_server.chaos_spec import ChaosSpec
from teacher_server.config import FLAGS, ServeConfig
from tests.support.kv_fakes import same_result
from tests.support.servers import TeacherProcess, running_teacher

SPEC = "delay=2ms,abort=0.1,truncate=0.1,flip=0.1,seed=2"
PLAN = KVPlan(
    layers=(0, 1, 2), selection=Selection(selector="right", budget=4, span="all"), codec=CodecSpec(name="int8")
)
BATCHES = [[Sample(f"{batch}-{i}", text=f"{batch} + {i} = {batch + i}") for i in range(3)] for batch in range(24)]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def start(stack: ExitStack, log: Path, **options: Any) -> TeacherProcess:
    return stack.enter_context(running_teacher("fake:layers=3", log, engine="fake", **options))


def fetch_all(teacher: TeacherProcess) -> list[KVResult]:
    remote = RemoteSource("math", teacher.endpoint, lambda _info: PLAN)
    with closing(FailoverSource("math", [remote], patience_s=60.0)) as source:
        source.connect()
        return [result for batch in BATCHES for result in source.fetch(batch)]


def faults(teacher: TeacherProcess) -> list[tuple[int, str]]:
    """The fault of each answer that had one. At which frame it struck depends on how layers share frames."""
    return [(event["answer"], event["fault"]) for event in teacher.events("chaos_fault")]


def test_a_client_gets_the_same_kv_under_faults_that_a_seed_repeats(stack: ExitStack, tmp_path: Path) -> None:
    calm = start(stack, tmp_path / "calm.log")
    rough, again = (start(stack, tmp_path / f"{name}.log", chaos=SPEC) for name in ("rough", "again"))
    expected, received = fetch_all(calm), fetch_all(rough)
    assert all(same_result(*pair) for pair in zip(received, expected, strict=True))
    counts = Counter(fault for _, fault in faults(rough))
    assert set(counts) == {"abort", "truncate", "flip"}, counts
    fetch_all(again)
    assert faults(again) == faults(rough)
    (warning,) = rough.events("chaos")
    assert (warning["level"], warning["spec"]) == ("warning", SPEC)
    assert calm.events("chaos") == []


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("abort=1", TeacherUnavailableError, "UNAVAILABLE: aborted on purpose: --chaos, answer 1"),
        ("truncate=1", ProtocolError, "the stream ended early"),
        ("flip=1", ProtocolError, "xxh3|frame"),
    ],
)
def test_a_client_notices_each_fault(
    stack: ExitStack, tmp_path: Path, spec: str, error: type[Exception], message: str
) -> None:
    teacher = start(stack, tmp_path / "log", chaos=spec)
    with closing(RemoteSource("math", teacher.endpoint, lambda _info: PLAN)) as source:
        source.connect()
        with pytest.raises(error, match=message):
            source.fetch(BATCHES[0])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("abrot=0.1", "'abrot' in 'abrot=0.1' is unknown; did you mean 'abort'?"),
        ("explode=1", "'explode' in 'explode=1' is unknown; expected delay, abort, truncate, flip, seed"),
        ("", "'' in '' is unknown; expected delay"),
        ("abort=0.1,abort=0.2", "'abort' is given twice"),
        ("abort=1.5", "'abort=1.5' is not a part of the answers between 0 and 1"),
        ("flip=-1", "'flip=-1' is not a part"),
        ("flip", "'flip=' is not a part"),
        ("delay=200", "'delay=200' is not a time such as 200ms or 1.5s"),
        ("delay=ms", "'delay=ms' is not a time"),
        ("seed=1.5", "'seed=1.5' is not a whole number"),
        ("abort=0.6,flip=0.5", "add up to more than 1"),
    ],
)
def test_an_invalid_specification_is_refused(text: str, problem: str) -> None:
    with pytest.raises(FieldError) as caught:
        parse({"model": "fake:", "engine": "fake", "chaos": text}, ServeConfig)
    assert caught.value.field == "chaos"
    assert problem in caught.value.problem


def test_a_specification_is_read() -> None:
    assert ChaosSpec.parse("delay=1.5s, abort=0.25,seed=7") == ChaosSpec(delay=1.5, abort=0.25, seed=7)
    assert ChaosSpec.parse("delay=200ms").delay == pytest.approx(0.2)
    assert ChaosSpec.parse("flip=1,truncate=0").flip == 1.0


def test_faults_are_refused_on_a_server_that_others_can_reach() -> None:
    flags = ["--model", "fake:", "--engine", "fake", "--insecure", "--chaos", "abort=0.1"]
    assert FLAGS.read(flags, "serve").chaos == "abort=0.1"
    with pytest.raises(FieldError, match=r"--chaos: 'abort=0.1' makes faults on purpose.* got '0.0.0.0'"):
        FLAGS.read([*flags, "--grpc-host", "0.0.0.0"], "serve")
