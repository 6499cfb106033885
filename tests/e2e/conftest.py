"""Fixtures of the end-to-end tests: tiny models and data on disk, and two teacher servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.servers import running_teacher
from tests.support.training import Endpoints, World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def endpoints(world: World) -> Iterator[Endpoints]:
    """Two servers that run each sample alone, so that the K/V do not depend on when requests arrive."""
    with (
        running_teacher(world.teachers["ada"], world.directory / "ada.log", max_batch_tokens=1) as ada,
        running_teacher(world.teachers["ben"], world.directory / "ben.log", max_batch_tokens=1) as ben,
    ):
        yield {"ada": [ada.endpoint], "ben": [ben.endpoint]}
