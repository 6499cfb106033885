"""Tests of the start under ZeRO-3: ranks load partitions, never the whole student, and train as from a whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import save_tiny_model, tiny_spec
from tests.support.training import OTHER_ORDER, Endpoints, World, assert_same_losses, metrics, start_training, train

pytestmark = pytest.mark.slow


def start(config: dict[str, Any], directory: Path) -> list[dict[str, float]]:
    """What two ranks measured when they built the run's context."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    log = directory / "log"
    command = ["tests.support.memory_at_start", str(directory / "config.json"), str(directory)]
    process = start_training(command, 2, log)
    try:
        assert process.wait(300) == 0, log.read_text(encoding="utf-8")[-6000:]
    finally:
        process.kill()
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.nightly
def test_only_the_reading_rank_ever_holds_the_whole_student(
    world: World, endpoints: Endpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise the C library keeps freed memory, and the peak is not what the ranks held.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    # 215 MB, so that the memory of everything else is small beside it.
    path = save_tiny_model(tmp_path / "student", tiny_spec("qwen3", layers=24, hidden=512, heads=8, head_dim=64))
    size = (path / "model.safetensors").stat().st_size
    student, align = {"path": str(path)}, {"calibration_samples": 8, "layer_map": "uniform"}
    whole, shared = (
        start(
            world.config("unused", endpoints, student=student, align=align, run={"zero_stage": stage}),
            tmp_path / f"zero{stage}",
        )
        for stage in (2, 3)
    )
    assert all(rank["held"] == pytest.approx(size / 2, rel=0.01) for rank in shared)
    assert whole[1]["peak"] > size
    assert shared[1]["peak"] < size
    assert whole[1]["peak"] - shared[1]["peak"] > 0.4 * size


@pytest.mark.nightly
def test_a_student_loaded_in_partitions_trains_like_a_whole_one(
    world: World, endpoints: Endpoints, tmp_path: Path
) -> None:
    tied = tiny_spec("llama", layers=2, kv_heads=1, seed=3, extra={"tie_word_embeddings": True})
    students: dict[str, dict[str, Any]] = {
        "tied": {"path": str(save_tiny_model(tmp_path / "tied", tied))},
        "lora": {"lora": {"r": 4, "dropout": 0.0}},
    }
    configs = [
        world.config(
            f"{name}-{stage}",
            endpoints,
            student=student | {"gradient_checkpointing": True},
            align={"warmup_steps": 2},
            loss={"kv_weight": "auto"},
            run={"zero_stage": stage},
        )
        for name, student in students.items()
        for stage in (2, 3)
    ]
    runs = train(configs, 2, tmp_path)
    for whole, shared in (runs[:2], runs[2:]):
        assert_same_losses(whole, shared, OTHER_ORDER, ("train/ce_loss", "train/kv_loss"))
        # The total is the KV loss times a large weight.
        for name in ("train/kv_weight", "train/loss"):
            found = metrics(whole, name)
            assert found
            assert metrics(shared, name) == pytest.approx(found, rel=1e-5), name
