"""Tests of the limit of open requests: one caller cannot use all of them."""

from __future__ import annotations

import contextlib

import pytest

from teacher_server.config import ServeConfig
from teacher_server.fair_share import Caller
from teacher_server.sample_queue import BusyError
from teacher_server.state import ServerState

GREEDY, OTHER = Caller("a", "a:1"), Caller("b", "b:1")


def ready(max_streams: int) -> ServerState:
    state = ServerState(ServeConfig(model="fake:", engine="fake", max_streams=max_streams))
    state.phase_problem = None
    return state


def test_the_last_eighth_is_kept_for_callers_without_an_open_request() -> None:
    state = ready(16)
    with contextlib.ExitStack() as opened:
        for _ in range(14):
            opened.enter_context(state.open_stream(GREEDY))
        with pytest.raises(BusyError, match=r"14 requests are open; the limit is 16 .* 2 of them kept for callers"):
            opened.enter_context(state.open_stream(GREEDY))
        opened.enter_context(state.open_stream(OTHER))
        with pytest.raises(BusyError):
            opened.enter_context(state.open_stream(OTHER))
        opened.enter_context(state.open_stream(Caller("c", "c:1")))
        with pytest.raises(BusyError, match=r"16 requests are open; the limit is 16 \(max_streams\)$"):
            opened.enter_context(state.open_stream(Caller("d", "d:1")))
    assert state.idle.is_set()
    with state.open_stream(GREEDY):
        assert state.open_streams == 1


def test_a_small_limit_keeps_none() -> None:
    state = ready(2)
    with state.open_stream(GREEDY), state.open_stream(GREEDY):
        assert state.open_streams == 2
