"""What a run of one rank builds with `align.map_at: teacher`: maps, and sources whose K/V have the student's heads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from align.aligner import Aligner
from kvcore.errors import FieldError, StoreError, TeacherRefusedError
from kvcore.store.manifest import read_manifest, stored_map
from kvcore.tensors.codec import decode, decode_batch
from kvcore.types import TENSORS
from student_trainer.loop.training_context import TrainingContext
from tests.support.kv_fakes import INFO
from tests.support.kv_maps import naive_mapped
from tests.support.mapped_runs import MODELS, fetched, mapped_run, serving
from tests.support.scripted_teacher import ScriptedTeacher
from tests.support.training import World

STUDENT_SHAPE = (1, 16)

pytestmark = pytest.mark.usefixtures("one_rank")


def built(
    world: World, teachers: dict[str, list[str]], name: str, align: dict[str, Any] | None = None, **kv: Any
) -> TrainingContext:
    """A run that fuses two teachers; `align.map_at` is `teacher` unless `align` says otherwise."""
    return mapped_run(world, teachers, name, {"settled_within": 0.0, "map_at": "teacher"} | (align or {}), **kv)


def aligners(context: TrainingContext) -> dict[str, Aligner]:
    return dict(zip(context.sources, context.model.aligners, strict=True))


@pytest.mark.parametrize("adapter", ["ridge", pytest.param("pool", marks=pytest.mark.slow)])
def test_teachers_send_what_the_trainer_would_map_the_whole_kv_to(
    world: World, teachers: dict[str, list[str]], adapter: str
) -> None:
    trainer = built(world, teachers, f"trainer-{adapter}", {"map_at": "trainer", "head_adapter": adapter})
    mapped = built(world, teachers, f"mapped-{adapter}", {"head_adapter": adapter})
    for name in teachers:
        kv_map, one, other = mapped.maps[name], aligners(mapped)[name], aligners(trainer)[name]
        assert (kv_map.named.heads, kv_map.named.head_dim) == STUDENT_SHAPE
        assert mapped.sources[name].plan == trainer.sources[name].plan.with_map(kv_map.named)
        for found, whole in zip(fetched(mapped, name), fetched(trainer, name), strict=True):
            assert found.positions.equal(whole.positions)
            for target, expected in zip(
                one.targets(decode_batch([found])), other.targets(decode_batch([whole])), strict=True
            ):
                torch.testing.assert_close(target, expected, atol=1e-5, rtol=1e-5)
            for kind in TENSORS:
                y_LHMD = decode({"data": found.parts[f"{kind}.data"]}, kind, found.codec)
                for place, layer in enumerate(found.layers):
                    naive_HMD = naive_mapped(kv_map, whole.parts[f"{kind}.data"][place], layer, kind)
                    torch.testing.assert_close(y_LHMD[place].double(), naive_HMD, atol=1e-5, rtol=1e-5)
    # The same scales, of the fused targets too.
    found, expected = mapped.model.frozen_state(), trainer.model.frozen_state()
    for key in ("fused/scale_LK", "fused/variance_LK", "teacher/ada/scale_LK", "teacher/ben/variance_LK"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)
    for context in (trainer, mapped):
        context.close()
    assert mapped.identity["teachers"] == trainer.identity["teachers"], "a map is not fixed before the run"
    assert mapped.identity["align"]["map_at"] == "teacher"


def test_a_recording_keeps_its_map_and_offline_runs_use_it(
    world: World, teachers: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = str(tmp_path / "store")
    record = built(world, teachers, "record", mode="record", store=store)
    sent = fetched(record, "ada")
    record.close()
    for name in teachers:
        assert read_manifest(tmp_path / "store" / name).plan.map == record.maps[name].named
        kept = stored_map(tmp_path / "store" / name)
        assert kept is not None
        assert all(kept.tensors[part].equal(tensor) for part, tensor in record.maps[name].tensors.items())
    # Nothing is fitted again where a store has a map.
    monkeypatch.setattr("student_trainer.loop.student_maps.student_map", None)
    again = built(world, teachers, "record-again", mode="record", store=store)
    again.close()
    offline = built(world, teachers, "offline", mode="offline", store=store)
    for context in (again, offline):
        assert {name: one.named for name, one in context.maps.items()} == {
            name: one.named for name, one in record.maps.items()
        }
    for name, tensor in record.model.frozen_state().items():
        assert torch.equal(tensor.nan_to_num(), offline.model.frozen_state()[name].nan_to_num()), name
    for found, expected in zip(fetched(offline, "ada"), sent, strict=True):
        assert all(found.parts[name].equal(part) for name, part in expected.parts.items())
    offline.close()


@pytest.mark.slow
def test_a_store_of_whole_heads_of_another_map_or_shape_is_refused_by_name(
    world: World, teachers: dict[str, list[str]], tmp_path: Path
) -> None:
    trainer = {"map_at": "trainer"}
    built(world, teachers, "whole", trainer, mode="record", store=str(tmp_path / "whole")).close()
    with pytest.raises(FieldError, match=r"^align.map_at: the store .*ada holds whole heads; use 'trainer', or rec"):
        built(world, teachers, "offline-whole", mode="offline", store=str(tmp_path / "whole"))
    built(world, teachers, "student", mode="record", store=str(tmp_path / "student")).close()
    with pytest.raises(StoreError, match=r"another plan.map: \{.*\}, not None"):
        built(world, teachers, "offline-trainer", trainer, mode="offline", store=str(tmp_path / "student"))
    basis = trainer | {"direction": "to_teacher", "basis_rank": 3}
    built(world, teachers, "basis", basis, mode="record", store=str(tmp_path / "basis")).close()
    problem = r"^align.map_at: the student has 1 KV heads of 16, and the store .*ada holds 1 heads of 3"
    with pytest.raises(FieldError, match=problem):
        built(world, teachers, "offline-basis", mode="offline", store=str(tmp_path / "basis"))


def test_a_map_that_was_lost_is_sent_again_and_another_replica_is_sent_it_too(world: World) -> None:
    servers = [serving(MODELS["ada"]) for _ in range(2)]
    try:
        context = built(
            world, {"ada": [server.endpoint for server in servers]}, "failover", {"direction": "to_student"}
        )
        before = fetched(context, "ada")
        port = servers[0].server.state.grpc_port
        servers[0].stop()
        on_the_other = fetched(context, "ada")
        servers[0] = serving(MODELS["ada"], grpc_port=port)
        servers[1].stop()
        after_restart = fetched(context, "ada")
        for found in (on_the_other, after_restart):
            for one, expected in zip(found, before, strict=True):
                assert all(one.parts[name].equal(part) for name, part in expected.parts.items())
        context.close()
    finally:
        for server in servers:
            server.stop()


def test_a_server_that_takes_no_maps_and_shared_layers_are_refused_before_anything_is_fitted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student_trainer.loop.align_run.calibrate", None)
    old = ScriptedTeacher(dataclasses.replace(INFO, max_map_bytes=0))
    shallow = serving("fake:layers=1,heads=2,dim=8")
    alone = {"direction": "to_student"}
    try:
        with pytest.raises(
            TeacherRefusedError,
            match=r"does not support maps \(align.map_at\); .* set align.map_at to 'tr",
        ):
            built(world, {"old": [old.endpoint]}, "old", alone, selection={"selector": "right", "budget": 3})
        with pytest.raises(FieldError, match=r"^align.map_at: .*'uniform' mixes or shares .* 1 layers for 2"):
            built(world, {"one": [shallow.endpoint]}, "shared", alone)
    finally:
        old.stop()
        shallow.stop()
