"""Tests of a vLLM teacher in a real server: clients and training can replace it by a transformers replica."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch

from data.synthetic import ChainTask, make_splits
from kvcore.plan import CodecSpec, KVPlan, SamplingParams, Selection
from kvcore.tensors.codec import decode_batch
from kvcore.types import EncodedSampleKV, MissingKV, Sample
from kvcore.wire.stream_reader import RefusedSample
from student_trainer.kv_sources.completions import CompletedSample, CompletionSource
from tests.support.servers import TeacherClient, TeacherProcess, running_teacher, start_teacher, wait_until
from tests.support.training import World, assert_same_losses, make_world, train
from tests.vllm.conftest import save_model

TOLERANCE = 1e-4
START_SECONDS = 240.0
RAW = CodecSpec(name="raw")
FULL = KVPlan(layers=(0, 1, 2), selection=Selection(selector="full", span="all"), codec=RAW)
RECORDS = make_splits(ChainTask(operations=6), 24, 1, 1, seed=0).train


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen2", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def vllm(directory: Path) -> Iterator[TeacherProcess]:
    teacher = start_teacher(directory, directory / "vllm.log", engine="vllm", max_model_len=256)
    try:
        yield teacher.wait_ready(START_SECONDS)
    finally:
        teacher.stop(60.0)


@pytest.fixture(scope="module")
def hf(directory: Path) -> Iterator[TeacherProcess]:
    with running_teacher(directory, directory / "hf.log", max_sample_tokens=256) as teacher:
        yield teacher


def samples() -> list[Sample]:
    return [record.sample() for record in RECORDS]


def whole(outcomes: list[EncodedSampleKV | RefusedSample]) -> list[EncodedSampleKV]:
    kv = [outcome for outcome in outcomes if isinstance(outcome, EncodedSampleKV)]
    assert len(kv) == len(outcomes), outcomes
    return kv


@pytest.mark.parametrize(
    "plan",
    [
        FULL,
        KVPlan(layers=(0, 2), selection=Selection(selector="right", budget=5, scope="head"), codec=RAW),
        KVPlan(layers=(1,), selection=Selection(selector="r_kv", budget=4), codec=RAW),
    ],
    ids=["full", "right", "r_kv"],
)
def test_both_replicas_return_the_same_kv(vllm: TeacherProcess, hf: TeacherProcess, plan: KVPlan) -> None:
    answers = []
    for teacher in (vllm, hf):
        with TeacherClient(teacher.endpoint) as client:
            answers.append(whole(client.fetch(plan, samples())))
    for ours, theirs in zip(*answers, strict=True):
        assert ours.key == theirs.key
        assert torch.equal(ours.positions, theirs.positions)
        one, other = (decode_batch([kv]) for kv in (ours, theirs))
        for kind in ("k_BLHMD", "v_BLHMD"):
            torch.testing.assert_close(getattr(one, kind), getattr(other, kind), atol=TOLERANCE, rtol=0)


def test_cancelling_frees_the_slot(vllm: TeacherProcess) -> None:
    with TeacherClient(vllm.endpoint) as client:
        call = client.call(FULL, samples())
        next(call)
        call.cancel()
        wait_until(lambda: vllm.info()["load"] == {"open_streams": 0, "queued_samples": 0, "queued_tokens": 0})
        whole(client.fetch(FULL, samples()))


def test_a_sample_over_its_error_budget_fails_alone(vllm: TeacherProcess) -> None:
    plan = KVPlan(
        layers=(0, 1), selection=Selection(selector="full"), codec=CodecSpec(name="int8", max_relative_error=1e-7)
    )
    with TeacherClient(vllm.endpoint) as client:
        for outcome in client.fetch(plan, samples()[:3]):
            assert isinstance(outcome, RefusedSample)
            assert "max_relative_error" in outcome.message


def write(teacher: TeacherProcess) -> list[CompletedSample]:
    prompts = [Sample(record.id, text=record.prompt) for record in RECORDS[:4]]
    selection = Selection(selector="full", span="reasoning")
    source = CompletionSource(
        "a",
        teacher.endpoint,
        lambda _info: KVPlan(layers=(0, 2), selection=selection, codec=RAW),
        SamplingParams(max_new_tokens=12),
    )
    with closing(source):
        source.connect()
        return source.complete(prompts)


def test_generate_streams_the_kv_of_the_completions(vllm: TeacherProcess, hf: TeacherProcess) -> None:
    for ours, theirs in zip(write(vllm), write(hf), strict=True):
        assert ours.completion is not None
        assert theirs.completion is not None
        assert ours.completion.sample == theirs.completion.sample
        assert not isinstance(ours.kv, MissingKV)
        assert not isinstance(theirs.kv, MissingKV)
        one, other = (decode_batch([kv]) for kv in (ours.kv, theirs.kv))
        torch.testing.assert_close(one.k_BLHMD, other.k_BLHMD, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_training_losses_match_those_with_transformers(
    world: World, vllm: TeacherProcess, hf: TeacherProcess, tmp_path: Path
) -> None:
    run = {"steps": 2, "global_batch": 4}
    runs = [
        world.config(name, {"ada": [teacher.endpoint]}, run=run, align={"calibration_samples": 16})
        for name, teacher in (("from_vllm", vllm), ("from_hf", hf))
    ]
    from_vllm, from_hf = train(runs, 1, tmp_path)
    assert_same_losses(from_vllm, from_hf, 1e-3)


def test_a_server_whose_engine_died_exits_with_a_message(vllm: TeacherProcess) -> None:
    """Runs last, because it ends the shared server."""
    (core,) = [child for child in psutil.Process(vllm.pid).children() if "EngineCore" in child.name()]
    with TeacherClient(vllm.endpoint) as client:
        core.kill()
        for outcome in client.fetch(FULL, samples()[:2]):
            assert isinstance(outcome, RefusedSample)
            assert outcome.code == "INTERNAL"
    assert vllm.wait(60.0) == 1
    assert "the engine has ended" in vllm.log_path.read_text(encoding="utf-8")
