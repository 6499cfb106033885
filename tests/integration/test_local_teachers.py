"""Tests of `LocalTeachers` with real `kvdistill serve` processes."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from kvcore.errors import TeacherUnavailableError
from student_trainer.launching.local_teachers import LocalTeachers
from tests.support.servers import TeacherClient, wait_until
from tests.support.tiny_models import save_tiny_model, tiny_spec

FAKE = "fake:layers=2,heads=1,dim=8"


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_servers_run_only_inside_the_block(tmp_path: Path) -> None:
    before = children()
    ada = str(save_tiny_model(tmp_path / "ada", tiny_spec("qwen2", layers=2)))
    ben = str(save_tiny_model(tmp_path / "ben", tiny_spec("llama", layers=3)))
    servers = LocalTeachers([ada, ben], tmp_path / "logs", device="cpu", dtype="fp32", options={"threads": 1})
    with servers as endpoints:
        assert list(endpoints) == ["ada", "ben"]
        layers = {}
        for endpoint in endpoints.values():
            with TeacherClient(endpoint) as client:
                layers[client.info.model] = client.info.layers
        assert layers == {"ada": 2, "ben": 3}
        servers.check_alive()
    assert children() <= before
    assert all(peak > 50 for peak in servers.peak_memory_mb.values())
    assert sorted(log.name for log in (tmp_path / "logs").iterdir()) == ["serve_ada.log", "serve_ben.log"]


def test_model_that_cannot_be_loaded_raises_with_its_log_and_ends_other_servers(tmp_path: Path) -> None:
    before = children()
    nowhere = tmp_path / "nowhere"
    with (
        pytest.raises(TeacherUnavailableError, match="'nowhere': its server on localhost ended with code 2") as caught,
        LocalTeachers({"fine": FAKE, "nowhere": str(nowhere)}, tmp_path, device="cpu", options={"engine": "fake"}),
    ):
        raise AssertionError("entered")
    assert str(nowhere) in str(caught.value)
    assert children() <= before


def test_check_alive_raises_for_killed_server(tmp_path: Path) -> None:
    servers = LocalTeachers({"fake": FAKE}, tmp_path, device="cpu", options={"engine": "fake"})
    before = children()
    with servers:
        for pid in children() - before:
            psutil.Process(pid).kill()
        with pytest.raises(TeacherUnavailableError, match=r"fake.*ended with code -9"):
            wait_until(lambda: servers.check_alive() is not None, seconds=10)


def test_server_that_is_not_ready_in_time_raises(tmp_path: Path) -> None:
    servers = LocalTeachers({"fake": FAKE}, tmp_path, device="cpu", options={"engine": "fake"}, ready_seconds=0.0)
    with pytest.raises(TeacherUnavailableError, match="not ready after 0 s"), servers:
        raise AssertionError("entered")
