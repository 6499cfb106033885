"""Tests of three stages (fixed, similarity, learnable) in one command, and of routing under every ZeRO stage."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.support.servers import REPOSITORY, wait_until
from tests.support.training import (
    LATENTS,
    LOSSES,
    OTHER_ORDER,
    Endpoints,
    World,
    assert_same_losses,
    metrics,
    start_cli,
    train,
)

pytestmark = pytest.mark.slow

STAGES = ("stage1_fixed", "stage2_similarity", "stage3_learnable")
SHIPPED = REPOSITORY / "configs" / "train" / "three_stage.yaml"


def three_stages(world: World, endpoints: Endpoints, output: Path) -> dict[str, Any]:
    """The configuration file of the repository, with tiny models and few steps."""
    config = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    tiny = world.config("unused", endpoints)
    for section in ("student", "data", "optim", "run", "teachers"):
        config[section] = tiny[section]
    config["align"]["calibration_samples"] = 48
    config["kv"]["selection"]["budget"] = LATENTS
    config["kv"]["patience_s"] = 3.0
    config["run"] |= {"output_dir": str(output), "save_every": 2, "eval_every": 3}
    return config


def finish(process: subprocess.Popen[bytes], log: Path) -> str:
    try:
        assert process.wait(300) == 0, log.read_text(encoding="utf-8")[-6000:]
    finally:
        process.kill()
    return log.read_text(encoding="utf-8")


def stopped_in_stage_two(config: dict[str, Any], directory: Path) -> None:
    """Stop the command with SIGTERM once its second stage has logged a step."""
    process, log = start_cli(config, 2, directory)
    second = Path(config["run"]["output_dir"]) / STAGES[1] / "metrics.jsonl"

    def has_begun() -> bool:
        assert process.poll() is None, log.read_text(encoding="utf-8")[-4000:]
        return second.is_file() and second.stat().st_size > 0

    wait_until(has_begun, 200)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) != 0


def test_three_stages_run_in_one_command_and_resume_after_an_interruption(
    world: World, endpoints: Endpoints, tmp_path: Path
) -> None:
    whole, cut = (three_stages(world, endpoints, tmp_path / name) for name in ("whole", "cut"))
    for name in ("whole", "cut"):
        (tmp_path / f"{name}-log").mkdir()
    val = tmp_path / "val.jsonl"
    val.write_bytes(Path(cut["data"]["val"]).read_bytes())
    cut["data"] = cut["data"] | {"val": str(val)}
    log_text = finish(*start_cli(whole, 2, tmp_path / "whole-log"))
    for index, stage in enumerate(STAGES):
        directory = tmp_path / "whole" / stage
        assert f"stage {index + 1} of 3, {stage}: from " in log_text
        assert (directory / "best_model" / "latent.safetensors").is_file()
        assert list((directory / "tensorboard").iterdir())
        results = json.loads((directory / "eval_results.json").read_text(encoding="utf-8"))
        assert results["average"] == results["val"]["score"]
        assert results["val"]["num_examples"] == 10
        assert len(results["val"]["kv_error"]["k"]) == 2
        alignment = json.loads((directory / "alignment.json").read_text(encoding="utf-8"))
        assert alignment["teachers"].keys() == endpoints.keys()
        if index > 0:
            assert f"{stage}: from {tmp_path / 'whole' / STAGES[index - 1] / 'best_model'}" in log_text
            weights = [metrics(directory, f"routing/weights_mean/{name}") for name in endpoints]
            for step in weights[0]:
                assert sum(by_step[step] for by_step in weights) == pytest.approx(1.0, abs=1e-5)
    assert metrics(tmp_path / "whole" / STAGES[2], "routing/router_loss").keys() == set(range(1, 7))

    stopped_in_stage_two(cut, tmp_path / "cut-log")
    log_text = finish(*start_cli(cut, 2, tmp_path / "cut-log"))
    assert f"{STAGES[0]}: done before" in log_text
    for stage in STAGES:
        assert_same_losses(tmp_path / "whole" / stage, tmp_path / "cut" / stage, 0.0)

    log_text = finish(*start_cli(cut, 2, tmp_path / "cut-log"))
    assert log_text.count(": done before") == 3
    changed = {**cut, "loss": cut["loss"] | {"kv_weight": 2.0}}
    for again in (changed, cut):
        process, log = start_cli(again, 1, tmp_path / "cut-log")
        assert process.wait(120) != 0
        assert "holds a finished stage of other settings" in log.read_text(encoding="utf-8")
        # The same settings, but other data under the same path.
        val.write_bytes(val.read_bytes() + b"\n")


@pytest.mark.nightly
def test_routing_gives_the_same_losses_under_every_zero_stage_and_with_checkpointing(
    world: World, endpoints: Endpoints, tmp_path: Path
) -> None:
    trained = {"head_adapter": "linear", "layer_map": "learned"}
    fuse = {"kind": "learnable", "router": "attention"}

    def run(name: str, stage: int, **student: Any) -> dict[str, Any]:
        config = world.config(
            name, endpoints, align=trained, student=student, run={"zero_stage": stage, "save_every": 3}
        )
        return config | {"fuse": fuse}

    configs = [run("plain", 0), run("zero2", 2), run("zero3", 3), run("checkpointed", 3, gradient_checkpointing=True)]
    plain, *others = train(configs, 2, tmp_path)
    for other in others:
        assert_same_losses(plain, other, OTHER_ORDER, (*LOSSES, "routing/router_loss", "routing/entropy"))
    first, last = (load_file(plain / f"checkpoints/step-0000000{step}/weights.safetensors") for step in (3, 6))
    moved = {name for name in first if not first[name].equal(last[name])}
    for part in ("fusion.router", "logits_SL", "maps.k", "student.lm"):
        assert any(part in name for name in moved), part


def test_the_automatic_kv_weight_is_kept_in_checkpoints(world: World, endpoints: Endpoints, tmp_path: Path) -> None:
    config = world.config("auto", endpoints, loss={"kv_weight": "auto"}, run={"save_every": 3})
    (run,) = train([config], 2, tmp_path)
    saved = load_file(run / "checkpoints/step-00000006/frozen.safetensors")["kv_weight"]
    assert float(saved) > 0
    losses = (metrics(run, f"train/{name}") for name in ("loss", "ce_loss", "kv_objective"))
    for loss, ce_loss, objective in zip(*(by_step.values() for by_step in losses), strict=True):
        assert loss == pytest.approx(ce_loss + float(saved) * objective, rel=1e-4)
