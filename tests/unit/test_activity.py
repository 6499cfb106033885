"""Tests of the server's record of open calls, callers, problems and throughput."""

from __future__ import annotations

import time

import pytest

from teacher_server.monitoring.activity import (
    MAX_CALLERS,
    MAX_PROBLEM_LENGTH,
    MAX_PROBLEMS,
    WINDOW_SECONDS,
    Activity,
    Call,
    current_call,
)


def end_call(activity: Activity, code: str, problem: str = "", **rest: object) -> None:
    call = Call("StreamKV", "ipv4:10.0.0.1:5000", code=code, problem=problem)
    for name, value in rest.items():
        setattr(call, name, value)
    with activity.during(call):
        pass


def test_call_is_listed_only_while_it_runs() -> None:
    activity = Activity()
    with activity.during(Call("StreamKV", "ipv4:10.0.0.1:5000")):
        current_call().request_id, current_call().sent_bytes = "step7", 2048
        (shown,) = activity.connections()
        assert (shown["peer"], shown["request_id"], shown["sent_bytes"]) == ("ipv4:10.0.0.1:5000", "step7", 2048)
        assert shown["seconds"] >= 0
    assert activity.connections() == []


def test_a_call_that_raises_is_no_longer_listed() -> None:
    activity = Activity()
    with pytest.raises(RuntimeError), activity.during(Call("StreamKV", "peer")):
        raise RuntimeError
    assert activity.connections() == []


def test_callers_are_listed_for_one_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    activity = Activity()
    for peer, samples in (("ada:1", 2), ("ben:2", 1), ("ada:1", 3)):
        now += 20
        with activity.during(Call("StreamKV", peer, samples=samples, sent_bytes=100)):
            pass
    now += 30
    assert activity.callers() == [
        {"peer": "ada:1", "requests": 2, "samples": 5, "sent_bytes": 200, "seconds": 30.0},
        {"peer": "ben:2", "requests": 1, "samples": 1, "sent_bytes": 100, "seconds": 50.0},
    ]
    now += 20
    assert [one["peer"] for one in activity.callers()] == ["ada:1"]


def test_the_list_of_callers_is_bounded() -> None:
    activity = Activity()
    for number in range(2 * MAX_CALLERS):
        with activity.during(Call("StreamKV", f"peer:{number}")):
            pass
    assert len(activity.callers()) == MAX_CALLERS
    assert activity.callers()[0]["peer"] == f"peer:{2 * MAX_CALLERS - 1}"


def test_problems_are_listed_latest_first_without_successes_and_cancellations() -> None:
    activity = Activity()
    end_call(activity, "INVALID_ARGUMENT", "plan.layers: got 99")
    end_call(activity, "OK", samples=3)
    end_call(activity, "CANCELLED")
    end_call(activity, "OK", samples=3, failed_samples=2)
    assert [(one["code"], one["problem"]) for one in activity.problems()] == [
        ("SAMPLES_FAILED", "2 of 3 samples failed"),
        ("INVALID_ARGUMENT", "plan.layers: got 99"),
    ]


def test_problems_that_differ_only_in_numbers_are_counted_together() -> None:
    activity = Activity()
    end_call(activity, "INTERNAL", "internal error")
    for tokens in range(10 * MAX_PROBLEMS):
        end_call(activity, "RESOURCE_EXHAUSTED", f"{tokens} tokens are queued")
    busy, broken = activity.problems()
    assert (busy["count"], busy["problem"]) == (10 * MAX_PROBLEMS, f"{10 * MAX_PROBLEMS - 1} tokens are queued")
    assert (broken["code"], broken["count"]) == ("INTERNAL", 1)


def test_the_list_of_problems_and_their_length_are_bounded() -> None:
    activity = Activity()
    for letter in range(2 * MAX_PROBLEMS):
        end_call(activity, "INVALID_ARGUMENT", chr(97 + letter) * 10_000)
    assert len(activity.problems()) == MAX_PROBLEMS
    assert {len(one["problem"]) for one in activity.problems()} == {MAX_PROBLEM_LENGTH}


def test_throughput_covers_the_last_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    activity = Activity()
    assert activity.throughput()["tokens_per_second"] == 0
    activity.sample(0)
    now += 10 * WINDOW_SECONDS  # Ten minutes without requests.
    activity.sample(0)
    for tokens in (50, 100):
        now += 5
        with activity.during(Call("StreamKV", "peer", sent_bytes=1000)):
            activity.sample(tokens)
    assert activity.throughput() == {"seconds": 10.0, "tokens_per_second": 10.0, "bytes_per_second": 200.0}
