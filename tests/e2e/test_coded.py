"""Training runs with the codec `pca`: whole heads or components, recorded, offline, resumed, and with a calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcore.store.manifest import read_manifest, stored_map
from student_trainer.loop.checkpoint import latest
from tests.support.training import (
    LOSSES,
    Endpoints,
    World,
    assert_same_losses,
    copy_checkpoint,
    metrics,
    start_cli,
    train,
)

pytestmark = pytest.mark.slow


def coded(world: World, name: str, endpoints: Endpoints, quality: float = 0.05, **changes: Any) -> dict[str, Any]:
    """A run with two teachers in the direction `to_teacher`; `changes` as in `World.config`."""
    align = {"calibration_samples": 48, "direction": "to_teacher"} | changes.pop("align", {})
    kv = {"codec": {"name": "pca", "quality": quality}} | changes.pop("kv", {})
    run = {"steps": 12, "save_every": 6} | changes.pop("run", {})
    return world.config(name, endpoints, align=align, kv=kv, run=run, **changes)


def test_coarser_codes_take_fewer_bytes_and_fine_ones_train_like_fp32(
    world: World, endpoints: Endpoints, tmp_path: Path
) -> None:
    runs = [coded(world, "fine", endpoints, 0.001), coded(world, "coarse", endpoints, 0.3)]
    runs += [
        coded(world, "components", endpoints, 0.1, align={"basis_rank": 4}),
        coded(world, "raw", endpoints, kv={"codec": {"name": "raw"}}),
    ]
    fine, coarse, components, raw = train(runs, 2, tmp_path)
    assert_same_losses(fine, raw, 0.01)
    sizes = [max(metrics(run, "kv/bytes_per_sample").values()) for run in (components, coarse, fine, raw)]
    assert sizes == sorted(sizes)
    assert sizes[1] < sizes[3] / 4


def test_a_recording_and_offline_runs_equal_the_online_run(world: World, endpoints: Endpoints, tmp_path: Path) -> None:
    store = tmp_path / "store"
    codec = {"codec": {"name": "pca", "quality": 0.05}}
    run = {"steps": None, "epochs": 1, "save_every": 0}
    online = coded(world, "coded-online", endpoints, run=run)
    record = coded(world, "coded-record", endpoints, run=run, kv=codec | {"mode": "record", "store": str(store)})
    by_online, by_record = train([online, record], 2, tmp_path)
    nobody = [{"name": "ada"}, {"name": "ben"}]
    replay = codec | {"mode": "offline", "store": str(store)}
    (by_offline,) = train([coded(world, "coded-offline", endpoints, run=run, kv=replay, teachers=nobody)], 2, tmp_path)
    assert_same_losses(by_online, by_record, 0.0)
    assert_same_losses(by_record, by_offline, 0.0, (*LOSSES, "val/kv_loss", "val/task_metrics/accuracy"))
    for name in ("ada", "ben"):
        kv_map, plan = stored_map(store / name), read_manifest(store / name).plan
        assert kv_map is not None
        assert (plan.map, plan.codec.name) == (kv_map.named, "pca")


def test_a_resumed_run_keeps_its_maps_and_refuses_another_quality(
    world: World, endpoints: Endpoints, tmp_path: Path
) -> None:
    (whole,) = train([coded(world, "coded-whole", endpoints, run={"keep_checkpoints": 9})], 2, tmp_path)
    copy_checkpoint(whole, 6, tmp_path / "copy")
    config = coded(world, "unused", endpoints)
    config["run"]["output_dir"] = str(tmp_path / "copy")
    (again,) = train([config], 2, tmp_path)
    assert_same_losses(whole, again, 0.0)
    ours, theirs = latest(again / "checkpoints"), latest(whole / "checkpoints")
    assert ours is not None
    assert theirs is not None
    names = [{name: one.named for name, one in each.maps().items()} for each in (ours, theirs)]
    assert names[0] == names[1]
    config["kv"]["codec"]["quality"] = 0.2
    config["run"]["steps"] = 12
    copy_checkpoint(whole, 6, tmp_path / "other")
    config["run"]["output_dir"] = str(tmp_path / "other")
    process, log = start_cli(config, 1, tmp_path)
    assert process.wait(120) != 0
    assert "kv.codec.quality: 0.05 then, 0.2 now" in log.read_text(encoding="utf-8")
    assert json.loads((whole / "alignment.json").read_text(encoding="utf-8"))["teachers"]["ada"]["teacher"]["heads"] > 1
