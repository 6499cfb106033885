"""Tests of runs whose optimiser is in host memory: the losses, checkpoints and models of runs without offload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kvcore.types import Tensor
from tests.support.training import OTHER_ORDER, Endpoints, World, assert_same_losses, copy_checkpoint, train

pytestmark = pytest.mark.slow


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "checkpoints/step-00000006/weights.safetensors")


@pytest.mark.nightly
def test_an_offloaded_optimizer_takes_the_same_steps_and_resumes(
    world: World, endpoints: Endpoints, tmp_path: Path
) -> None:
    def config(name: str, stage: int, *, offload: bool = True) -> dict[str, Any]:
        run = {"output_dir": str(tmp_path / name), "zero_stage": stage, "offload_optimizer": offload, "save_every": 3}
        return world.config("unused", endpoints, run=run)

    stages = [config(f"zero{stage}", stage) for stage in (1, 2, 3)]
    plain, *offloaded = train([config("plain", 2, offload=False), *stages], 2, tmp_path)
    for output in offloaded:
        assert_same_losses(plain, output, OTHER_ORDER)
    resumed = [config(f"resumed{stage}", stage) for stage in (2, 3)]
    for one in resumed:
        copy_checkpoint(tmp_path / "zero2", 3, Path(one["run"]["output_dir"]))
    same_stage, other_stage = train(resumed, 2, tmp_path)
    assert_same_losses(offloaded[1], same_stage, 0.0)
    assert_same_losses(offloaded[1], other_stage, OTHER_ORDER)
    ours, theirs = weights(same_stage), weights(offloaded[1])
    assert all(ours[name].equal(theirs[name]) for name in theirs)
