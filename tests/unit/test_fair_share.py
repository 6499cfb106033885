"""Tests of fair turns between callers."""

from __future__ import annotations

from collections import Counter

from teacher_server.fair_share import Caller, FairShare, caller_of

A1, A2, B1 = Caller("a", "a:1"), Caller("a", "a:2"), Caller("b", "b:1")


def served(share: FairShare, waiting: dict[Caller, int], turns: int) -> Counter[Caller]:
    """The work that each caller got; `waiting` holds the work of one turn of each caller."""
    got: Counter[Caller] = Counter()
    for _ in range(turns):
        caller = share.next(dict.fromkeys(waiting, 0.0))
        share.charge(caller, waiting[caller])
        got[caller] += waiting[caller]
    return got


def test_a_caller_is_a_connection_of_a_host() -> None:
    assert caller_of("ipv4:10.0.0.7:41234") == ("ipv4:10.0.0.7", "ipv4:10.0.0.7:41234")
    assert caller_of("ipv6:%5B::1%5D:41234").host == "ipv6:%5B::1%5D"
    assert caller_of("unix:").host == "unix"


def test_callers_get_equal_work_in_turns_of_different_size() -> None:
    got = served(FairShare(), {A1: 1, B1: 7}, 800)
    assert abs(got[A1] - got[B1]) <= 7


def test_hosts_share_equally_whatever_their_number_of_connections() -> None:
    got = served(FairShare(), {A1: 1, A2: 1, B1: 1}, 400)
    assert got == {B1: 200, A1: 100, A2: 100}


def test_a_caller_that_was_idle_gets_no_more_than_its_share_afterwards() -> None:
    share = FairShare()
    served(share, {A1: 1}, 1000)
    assert served(share, {A1: 1, B1: 1}, 100) == {A1: 50, B1: 50}


def test_a_caller_that_leaves_and_returns_gets_no_more_than_its_share() -> None:
    share = FairShare()
    got: Counter[Caller] = Counter()
    for _ in range(100):
        got += served(share, {A1: 5, B1: 1}, 1) + served(share, {B1: 1}, 1)
    assert got[A1] <= got[B1] + 5


def test_callers_that_left_are_forgotten() -> None:
    share = FairShare()
    for number in range(5000):
        served(share, {A1: 1, Caller("a", f"a:{number}"): 2, Caller(f"b{number % 1000}", "b:1"): 1}, 2)
    assert len(share._used) <= 1024
    got = served(share, {A1: 1, B1: 1}, 400)
    assert abs(got[A1] - got[B1]) <= 20
