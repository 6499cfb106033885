"""Tests of checkpoints: completeness, retention, and resuming only with equal settings."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kvcore.errors import ConfigError, OutputError
from kvcore.types import Tensor
from student_trainer.config import TrainConfig
from student_trainer.loop import checkpoint
from tests.support.file_modes import modes, umask
from tests.support.plain_engine import PlainEngine
from tests.support.small_disk import small_files_only
from tests.support.training_parts import one_rank

CONFIG = TrainConfig.model_validate_json(
    json.dumps({"student": {"path": "tiny"}, "data": {"train": "t.jsonl"}, "run": {"output_dir": "out", "steps": 9}})
)
IDENTITY = {
    "optim": {"lr": 0.1, "weight_decay": 0.01},
    "run": {"seed": 0, "steps": 9},
    "teachers": {
        "ada": {
            "weights": "f0",
            "tokenizer": "a1",
            "plan_digest": "d0",
            "plan": {"layers": [0, 1], "selection": {"selector": "r_kv", "budget": 24}},
        }
    },
    "weights": {"ada": 1.0},
    "control": "none",
    "data": {"records": 9, "content": "c0", "formats": ["plain"]},
    "student": {"path": "s", "lora": None, "weights": ["e0"]},
}


def changed(**changes: object) -> dict[str, Any]:
    """The identity with other values; `a__b` is the path of a.b."""
    identity = copy.deepcopy(IDENTITY)
    for path, value in changes.items():
        *parents, last = path.split("__")
        node: Any = identity
        for name in parents:
            node = node[name]
        node[last] = value
    return identity


ADA = "teachers__ada"


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


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, empty, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", [*checkpoint.TENSORS, checkpoint.STATE])
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], name: str
) -> None:
    older, newer = saved(tmp_path, 2), saved(tmp_path, 4)
    damage(newer / name)
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest_intact(tmp_path)
    assert found is not None
    assert found.path == older
    (warning,) = (record.getMessage() for record in caplog.records)
    assert str(newer / name) in warning
    assert f"resumes from {older}" in warning
    saved(tmp_path, 4, keep=1)
    again = checkpoint.newest_intact(tmp_path)
    assert again is not None
    assert again.step == 4, "the damaged checkpoint does not stand in the way of a new one"


def test_a_digit_changed_in_the_state_is_noticed(tmp_path: Path) -> None:
    older, newer = saved(tmp_path, 2), saved(tmp_path, 4)
    state = (newer / checkpoint.STATE).read_text(encoding="utf-8")
    (newer / checkpoint.STATE).write_text(state.replace('"step": 4', '"step": 5'), encoding="utf-8")
    found = checkpoint.newest_intact(tmp_path)
    assert found is not None
    assert found.path == older


def test_a_state_that_was_saved_again_is_intact(tmp_path: Path) -> None:
    saved(tmp_path, 4)
    saved(tmp_path, 4)
    found = checkpoint.newest_intact(tmp_path)
    assert found is not None
    assert found.step == 4


def test_only_damaged_checkpoints_are_an_error_that_keeps_them(tmp_path: Path) -> None:
    assert checkpoint.newest_intact(tmp_path) is None
    paths = [saved(tmp_path, 2), saved(tmp_path, 4)]
    for path in paths:
        empty(path / checkpoint.MOMENTS)
    with pytest.raises(ConfigError) as caught:
        checkpoint.newest_intact(tmp_path)
    for part in (*(str(path / checkpoint.MOMENTS) for path in paths), "run.resume=never"):
        assert part in str(caught.value)
    assert sorted(tmp_path.iterdir()) == paths


def test_a_full_disk_keeps_the_earlier_checkpoints_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = saved(tmp_path, 2)
    with pytest.raises(OutputError, match="File too large"), small_files_only(50):
        saved(tmp_path, 4, keep=1)
    assert list(tmp_path.iterdir()) == [path]


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
    ("now", "difference"),
    [
        (changed(optim__lr=0.2), "optim.lr: 0.1 then, 0.2 now"),
        (
            changed(**{f"{ADA}__plan_digest": "d1", f"{ADA}__plan__selection__selector": "keydiff"}),
            "kv.selection.selector: 'r_kv' then, 'keydiff' now",
        ),
        (
            changed(**{f"{ADA}__plan_digest": "d1", f"{ADA}__plan__layers": [0]}),
            "layers asked of teacher 'ada': [0, 1] then, [0] now",
        ),
        (changed(**{f"{ADA}__weights": "f1"}), "teacher 'ada': its weights changed"),
        (changed(**{f"{ADA}__tokenizer": "a2"}), "teacher 'ada': its tokenizer changed"),
        (changed(teachers__ben={"weights": "f0"}), "teachers: 'ben' is new"),
        (changed(teachers={}), "teachers: 'ada' is missing now"),
        (changed(weights__ada=2.0), "teachers: weight of 'ada': 1.0 then, 2.0 now"),
        (changed(control="shuffled"), "kv.control: 'none' then, 'shuffled' now"),
        (changed(data__records=8), "data.train: records: 9 then, 8 now"),
        (changed(data__content="c1"), "data.train: its content has changed"),
        (changed(student__weights=["e1"]), "student.path: its weights have changed"),
        (changed(student__lora={"r": 8}), "student.lora: None then, {'r': 8} now"),
    ],
)
def test_a_refused_resume_names_each_setting_with_both_values_and_no_hash(
    tmp_path: Path, now: dict[str, Any], difference: str
) -> None:
    path = saved(tmp_path, 1)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    with pytest.raises(ConfigError) as caught:
        checkpoint.check_same_run(found, now)
    message = str(caught.value)
    assert message.startswith(f"{path} belongs to a run with other settings ({difference}); restore them")
    assert "run.resume=never" in message


def test_options_that_do_not_change_the_kv_may_differ(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    checkpoint.check_same_run(found, changed(**{f"{ADA}__plan__selection__budget": 25}))


def test_forget_removes_all_checkpoints(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints", 1)
    checkpoint.forget(tmp_path / "checkpoints")
    checkpoint.forget(tmp_path / "checkpoints")
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_all_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    with umask(0o007):
        path = saved(tmp_path, 1)
    found = modes(path)
    assert len(found) > 2
    assert set(found.values()) == {"660"}, found
