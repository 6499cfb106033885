"""What each comparison asks of the trainer: configurations that it takes, in an order in which they can run."""

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
def test_every_run_of_a_plan_is_valid_and_starts_from_what_is_there_by_then(module, tmp_path: Path) -> None:
    plan = module.make(tmp_path, QUICK, 3).plan(Path("student"), PORTS)
    made = {"student"}
    for run in plan:
        config = parse(run["config"], TrainConfig)
        assert config.student.path in made
        assert config.run.output_dir.is_relative_to(tmp_path)
        made.add(str(config.run.output_dir / "best_model"))
    assert len({run["config"]["run"]["output_dir"] for run in plan}) == len(plan) == len({run["name"] for run in plan})


def test_the_selector_comparison_holds_every_selector_and_both_controls(tmp_path: Path) -> None:
    names = {way.name for way in selectors.make(tmp_path, QUICK, 1).ways}
    assert names == {*SELECTORS, "no KV", "shuffled KV"}


def test_the_bad_teacher_is_weighed_in_every_way_but_the_one_that_shows_what_it_costs(tmp_path: Path) -> None:
    ways = {way.name: way for way in bad_teacher.make(tmp_path, QUICK, 1).ways}
    assert {name for name, way in ways.items() if bad_teacher.BAD not in way.teachers} == {"two good teachers", "no KV"}
