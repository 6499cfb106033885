"""Tests of the thread that parses and tokenizes: callers take turns."""

from __future__ import annotations

import asyncio
import threading

import pytest

from teacher_server.fair_share import Caller
from teacher_server.requests.work_thread import WorkThread

MANY, FEW = Caller("many", "many:1"), Caller("few", "few:1")


@pytest.mark.parametrize("caller", [MANY, FEW], ids=["same caller", "another caller"])
def test_a_short_request_waits_for_one_part_of_others_only(caller: Caller) -> None:
    async def scenario() -> list[str]:
        work, order, gate = WorkThread(), [], threading.Event()
        first = asyncio.create_task(work.run(MANY, 0, 1000, gate.wait, 60))
        await asyncio.sleep(0)
        longs = [
            asyncio.create_task(work.run(MANY, number, 1000, order.append, f"long {number}")) for number in range(1, 13)
        ]
        await asyncio.sleep(0)
        short = asyncio.create_task(work.run(caller, 99, 10, order.append, "short"))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, short, *longs)
        work.close()
        return order

    assert asyncio.run(scenario()) == ["short", *(f"long {number}" for number in range(1, 13))]


def test_results_and_errors_reach_the_caller() -> None:
    async def scenario() -> int:
        work = WorkThread()
        with pytest.raises(ValueError, match="not a number"):
            await work.run(MANY, 0, 1, _raise)
        result = await work.run(MANY, 0, 1, int, "7")
        work.close()
        return result

    assert asyncio.run(scenario()) == 7


def test_work_of_callers_that_left_does_not_run_and_blocks_nobody() -> None:
    async def scenario() -> list[str]:
        work, order, gate = WorkThread(), [], threading.Event()
        running = asyncio.create_task(work.run(MANY, 0, 1, gate.wait, 60))
        leaving = [
            asyncio.create_task(work.run(MANY, number, 1, order.append, f"left {number}")) for number in range(1, 4)
        ]
        staying = asyncio.create_task(work.run(FEW, 0, 1, order.append, "stayed"))
        await asyncio.sleep(0.01)
        for task in (running, *leaving):
            task.cancel()
        gate.set()
        await staying
        await work.run(MANY, 9, 1, order.append, "next")
        work.close()
        return order

    assert asyncio.run(scenario()) == ["stayed", "next"]


def test_a_long_request_does_not_starve_beside_short_ones() -> None:
    async def scenario() -> list[str]:
        work, order = WorkThread(), []

        async def short(number: int) -> None:
            for _ in range(30):
                await work.run(MANY, number, 10, order.append, "short")

        long = asyncio.create_task(work.run(MANY, 99, 100, order.append, "long"))
        await asyncio.gather(*(short(number) for number in range(3)), long)
        work.close()
        return order

    assert asyncio.run(scenario()).index("long") < 45


def _raise() -> None:
    raise ValueError("not a number")
