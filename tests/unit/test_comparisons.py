"""Tests of the configurations that comparisons pass to the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.comparisons import bad_teacher, directions, selectors, token_pairs
from experiments.demo.demo_config import QUICK
from kvcore.config import parse
from kvcore.plan import SELECTORS
from student_trainer.config import TrainConfig

PORTS = {"teacher_a": 50051, "teacher_b": 50052, bad_teacher.BAD: 50053, selectors.TEACHER: 50054}


@pytest.mark.parametrize("module", [bad_teacher, directions, selectors, token_pairs])
def test_runs_are_valid_and_start_from_models_of_earlier_runs(module, tmp_path: Path) -> None:
    plan = module.make(tmp_path, QUICK, range(3)).plan(Path("student"), PORTS)
    made = {"student"}
    for run in plan:
        config = parse(run["config"], TrainConfig)
        assert config.student.path in made
        assert config.run.output_dir.is_relative_to(tmp_path)
        made.add(str(config.run.output_dir / "best_model"))
    assert len({run["config"]["run"]["output_dir"] for run in plan}) == len(plan) == len({run["name"] for run in plan})


def test_selector_comparison_has_every_selector_and_both_controls(tmp_path: Path) -> None:
    names = {arm.name for arm in selectors.make(tmp_path, QUICK, range(1)).arms}
    assert names == {*SELECTORS, "no KV", "shuffled KV"} - {"r_kv_centred"}


def test_all_other_arms_use_the_bad_teacher(tmp_path: Path) -> None:
    arms = {arm.name: arm for arm in bad_teacher.make(tmp_path, QUICK, range(1)).arms}
    assert {name for name, arm in arms.items() if bad_teacher.BAD not in arm.teachers} == {"two good teachers", "no KV"}
