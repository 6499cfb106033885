"""What a run of one rank builds with `align.basis_rank`: maps, mapped sources, and alignments with their components."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvcore.errors import FieldError, StoreError
from kvcore.store.manifest import stored_map
from kvcore.tensors.codec import decode
from kvcore.tensors.kv_map import KVMap
from kvcore.types import TENSORS
from student_trainer.loop.training_context import TrainingContext
from tests.support.kv_maps import naive_mapped
from tests.support.mapped_runs import fetched, mapped_run
from tests.support.training import World

RANK = 3

pytestmark = pytest.mark.usefixtures("one_rank")


def built(
    world: World, teachers: dict[str, list[str]], name: str, rank: int | None = RANK, **kv: Any
) -> TrainingContext:
    return mapped_run(world, teachers, name, {"direction": "to_teacher", "basis_rank": rank}, **kv)


def test_what_comes_back_is_the_fitted_map_of_the_whole_kv(world: World, teachers: dict[str, list[str]]) -> None:
    whole, mapped = built(world, teachers, "whole", rank=None), built(world, teachers, "mapped")
    for name, aligner in zip(("ada", "ben"), mapped.model.aligners, strict=True):
        kv_map = mapped.maps[name]
        assert (aligner.teacher.heads, aligner.teacher.head_dim) == (1, RANK)
        assert mapped.sources[name].plan == whole.sources[name].plan.with_map(kv_map.named)
        for found, expected in zip(fetched(mapped, name), fetched(whole, name), strict=True):
            assert found.positions.equal(expected.positions)
            for kind in TENSORS:
                y_LHMD = decode({"data": found.parts[f"{kind}.data"]}, kind, found.codec)
                for place, layer in enumerate(found.layers):
                    x_HMD = expected.parts[f"{kind}.data"][place]
                    naive_HMD = naive_mapped(kv_map, x_HMD, layer, kind)
                    torch.testing.assert_close(y_LHMD[place].double(), naive_HMD, atol=1e-5, rtol=1e-5)
    for context in (whole, mapped):
        context.close()
    assert mapped.identity["teachers"] == whole.identity["teachers"], "a map is not fixed before the run"


@pytest.mark.nightly
@pytest.mark.slow
def test_equal_runs_fit_equal_maps(world: World, teachers: dict[str, list[str]]) -> None:
    names = []
    for run in ("one", "two"):
        context = built(world, teachers, run)
        context.close()
        names.append({teacher: kv_map.named for teacher, kv_map in context.maps.items()})
    assert names[0] == names[1]


def test_a_recording_keeps_its_map_and_offline_runs_use_it(
    world: World, teachers: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = str(tmp_path / "store")
    record = built(world, teachers, "record", mode="record", store=store)
    sent = fetched(record, "ada")
    record.close()
    assert stored_map(tmp_path / "store/ada") is not None
    # Nothing is fitted again where a store has a map.
    monkeypatch.setattr("student_trainer.loop.teacher_sources.BasisStatistics", None)
    again = built(world, teachers, "record-again", mode="record", store=store)
    again.close()
    offline = built(world, teachers, "offline", mode="offline", store=store)
    for context in (again, offline):
        assert maps(context) == maps(record)
    for name, tensor in record.model.frozen_state().items():
        assert torch.equal(tensor.nan_to_num(), offline.model.frozen_state()[name].nan_to_num()), name
    for found, expected in zip(fetched(offline, "ada"), sent, strict=True):
        assert all(found.parts[name].equal(part) for name, part in expected.parts.items())
    offline.close()


def maps(context: TrainingContext) -> dict[str, object]:
    return {name: KVMap(one.tensors).named for name, one in context.maps.items()}


@pytest.mark.slow
def test_a_store_of_another_rank_or_of_whole_heads_is_refused_by_name(
    world: World, teachers: dict[str, list[str]], tmp_path: Path
) -> None:
    for rank in (RANK, None):
        built(world, teachers, f"record-{rank}", rank, mode="record", store=str(tmp_path / f"{rank}")).close()
    with pytest.raises(FieldError, match=r"^align.basis_rank: got 4, and the store .*ada holds 1 heads of 3"):
        built(world, teachers, "other", 4, mode="offline", store=str(tmp_path / f"{RANK}"))
    with pytest.raises(FieldError, match=r"^align.basis_rank: the store .*ada holds whole heads"):
        built(world, teachers, "components", RANK, mode="offline", store=str(tmp_path / "None"))
    with pytest.raises(StoreError, match=r"another plan.map: \{.*\}, not None"):
        built(world, teachers, "whole-heads", None, mode="offline", store=str(tmp_path / f"{RANK}"))


def test_a_rank_above_a_teachers_features_is_refused(world: World, teachers: dict[str, list[str]]) -> None:
    with pytest.raises(FieldError, match=r"^align.basis_rank: got 7, but the teacher has only 6 features per layer"):
        built(world, teachers, "too-many", 7)
