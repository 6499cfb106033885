"""Tests that a job's servers are reached with the job's certificate and token only, with a real server process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvcore.errors import KVDistillError
from kvcore.plan import KVPlan
from student_trainer.kv_sources.remote import RemoteSource
from student_trainer.launching.hosts import LocalHost
from student_trainer.launching.job import Job
from student_trainer.launching.transport_variables import TLS_CA, TOKEN_FILE

PLAN = KVPlan(layers=(0,))


class SharedHost(LocalHost):
    """This machine, as if others could reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.bind = True, "0.0.0.0"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Restores the variables that a job sets."""
    for name in (TLS_CA, TOKEN_FILE):
        monkeypatch.setenv(name, "")
    return monkeypatch


def test_callers_need_the_jobs_certificate_and_token(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = Job(SharedHost(), tmp_path)
    with job.running():
        made = job.protect_servers()
        assert made is not None
        job.servers.start("one", job.hosts.nodes[0], ["--model", "fake:layers=2", "--engine", "fake"])
        (endpoint,) = job.wait_ready()["one"]
        assert (os.environ[TLS_CA], os.environ[TOKEN_FILE]) == (str(made.certificate), str(made.token))
        connect(endpoint)
        (tmp_path / "other").write_text("0" * 64, encoding="ascii")
        environment.setenv(TOKEN_FILE, str(tmp_path / "other"))
        with pytest.raises(KVDistillError, match="token"):
            connect(endpoint)
        for name in (TLS_CA, TOKEN_FILE):
            environment.setenv(name, "")
        with pytest.raises(KVDistillError):
            connect(endpoint)


def connect(endpoint: str) -> None:
    source = RemoteSource("one", endpoint, lambda _info: PLAN)
    try:
        source.connect()
    finally:
        source.close()
