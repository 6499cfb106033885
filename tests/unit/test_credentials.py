"""Tests of the certificate and the token that a job makes, with real openssl and a real server."""

from __future__ import annotations

import multiprocessing
import os
import stat
import subprocess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from kvcore.errors import ConfigError
from student_trainer.launching.credentials import brings_own_access, create_credentials, create_token
from student_trainer.launching.hosts import LocalHost
from student_trainer.launching.job import Job
from student_trainer.launching.transport_variables import TLS_CA, TOKEN_FILE
from teacher_server.config import FLAGS
from teacher_server.requests.authentication import certificate_files, read_tokens


@pytest.fixture(autouse=True)
def _umask_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TLS_CA, raising=False)
    monkeypatch.delenv(TOKEN_FILE, raising=False)


class SharedHost(LocalHost):
    """This machine, as if others could reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.bind = True, "0.0.0.0"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_servers_take_the_files_and_others_cannot_read_the_secrets(tmp_path: Path) -> None:
    made = create_credentials(tmp_path / "access", ["127.0.0.1", "node-1"])
    flags = ["--model", "fake:", "--engine", "fake", "--grpc-host", "0.0.0.0", *made.server_flags]
    config = FLAGS.read(flags, "serve")
    assert certificate_files(config) is not None
    tokens = read_tokens(config)
    assert tokens is not None
    assert tokens.accept(made.token.read_bytes().strip())
    assert [mode(path) for path in (tmp_path / "access", made.key, made.token)] == [0o700, 0o600, 0o600]
    shown = subprocess.run(
        ["openssl", "x509", "-in", made.certificate, "-noout", "-text"], check=True, capture_output=True, text=True
    ).stdout
    assert "IP Address:127.0.0.1, DNS:node-1" in shown


def test_every_job_has_its_own_token(tmp_path: Path) -> None:
    tokens = [create_credentials(tmp_path / name, ["127.0.0.1"]).token.read_text(encoding="ascii") for name in "ab"]
    assert tokens[0] != tokens[1]


def _create(path: Path, start: Barrier) -> None:
    start.wait()
    create_token(path)
    os._exit(0 if len(path.read_text(encoding="ascii").strip()) == 64 else 1)


def test_jobs_that_start_together_share_one_complete_token(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(8)
    jobs = [context.Process(target=_create, args=(tmp_path / "access" / "token", start)) for _ in range(8)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0] * 8
    assert [path.name for path in (tmp_path / "access").iterdir()] == ["token"]


@pytest.mark.parametrize("flags", [["--tls_cert", "a"], ["--token-file=a"], ["--insecure"]])
def test_flags_of_the_user_replace_the_jobs_files(flags: list[str], tmp_path: Path) -> None:
    assert brings_own_access(flags)
    assert not brings_own_access(["--device", "cuda", "--tensor-parallel-size=8"])
    job = Job(SharedHost(), tmp_path)
    assert job.protect_servers(["--dtype", "bf16", *flags]) is None
    assert (list(job.servers.access), TLS_CA in os.environ) == ([], False)


def test_a_job_on_loopback_makes_no_files(tmp_path: Path) -> None:
    assert Job(LocalHost(), tmp_path).protect_servers() is None


def test_without_openssl_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"openssl cannot make a certificate .*; install it on this node"):
        create_credentials(tmp_path, ["127.0.0.1"])
