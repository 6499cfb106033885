"""Runs of one rank with the codec `pca`: maps, sources, decoded K/V, stores, and settings that conflict."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kvcore.errors import FieldError
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.store.manifest import stored_map
from kvcore.tensors.codec import decode_batch
from kvcore.tensors.kv_map import KVMap
from kvcore.types import TENSORS, EncodedSampleKV, MissingKV, Sample, Tensor
from kvcore.wire import frames
from kvcore.wire.packed_rows import pack_rows
from kvdistill.inspection import inspect
from student_trainer.kv_sources.remote import RemoteSource
from student_trainer.loop.training_context import TrainingContext
from teacher_server import scheduler
from tests.support.kv_maps import coded_map
from tests.support.mapped_runs import fetched, mapped_run
from tests.support.training import World

pytestmark = pytest.mark.usefixtures("one_rank")

TO_TEACHER: dict[str, Any] = {"direction": "to_teacher"}


def codec(quality: float) -> dict[str, Any]:
    return {"codec": {"name": "pca", "quality": quality}}


def both(samples: list[EncodedSampleKV]) -> list[Tensor]:
    kv = decode_batch(samples)
    return [kv.k_BLHMD, kv.v_BLHMD]


def relative_errors(found: list[EncodedSampleKV], expected: list[EncodedSampleKV]) -> list[float]:
    """Of all keys and of all values, over what varies in them."""
    errors: list[float] = []
    for x_BLHMD, exact_BLHMD in zip(both(found), both(expected), strict=True):
        varying_BLHMD = exact_BLHMD - exact_BLHMD.mean(dim=(0, 3), keepdim=True)
        errors.append(float((x_BLHMD - exact_BLHMD).norm() / varying_BLHMD.norm()))
    return errors


@pytest.mark.parametrize("quality", [0.02, 0.2])
def test_whole_heads_come_back_within_about_the_quality(
    world: World, teachers: dict[str, list[str]], quality: float
) -> None:
    whole = mapped_run(world, teachers, "whole", TO_TEACHER)
    coded = mapped_run(world, teachers, f"coded{quality}", TO_TEACHER, **codec(quality))
    for name, aligner, before in zip(("ada", "ben"), coded.model.aligners, whole.model.aligners, strict=True):
        assert aligner.teacher == before.teacher
        assert coded.maps[name].coded
        sent = fetched(coded, name)
        assert all(error == pytest.approx(quality, rel=0.5) for error in relative_errors(sent, fetched(whole, name)))
        for sample in sent:
            for kind in TENSORS:
                assert max(sample.relative_error[kind]) < 3 * quality
    for context in (whole, coded):
        context.close()


def test_components_of_a_basis_can_be_coded(world: World, teachers: dict[str, list[str]]) -> None:
    align = TO_TEACHER | {"basis_rank": 3}
    plain = mapped_run(world, teachers, "components", align)
    coded = mapped_run(world, teachers, "coded_components", align, **codec(0.05))
    for name, aligner in zip(("ada", "ben"), coded.model.aligners, strict=True):
        assert (aligner.teacher.heads, aligner.teacher.head_dim) == (1, 3)
        sent = fetched(coded, name)
        assert all(error < 0.1 for error in relative_errors(sent, fetched(plain, name)))
        assert sum(sample.nbytes for sample in sent) < sum(sample.nbytes for sample in fetched(plain, name)) / 2
    for context in (plain, coded):
        context.close()


def test_a_recording_is_read_back_exactly_without_teachers(
    world: World, teachers: dict[str, list[str]], tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    record = mapped_run(world, teachers, "record", TO_TEACHER, mode="record", store=store, **codec(0.05))
    sent = {name: fetched(record, name) for name in teachers}
    record.close()
    offline = mapped_run(world, teachers, "offline", TO_TEACHER, mode="offline", store=store, **codec(0.05))
    for name, expected in sent.items():
        found = fetched(offline, name)
        for mine, theirs in zip(both(found), both(expected), strict=True):
            assert mine.equal(theirs)
        assert [one.parts["packed"].equal(other.parts["packed"]) for one, other in zip(found, expected, strict=True)]
        shown = inspect(str(tmp_path / "store" / name))
        assert re.search(r"per sample +[1-9]\d* bytes of K/V", shown), shown
        kept = stored_map(tmp_path / "store" / name)
        assert kept is not None
        assert kept.named == offline.maps[name].named
    offline.close()
    with pytest.raises(FieldError, match=r"kv.codec.name.*'int8'.*holds K/V in 'pca'"):
        mapped_run(
            world,
            teachers,
            "other",
            TO_TEACHER | {"basis_rank": 3},
            mode="offline",
            store=store,
            codec={"name": "int8"},
        )


def test_codes_are_packed_outside_the_event_loop_and_a_failure_there_fails_the_batch_alone(
    world: World, teachers: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = mapped_run(world, teachers, "packed", TO_TEACHER, **codec(0.1))
    threads: set[str] = set()
    fails = [False]

    def recorded(*arguments: Any) -> Any:
        threads.add(threading.current_thread().name)
        if fails[0]:
            raise RuntimeError("a fault of the test")
        return pack_rows(*arguments)

    monkeypatch.setattr(scheduler, "pack_rows", recorded)
    monkeypatch.setattr(frames, "pack_rows", recorded)
    expected = both(fetched(context, "ada"))
    assert {name.rpartition("_")[0] for name in threads} == {"packing"}
    fails[0] = True
    (refused,) = context.sources["ada"].fetch([context.train[5].sample()])
    assert isinstance(refused, MissingKV)
    assert "INTERNAL" in refused.reason
    fails[0] = False
    for found, before in zip(both(fetched(context, "ada")), expected, strict=True):
        assert found.equal(before)
    context.close()


@pytest.mark.parametrize("failing", [0, 2])
def test_a_sample_that_fails_while_its_layers_wait_to_be_packed_fails_alone(
    teachers: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        return pack_rows(*arguments)

    monkeypatch.setattr(scheduler, "pack_rows", slow)
    tensors = dict(coded_map((0, 1, 2), 2, 8, step=0.01).tensors)
    for kind in TENSORS:
        tensors[f"{kind}.step"] = tensors[f"{kind}.step"].clone()
        tensors[f"{kind}.step"][failing] = 10.0
        tensors[f"{kind}.weight"] = tensors[f"{kind}.weight"].clone()
        tensors[f"{kind}.weight"][failing] *= 0.001
    kv_map = KVMap(tensors)
    exact = CodecSpec(name="pca", max_relative_error=0.3)
    plan = KVPlan(layers=(0, 1, 2), selection=Selection(span="all"), codec=CodecSpec(name="pca"), map=kv_map.named)
    texts = [Sample(f"s{number}", text="a text " * (number + 1)) for number in range(6)]
    for codec_spec, failed in ((CodecSpec(name="pca"), False), (exact, True)):
        wanted = plan.with_map(kv_map.named, codec_spec)
        source = RemoteSource("ada", teachers["ada"][0], lambda _info, wanted=wanted: wanted, kv_map=kv_map)
        source.connect()
        results = source.fetch(texts)
        source.close()
        assert all(isinstance(result, MissingKV) == failed for result in results)
        for result in results:
            if isinstance(result, MissingKV):
                assert f"of layer {failing} in codec 'pca' has a relative error" in result.reason


def built_with(world: World, teachers: dict[str, list[str]], align: dict[str, Any], kv: dict[str, Any]) -> None:
    context: TrainingContext = mapped_run(world, teachers, "refused", align, **kv)
    context.close()


@pytest.mark.parametrize(
    ("align", "kv", "problem"),
    [
        (
            {"direction": "to_student", "map_at": "teacher", "layer_map": "cka"},
            codec(0.1),
            "align.map_at: align.layer_map 'cka' needs",
        ),
        (TO_TEACHER, {"codec": {"name": "int8", "quality": 0.1}}, "quality: only the codec 'pca' has it"),
        (TO_TEACHER, {"codec": {"name": "int8", "bytes_per_token": 9}}, "bytes_per_token: only the codec 'pca' has it"),
        (TO_TEACHER, {"codec": {"name": "pca", "quality": 0.0}}, "quality"),
        (TO_TEACHER, {"codec": {"name": "pca", "quality": 1.0}}, "quality"),
        (
            TO_TEACHER | {"head_adapter": "linear"},
            codec(0.1) | {"selection": {"selector": "keydiff", "budget": 3, "scope": "head"}},
            "scope",
        ),
    ],
)
def test_settings_that_conflict_are_refused_by_name(
    world: World, teachers: dict[str, list[str]], align: dict[str, Any], kv: dict[str, Any], problem: str
) -> None:
    with pytest.raises((FieldError, ValueError), match=problem):
        built_with(world, teachers, align, kv)
