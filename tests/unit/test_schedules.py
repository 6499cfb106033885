"""Tests of the learning rate's schedule."""

from __future__ import annotations

from itertools import pairwise

import pytest

from student_trainer.config import OptimConfig
from student_trainer.loop.schedules import learning_rate


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_warms_up_linearly_then_follows_its_schedule(schedule: str) -> None:
    optim = OptimConfig.model_validate({"lr": 0.5, "warmup_ratio": 0.2, "schedule": schedule})
    rates = [learning_rate(optim, step, 20) for step in range(21)]
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    middle = {"constant": 0.5, "linear": 0.25, "cosine": 0.25}
    assert rates[12] == pytest.approx(middle[schedule])
    assert rates[20] == pytest.approx(0.5 if schedule == "constant" else 0.0, abs=1e-12)
    assert all(later <= earlier for earlier, later in pairwise(rates[4:]))
    if schedule == "cosine":
        assert rates[8] > 0.5 * (1 - 4 / 16), "slow at first"


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 1), (0.0, 7), (1.0, 1), (1.0, 7)])
def test_warm_up_can_have_no_steps_or_all_steps(warmup: float, steps: int) -> None:
    optim = OptimConfig.model_validate({"lr": 0.5, "warmup_ratio": warmup, "schedule": "linear"})
    rates = [learning_rate(optim, step, steps) for step in range(steps)]
    assert all(0 < rate <= 0.5 for rate in rates)
    assert rates[-1 if warmup else 0] == 0.5


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_rises_again_where_the_optimiser_starts_anew(schedule: str) -> None:
    optim = OptimConfig.model_validate({"lr": 0.5, "warmup_ratio": 0.2, "schedule": schedule})
    without = [learning_rate(optim, step, 20) for step in range(20)]
    rates = [learning_rate(optim, step, 20, first=10) for step in range(10, 20)]
    share = [0.25, 0.5, 0.75, *7 * [1.0]]
    assert rates == pytest.approx([a * b for a, b in zip(share, without[10:], strict=True)])
