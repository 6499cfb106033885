"""A process group for tests that use DeepSpeed in the test process, and a world with two fake teachers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from student_trainer.loop import ds_engine
from tests.support.mapped_runs import both_serving
from tests.support.training import Endpoints, World, make_world


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one rank, which ends with the test."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    ds_engine.start(0)
    yield
    ds_engine.stop()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def teachers() -> Iterator[Endpoints]:
    """Servers of the two teachers of `mapped_run`."""
    with both_serving() as endpoints:
        yield endpoints
