"""What a run of one rank builds with `align.map_at: teacher`: maps, and sources whose K/V have the student's heads."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from align.aligner import Aligner
from kvcore.errors import FieldError, StoreError, TeacherRefusedError
from kvcore.store.manifest import read_manifest, stored_map
from kvcore.tensors.codec import decode, decode_batch
from kvcore.tensors.kv_map import KVMap
from kvcore.types import TENSORS, Tensor, TensorKind
from kvdistill.inspection import inspect
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


def pca(quality: float) -> dict[str, Any]:
    return {"name": "pca", "quality": quality}


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


def in_components(kv_map: KVMap, x_BLHMD: Tensor, kind: TensorKind) -> tuple[Tensor, Tensor]:
    """K/V rounded along the components of a coded map, in fp64, and the tokens [B,L,M] that nearly tie nowhere."""
    rounded, clear = torch.zeros_like(x_BLHMD, dtype=torch.float64), torch.zeros_like(x_BLHMD[:, :, 0, :, 0]).bool()
    for at in range(x_BLHMD.shape[1]):
        basis_GG, mean_G = (kv_map.tensors[f"{kind}.{name}"][at].double() for name in ("basis", "mean"))
        step = float(kv_map.tensors[f"{kind}.step"][at])
        for row in range(x_BLHMD.shape[0]):
            for slot in range(x_BLHMD.shape[3]):
                codes_G = basis_GG.T @ (x_BLHMD[row, at, :, slot].flatten().double() - mean_G) / step
                clear[row, at, slot] = bool(((codes_G - codes_G.floor() - 0.5).abs() > 1e-2).all())
                target_G = mean_G + step * basis_GG @ codes_G.round()
                rounded[row, at, :, slot] = target_G.view_as(rounded[row, at, :, slot])
    return rounded, clear


@pytest.mark.parametrize("quality", [0.02, 0.2])
def test_with_the_codec_pca_targets_are_those_of_the_trainer_rounded_in_the_components_of_the_mapped_kv(
    world: World, teachers: dict[str, list[str]], quality: float
) -> None:
    # Maps are fitted to K/V in bf16 with the codec `pca`, too.
    fitted = built(world, teachers, f"bf16-{quality}", {"map_at": "trainer"}, codec={"name": "bf16"})
    whole = built(world, teachers, f"whole-{quality}", {"map_at": "trainer"})
    coded = built(world, teachers, f"coded-{quality}", codec=pca(quality))
    for name in teachers:
        kv_map, sent = coded.maps[name], decode_batch(fetched(coded, name))
        assert kv_map.turns_back
        assert (kv_map.named.heads, kv_map.named.head_dim) == STUDENT_SHAPE
        found = aligners(coded)[name].targets(sent)
        exact = aligners(fitted)[name].targets(decode_batch(fetched(whole, name)))
        for kind, found_BLHMD, exact_BLHMD in zip(TENSORS, found, exact, strict=True):
            rounded_BLHMD, clear_BLM = in_components(kv_map, exact_BLHMD, kind)
            clear_BLHMD = (clear_BLM & sent.mask_BM[:, None])[:, :, None, :, None].expand_as(found_BLHMD)
            assert clear_BLHMD.float().mean() > 0.5
            torch.testing.assert_close(
                found_BLHMD[clear_BLHMD].double(), rounded_BLHMD[clear_BLHMD], atol=1e-5, rtol=1e-5
            )
            varying_BLHMD = exact_BLHMD - exact_BLHMD.mean(dim=(0, 3), keepdim=True)
            error = float((found_BLHMD - exact_BLHMD).norm() / varying_BLHMD.norm())
            assert error == pytest.approx(quality, rel=0.5)
    for context in (fitted, whole, coded):
        context.close()


def test_bytes_per_token_limit_the_components_of_the_mapped_kv(world: World, teachers: dict[str, list[str]]) -> None:
    sizes: list[float] = []
    for wanted in (20.0, 60.0):
        run = built(world, teachers, f"bytes-{wanted}", codec={"name": "pca", "bytes_per_token": wanted})
        sent = fetched(run, "ada")
        # Each of the four streams of a sample ends with up to eight bytes that hold little.
        spare = 4 * 8 * len(sent)
        tokens = sum(sample.slots for sample in sent)
        size = sum(sample.parts["packed"].numel() for sample in sent)
        assert tokens * wanted / 2 < size < tokens * wanted * 1.2 + spare
        sizes.append(size)
        run.close()
    assert sizes[0] < sizes[1]


def test_maps_of_a_limited_rank_are_applied_by_teachers_and_take_fewer_bytes(
    world: World, teachers: dict[str, list[str]]
) -> None:
    sizes: list[int] = []
    for rank in (2, 16):
        run = built(
            world,
            {"ada": teachers["ada"]},
            f"rank-{rank}",
            {"direction": "to_student", "ridge_rank": rank},
            codec=pca(0.02),
        )
        sent = fetched(run, "ada")
        sizes.append(sum(sample.parts["packed"].numel() for sample in sent))
        kv = decode_batch(sent)
        for x_BLHMD in (kv.k_BLHMD, kv.v_BLHMD):
            for layer in range(x_BLHMD.shape[1]):
                x_NF = x_BLHMD[:, layer].transpose(1, 2)[kv.mask_BM].flatten(1)
                found = int(torch.linalg.matrix_rank(x_NF - x_NF.mean(dim=0), atol=1e-4))
                assert found == 2 if rank == 2 else found > 2
        assert run.model.aligners[0].head_adapter == "mapped"
        run.close()
    assert sizes[0] < sizes[1] / 2


def test_a_coded_recording_of_the_students_shape_is_read_back_exactly_and_used_for_nothing_else(
    world: World, teachers: dict[str, list[str]], tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    record = built(world, teachers, "coded-record", mode="record", store=store, codec=pca(0.1))
    sent = {name: fetched(record, name) for name in teachers}
    record.close()
    offline = built(world, teachers, "coded-offline", mode="offline", store=store, codec=pca(0.1))
    for name, expected in sent.items():
        assert offline.maps[name].named == record.maps[name].named
        for one, other in zip(fetched(offline, name), expected, strict=True):
            assert all(one.parts[part].equal(tensor) for part, tensor in other.parts.items())
        shown = inspect(str(tmp_path / "store" / name))
        assert re.search(r"map +[0-9a-f]{32}, to 1 x 16", shown), shown
        assert re.search(r"codec +pca", shown), shown
    for name, tensor in record.model.frozen_state().items():
        assert torch.equal(tensor.nan_to_num(), offline.model.frozen_state()[name].nan_to_num()), name
    offline.close()
    trainer = {"map_at": "trainer"}
    with pytest.raises(FieldError, match=r"^kv.codec.name: the store .* was recorded with align.map_at; record into"):
        built(world, teachers, "coded-whole", trainer, mode="offline", store=store, codec=pca(0.1))
    with pytest.raises(FieldError, match=r"^kv.codec.name: got 'int8'; the store .* holds K/V in 'pca'"):
        built(world, teachers, "coded-int8", mode="offline", store=store, codec={"name": "int8"})
    whole = str(tmp_path / "whole")
    built(world, teachers, "whole-record", trainer, mode="record", store=whole, codec=pca(0.1)).close()
    with pytest.raises(FieldError, match=r"^align.map_at: the store .* was recorded with kv.codec.name; record into"):
        built(world, teachers, "whole-offline", mode="offline", store=whole, codec=pca(0.1))


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


@pytest.mark.parametrize("codec", ["raw", "pca"])
def test_a_map_that_was_lost_is_sent_again_and_another_replica_is_sent_it_too(world: World, codec: str) -> None:
    servers = [serving(MODELS["ada"]) for _ in range(2)]
    try:
        replicas = {"ada": [server.endpoint for server in servers]}
        alone = {"direction": "to_student"}
        context = built(world, replicas, f"failover-{codec}", alone, codec={"name": codec})
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
