"""Tests of checkpoints: completeness, retention, and resuming only with equal settings."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kvcore.errors import ConfigError
from kvcore.types import Tensor
from student_trainer.config import TrainConfig
from student_trainer.loop import checkpoint
from tests.support.plain_engine import PlainEngine
from tests.support.training_parts import one_rank

CONFIG = TrainConfig.model_validate_json(
    json.dumps({"student": {"path": "tiny"}, "data": {"train": "t.jsonl"}, "run": {"output_dir": "out", "steps": 9}})
)
IDENTITY = {
    "optim": {"lr": 0.1, "betas": [0.9, 0.99]},
    "run": {"seed": 0, "steps": 9},
    "teachers": {"ada": ["f0", "a1"]},
}


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    with one_rank():
        yield


class Halver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trained = nn.Linear(3, 2)
        self.fixed = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.trained(x).square().mean()}


def stepped(steps: int) -> PlainEngine:
    engine = PlainEngine(Halver(), CONFIG, 1)
    for step in range(steps):
        engine.micro_step(torch.full((1, 3), step + 1.0))
    return engine


def saved(directory: Path, step: int, keep: int = 9) -> Path:
    state = {"step": step, "best": None, "identity": IDENTITY}
    return checkpoint.save(directory, stepped(step), {"fused/scale": torch.arange(6.0).view(2, 3).T}, state, keep)


def test_weights_moments_and_frozen_tensors_are_restored(tmp_path: Path) -> None:
    path = saved(tmp_path, 3)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.path, found.step, found.state["identity"]) == (path, 3, IDENTITY)
    assert found.frozen()["fused/scale"].equal(torch.arange(6.0).view(2, 3).T)
    module = Halver()
    found.load_weights(module)
    resumed = PlainEngine(module, CONFIG, 1)
    found.restore(resumed)
    whole = stepped(3)
    for engine in (whole, resumed):
        engine.micro_step(torch.full((1, 3), 4.0))
    for ours, theirs in ((resumed.weights(), whole.weights()), (resumed.moments(), whole.moments())):
        assert ours.keys() == theirs.keys()
        assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    with pytest.raises(AssertionError, match=r"another model.*trained\.bias"):
        found.load_weights(nn.Linear(3, 2))


def test_latest_is_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nothing") is None
    for step in (2, 10):
        saved(tmp_path, step)
    (tmp_path / "step-00000011").mkdir()
    (tmp_path / "step-00000011" / checkpoint.WEIGHTS).write_bytes(b"half")
    unfinished = tmp_path / ".step-00000012.tmp"
    unfinished.mkdir()
    (unfinished / checkpoint.STATE).write_text("{}", encoding="utf-8")
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 10


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        saved(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_saving_a_step_again_replaces_an_interrupted_save(tmp_path: Path) -> None:
    for name in ("step-00000002", ".step-00000002.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rubbish").touch()
    path = saved(tmp_path, 2)
    names = {checkpoint.WEIGHTS, checkpoint.MOMENTS, checkpoint.FROZEN, checkpoint.STATE}
    assert {file.name for file in path.iterdir()} == names
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_resumes_with_the_same_settings(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    checkpoint.check_same_run(found, copy.deepcopy(IDENTITY))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"optim": {"lr": 0.2, "betas": [0.9, 0.99]}}, ("optim", "0.1", "0.2")),
        ({"teachers": {"ada": ["f1", "a1"]}}, ("teachers", "f0", "f1")),
        ({"weights": {"ada": 1.0}}, ("weights", "None", "1.0")),
    ],
)
def test_resume_with_other_settings_raises_with_both_values_and_next_step(
    tmp_path: Path, change: dict[str, Any], named: tuple[str, ...]
) -> None:
    path = saved(tmp_path, 1)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    with pytest.raises(ConfigError) as caught:
        checkpoint.check_same_run(found, IDENTITY | change)
    for part in (*named, str(path), "run.resume=never"):
        assert part in str(caught.value)
    assert "'seed'" not in str(caught.value), "settings that agree are left out"


def test_forget_removes_all_checkpoints(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints", 1)
    checkpoint.forget(tmp_path / "checkpoints")
    checkpoint.forget(tmp_path / "checkpoints")
    assert checkpoint.latest(tmp_path / "checkpoints") is None
