"""A process group for tests that use DeepSpeed in the test process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from student_trainer.loop import ds_engine


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one rank, which ends with the test."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    ds_engine.start(0)
    yield
    ds_engine.stop()
