"""Training runs whose teachers send the components of a basis of their own (`align.basis_rank`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcore.plan import CodecSpec
from kvcore.store.manifest import read_manifest, stored_map
from kvcore.tensors.codec import layer_bytes
from student_trainer.loop.checkpoint import latest
from tests.support.training import (
    LATENTS,
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

RANK = 4
LAYERS = 2  # Of the student, and so of a plan with the layer map `uniform`.


def basis(world: World, name: str, endpoints: Endpoints, **changes: Any) -> dict[str, Any]:
    """A run with two teachers in the codec `raw`, in the direction `to_teacher`; `changes` as in `World.config`."""
    align = {"calibration_samples": 48, "direction": "to_teacher", "basis_rank": RANK} | changes.pop("align", {})
    kv = {"codec": {"name": "raw"}} | changes.pop("kv", {})
    run = {"steps": 12, "save_every": 6} | changes.pop("run", {})
    return world.config(name, endpoints, align=align, kv=kv, run=run, **changes)


@pytest.mark.nightly
def test_components_train_the_student_with_the_bytes_of_their_number(
    world: World, endpoints: Endpoints, tmp_path: Path
) -> None:
    longer = {"steps": 30}
    runs = [
        basis(world, "components", endpoints, run=longer),
        basis(world, "whole", endpoints, align={"basis_rank": None}, run=longer),
        basis(world, "int8", endpoints, kv={"codec": {"name": "int8"}}, align={"layer_map": "cka"}, run=longer),
    ]
    components, whole, int8 = train(runs, 2, tmp_path)
    for run in (components, whole, int8):
        losses = list(metrics(run, "train/kv_loss").values())
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), run.name
    raw = CodecSpec(name="raw")
    # Two KV heads of 16 and four of 8.
    expected = LAYERS * sum(layer_bytes(raw, *shape) for shape in ((2, LATENTS, 16), (4, LATENTS, 8)))
    assert set(metrics(whole, "kv/bytes_per_sample").values()) == {expected}
    assert set(metrics(components, "kv/bytes_per_sample").values()) == {expected * 2 * RANK / (2 * 16 + 4 * 8)}
    report = json.loads((components / "alignment.json").read_text(encoding="utf-8"))["teachers"]["ada"]
    assert report["teacher"] == {"layers": 3, "heads": 1, "head_dim": RANK}


def test_recording_and_offline_give_the_online_losses_and_the_store_keeps_the_map(
    world: World, endpoints: Endpoints, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    run = {"steps": None, "epochs": 1, "save_every": 0}
    recording = {"mode": "record", "store": str(store)}
    online = basis(world, "basis-online", endpoints, run=run)
    record = basis(world, "basis-record", endpoints, run=run, kv=recording)
    by_online, by_record = train([online, record], 2, tmp_path)
    nobody = [{"name": "ada"}, {"name": "ben"}]
    replay = {"mode": "offline", "store": str(store)}
    offline = basis(world, "basis-offline", endpoints, run=run, kv=replay, teachers=nobody)
    (by_offline,) = train([offline], 2, tmp_path)
    assert_same_losses(by_online, by_record, 0.0)
    assert_same_losses(by_record, by_offline, 0.0, (*LOSSES, "val/kv_loss", "val/task_metrics/accuracy"))
    for name in ("ada", "ben"):
        kv_map, plan = stored_map(store / name), read_manifest(store / name).plan
        assert kv_map is not None
        assert plan.map == kv_map.named
        assert (kv_map.named.heads, kv_map.named.head_dim) == (1, RANK)
    # Another rank, and a run that wants whole heads, are refused by name.
    for number, (changes, problem) in enumerate(
        [
            (
                {"basis_rank": RANK + 1},
                f"align.basis_rank: got {RANK + 1}, and the store {store / 'ada'} holds 1 h",
            ),
            ({"basis_rank": None}, "the store has another plan.map"),
        ]
    ):
        wrong = basis(world, f"wrong-{number}", endpoints, run=run, kv=replay, teachers=nobody, align=changes)
        process, log = start_cli(wrong, 1, tmp_path)
        assert process.wait(120) != 0
        assert problem in log.read_text(encoding="utf-8")


@pytest.mark.nightly
@pytest.mark.parametrize("warmup", [0, 4])
def test_a_resumed_run_uses_the_same_map_and_equals_the_uninterrupted_one(
    world: World, endpoints: Endpoints, tmp_path: Path, warmup: int
) -> None:
    changes: dict[str, Any] = {"align": {"warmup_steps": warmup}, "run": {"save_every": 3, "keep_checkpoints": 9}}
    (whole,) = train([basis(world, f"basis-whole-{warmup}", endpoints, **changes)], 2, tmp_path)
    resumed: list[dict[str, Any]] = []
    for step in (3, 9):
        copy = tmp_path / f"from-{step}"
        copy_checkpoint(whole, step, copy)
        config = basis(world, "unused", endpoints, **changes)
        config["run"]["output_dir"] = str(copy)
        resumed.append(config)
    for again in train(resumed, 2, tmp_path):
        assert_same_losses(whole, again, 0.0)
        ours, theirs = latest(again / "checkpoints"), latest(whole / "checkpoints")
        assert ours is not None
        assert theirs is not None
        assert {name: one.named for name, one in ours.maps().items()} == {
            name: one.named for name, one in theirs.maps().items()
        }
