"""Training runs whose teachers map their K/V into the student's shape (`align.map_at: teacher`)."""

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

LAYERS = 2  # Of the student, and so of a plan with the layer map `uniform`.
TOKEN_MODE: dict[str, Any] = {
    "student": {"mode": "token"},
    "kv": {"selection": {"selector": "full", "span": "all"}},
    "align": {"tokens": "overlap", "head_adapter": "procrustes"},
}
ROUTER: dict[str, Any] = {"fuse": {"kind": "learnable"}, "loss": {"kv_weight": "auto"}}


def run_of(world: World, name: str, endpoints: Endpoints, map_at: str = "teacher", **changes: Any) -> dict[str, Any]:
    """A run that fuses two teachers in the codec `raw`; `changes` as in `World.config`."""
    align = {"calibration_samples": 48, "settled_within": 0.0, "map_at": map_at} | changes.pop("align", {})
    kv = {"codec": {"name": "raw"}, "selection": {"selector": "r_kv", "budget": LATENTS}} | changes.pop("kv", {})
    run = {"steps": 8, "save_every": 0} | changes.pop("run", {})
    fuse = changes.pop("fuse", {})
    return world.config(name, endpoints, align=align, kv=kv, run=run, **changes) | {"fuse": fuse}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="latent"),
        pytest.param(ROUTER, id="router", marks=pytest.mark.nightly),
        pytest.param(TOKEN_MODE, id="token"),
    ],
)
def test_losses_are_those_of_a_run_that_maps_in_the_trainer(
    world: World, endpoints: Endpoints, tmp_path: Path, changes: dict[str, Any]
) -> None:
    runs = [run_of(world, str(tmp_path / at), endpoints, at, **changes) for at in ("trainer", "teacher")]
    at_trainer, at_teacher = train(runs, 2, tmp_path)
    assert_same_losses(at_trainer, at_teacher, 1e-4)
    report = json.loads((at_teacher / "alignment.json").read_text(encoding="utf-8"))["teachers"]["ben"]
    assert report["head_adapter"] == "mapped"
    assert report["teacher"] == {"layers": 4, "heads": 1, "head_dim": 16}
    if changes is TOKEN_MODE:
        return
    raw = CodecSpec(name="raw")
    # One KV head of 16 instead of two of 16 and four of 8.
    whole = LAYERS * sum(layer_bytes(raw, *shape) for shape in ((2, LATENTS, 16), (4, LATENTS, 8)))
    assert set(metrics(at_trainer, "kv/bytes_per_sample").values()) == {whole}
    assert set(metrics(at_teacher, "kv/bytes_per_sample").values()) == {whole / 2}
    assert whole / 2 == 2 * LAYERS * layer_bytes(raw, 1, LATENTS, 16)


@pytest.mark.parametrize(
    ("codec", "warmup", "ranks"), [("raw", 0, 2), ("int4", 4, 1), ("pca", 4, 2)], ids=["raw", "int4", "pca"]
)
def test_recording_and_offline_give_the_online_losses_and_the_store_keeps_the_map(
    world: World, endpoints: Endpoints, tmp_path: Path, codec: str, warmup: int, ranks: int
) -> None:
    store = tmp_path / "store"
    run, align = {"steps": None, "epochs": 1}, {"warmup_steps": warmup}
    kv: dict[str, Any] = {"codec": {"name": codec}}
    recording, replay = ({"mode": mode, "store": str(store)} | kv for mode in ("record", "offline"))
    runs = [
        run_of(world, f"{codec}-online", endpoints, run=run, align=align, kv=kv),
        run_of(world, f"{codec}-record", endpoints, run=run, align=align, kv=recording),
    ]
    by_online, by_record = train(runs, ranks, tmp_path)
    nobody = [{"name": "ada"}, {"name": "ben"}]
    offline = run_of(world, f"{codec}-offline", endpoints, run=run, align=align, kv=replay, teachers=nobody)
    (by_offline,) = train([offline], ranks, tmp_path)
    assert (store / "ada/index.json").is_file(), "no writer merged the index"
    assert_same_losses(by_online, by_record, 0.0)
    assert_same_losses(by_record, by_offline, 0.0, (*LOSSES, "val/kv_loss", "val/task_metrics/accuracy"))
    for name in ("ada", "ben"):
        kv_map, plan = stored_map(store / name), read_manifest(store / name).plan
        assert kv_map is not None
        assert plan.map == kv_map.named
        assert (kv_map.named.heads, kv_map.named.head_dim) == (1, 16)
    wrong = run_of(world, f"{codec}-wrong", endpoints, "trainer", run=run, kv=replay, teachers=nobody)
    process, log = start_cli(wrong, 1, tmp_path)
    assert process.wait(120) != 0
    problem = "was recorded with align.map_at" if codec == "pca" else "the store has another plan.map"
    assert problem in log.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("codec", "warmup"), [pytest.param("raw", 0, marks=pytest.mark.nightly), ("raw", 4), ("pca", 4)]
)
def test_a_resumed_run_uses_the_same_map_and_equals_the_uninterrupted_one(
    world: World, endpoints: Endpoints, tmp_path: Path, codec: str, warmup: int
) -> None:
    changes: dict[str, Any] = {
        "align": {"warmup_steps": warmup},
        "run": {"save_every": 2, "keep_checkpoints": 9},
        "kv": {"codec": {"name": codec}},
    }
    (whole,) = train([run_of(world, f"whole-{codec}-{warmup}", endpoints, **changes)], 2, tmp_path)
    resumed: list[dict[str, Any]] = []
    # In the warm-up, at its end, and after it.
    for step in (2, 4, 6):
        copy = tmp_path / f"from-{step}"
        copy_checkpoint(whole, step, copy)
        config = run_of(world, "unused", endpoints, **changes)
        config["run"]["output_dir"] = str(copy)
        resumed.append(config)
    saved = latest(whole / "checkpoints")
    assert saved is not None
    assert saved.maps().keys() == {"ada", "ben"}
    for step, again in zip((2, 4, 6), train(resumed, 2, tmp_path), strict=True):
        assert_same_losses(whole, again, 0.0)
        ours = latest(again / "checkpoints")
        assert ours is not None
        if step > warmup:
            assert {name: one.named for name, one in ours.maps().items()} == {
                name: one.named for name, one in saved.maps().items()
            }
