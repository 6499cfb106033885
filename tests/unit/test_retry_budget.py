"""Tests of the limit of repeated requests, with a clock of the test's own."""

from __future__ import annotations

import pytest

from kvcore.errors import TeacherUnavailableError
from student_trainer.kv_sources import replica, retry_budget
from student_trainer.kv_sources.replica import Endpoint
from student_trainer.kv_sources.retry_budget import ALLOWED, WINDOW_SECONDS, RetryBudget
from tests.support.scripted_replica import ScriptedReplica

LOST = TeacherUnavailableError("math", "UNAVAILABLE: connection refused")


class Clock:
    """A clock that stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retry_budget, "time", clock)
    return clock


def spend_all(budget: RetryBudget) -> int:
    """Repeats as many requests as are allowed now."""
    count = 0
    while budget.wait_s() == 0.0:
        budget.spend()
        count += 1
    return count


def test_a_fifth_of_the_requests_and_a_fixed_number_may_be_repeated(clock: Clock) -> None:
    assert spend_all(RetryBudget()) == ALLOWED
    budget = RetryBudget()
    for _ in range(100):
        budget.note_request()
    assert spend_all(budget) == ALLOWED + 20


def test_the_budget_returns_after_the_window_and_says_when(clock: Clock) -> None:
    budget = RetryBudget()
    spend_all(budget)
    clock.now += 4.0
    assert budget.wait_s() == pytest.approx(WINDOW_SECONDS - 4.0, abs=0.01)
    clock.now += budget.wait_s()
    assert spend_all(budget) == ALLOWED


def test_old_requests_do_not_count(clock: Clock) -> None:
    budget = RetryBudget()
    for _ in range(100):
        budget.note_request()
    clock.now += WINDOW_SECONDS
    assert spend_all(budget) == ALLOWED


def test_many_replicas_can_all_be_tried(clock: Clock) -> None:
    assert spend_all(RetryBudget(replicas=16)) >= 16


def test_hedges_leave_half_of_the_budget_to_failed_requests(clock: Clock) -> None:
    budget = RetryBudget()
    assert sum(budget.spend_on_hedge() for _ in range(100)) == ALLOWED // 2
    assert spend_all(budget) == ALLOWED - ALLOWED // 2
    assert not budget.spend_on_hedge()


def test_the_delay_before_a_failed_replica_is_asked_again_is_random_and_never_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replica, "time", Clock())
    longest = [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    delays: list[list[float]] = []
    for failures in range(len(longest)):
        row: list[float] = []
        for _ in range(300):
            endpoint = Endpoint(ScriptedReplica("a:1"), failures=failures)
            endpoint.fail(LOST)
            row.append(endpoint.retry_at - endpoint.failed_at)
        delays.append(row)
    for row, limit in zip(delays, longest, strict=True):
        assert 0.05 <= min(row) < 0.3 * limit, "from a tenth of the longest delay on"
        assert 0.8 * limit < max(row) <= limit
