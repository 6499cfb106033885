"""Tests of servers that accept only clients with a certificate, over real TLS, with the trainer's client."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from kvcore.errors import FieldError, TeacherUnavailableError
from kvcore.plan import KVPlan, Selection
from kvcore.types import EncodedSampleKV, Sample
from kvdistill.client import TeacherClient
from kvdistill.doctor import checks
from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.remote import RemoteSource
from student_trainer.launching.transport_variables import TLS_CA, TLS_CERT, TLS_KEY
from teacher_server.config import ServeConfig
from teacher_server.requests.authentication import certificate_files
from tests.support.certificates import Authority, certificate
from tests.support.servers import TeacherProcess, health, kv_request, refused, running_teacher, wait_until

PLAN = KVPlan(layers=(0,), selection=Selection(span="all"))
SAMPLE = Sample("s", text="1 + 2 = 3")


@dataclass(frozen=True)
class Files:
    """The server's certificate and key, two authorities, and a client of each."""

    cert: Path
    key: Path
    trusted: Authority
    other: Authority
    own: tuple[Path, Path]
    foreign: tuple[Path, Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("tls")
    cert, key = certificate(directory / "server")
    trusted, other = Authority(directory / "trusted"), Authority(directory / "other")
    return Files(cert, key, trusted, other, trusted.client("trainer"), other.client("stranger"))


@pytest.fixture(scope="module")
def teacher(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    tls = {"tls_cert": files.cert, "tls_key": files.key, "tls_client_ca": files.trusted.cert}
    with running_teacher("fake:layers=2", log, engine="fake", **tls) as running:
        yield running


@pytest.fixture(autouse=True)
def _trusts_the_server(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TLS_CA, str(files.cert))


def show(monkeypatch: pytest.MonkeyPatch, pair: tuple[Path, Path]) -> None:
    """Let clients use this certificate and key."""
    monkeypatch.setenv(TLS_CERT, str(pair[0]))
    monkeypatch.setenv(TLS_KEY, str(pair[1]))


def ask(teacher: TeacherProcess) -> None:
    with closing(RemoteSource("a", teacher.endpoint, lambda _info: PLAN)) as source:
        source.connect()
        (answer,) = source.fetch([SAMPLE])
        assert isinstance(answer, EncodedSampleKV)


def test_a_client_with_a_certificate_of_the_authority_is_served(
    teacher: TeacherProcess, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    show(monkeypatch, files.own)
    ask(teacher)
    monkeypatch.delenv(TLS_CERT)
    monkeypatch.delenv(TLS_KEY)
    with TeacherClient(teacher.endpoint, tls_ca=files.cert, tls_cert=files.own[0], tls_key=files.own[1]) as client:
        assert client.info.layers == 2


def test_a_client_without_a_certificate_is_refused_and_told_what_to_set(teacher: TeacherProcess) -> None:
    with pytest.raises(TeacherUnavailableError, match=f"then set {TLS_CERT} and {TLS_KEY}"):
        ask(teacher)
    (check,) = [check for check in checks([teacher.endpoint]) if teacher.endpoint in check.name]
    assert check.state == "problem"
    assert f"then set {TLS_CERT} and {TLS_KEY}" in check.found


def test_a_client_of_another_authority_is_refused(
    teacher: TeacherProcess, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    show(monkeypatch, files.foreign)
    with pytest.raises(TeacherUnavailableError, match=rf"--tls-client-ca may not have signed {TLS_CERT}, .*stranger"):
        ask(teacher)


def test_other_tls_problems_are_named(
    teacher: TeacherProcess, files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(TLS_CA, str(files.other.cert))
    with pytest.raises(TeacherUnavailableError, match=rf"\({TLS_CA}, .*, does not verify the server's certificate"):
        ask(teacher)
    monkeypatch.delenv(TLS_CA)
    with pytest.raises(TeacherUnavailableError, match=rf"the server may use TLS; then set {TLS_CA}"):
        ask(teacher)
    monkeypatch.setenv(TLS_CA, str(files.cert))
    with (
        running_teacher("fake:layers=2", tmp_path / "log", engine="fake") as plain,
        pytest.raises(TeacherUnavailableError, match=f"seems not to use TLS; then unset {TLS_CA}"),
    ):
        ask(plain)


def test_the_socket_of_the_servers_own_health_checks_serves_nothing_else(teacher: TeacherProcess) -> None:
    (name,) = {
        line.split("@")[1]
        for line in Path("/proc/net/unix").read_text(encoding="ascii").splitlines()
        if re.search("@kvdistill-[0-9a-f]{32}$", line) and _opened_by(teacher.pid, line.split()[6])
    }
    assert health(f"unix-abstract:{name}") == 1
    with grpc.insecure_channel(f"unix-abstract:{name}") as channel:
        for method, message in (("Describe", b""), ("StreamKV", kv_request(PLAN, [SAMPLE]).SerializeToString())):
            call = channel.unary_stream if method == "StreamKV" else channel.unary_unary
            made = call(f"/kvcache.v1.TeacherKV/{method}")
            refusal = refused(lambda made=made, message=message: list(made(message, timeout=10)))
            assert refusal.code is grpc.StatusCode.UNAUTHENTICATED
            assert "requires a client's certificate" in refusal.details


def _opened_by(pid: int, inode: str) -> bool:
    links = [link.readlink().as_posix() for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    return f"socket:[{inode}]" in links


def accepted(teacher: TeacherProcess) -> bool:
    try:
        ask(teacher)
    except TeacherUnavailableError:
        return False
    return True


def test_new_connections_use_changed_authorities_of_clients(
    files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authorities = tmp_path / "clients.crt"
    shutil.copy(files.trusted.cert, authorities)
    tls = {"tls_cert": files.cert, "tls_key": files.key, "tls_client_ca": authorities}
    with running_teacher("fake:layers=2", tmp_path / "log", engine="fake", **tls) as running:
        show(monkeypatch, files.own)
        assert accepted(running)
        # A file that is being written keeps the authorities from before.
        authorities.write_text("", encoding="ascii")
        wait_until(lambda: accepted(running) and "holds no certificate" in running.log_path.read_text("utf-8"))
        shutil.copy(files.other.cert, authorities)
        wait_until(lambda: not accepted(running))
        show(monkeypatch, files.foreign)
        assert accepted(running)


def test_a_client_connects_again_with_changed_files(
    files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own, ca = (tmp_path / "own.crt", tmp_path / "own.key"), tmp_path / "ca.crt"
    new_cert, new_key = certificate(tmp_path / "new")
    for source, target in zip((*files.own, files.cert), (*own, ca), strict=True):
        shutil.copy(source, target)
    show(monkeypatch, own)
    monkeypatch.setenv(TLS_CA, str(ca))
    tls = {"tls_cert": files.cert, "tls_key": files.key, "tls_client_ca": files.trusted.cert}
    with running_teacher("fake:layers=2", tmp_path / "log", engine="fake", **tls) as first:
        remote = RemoteSource("a", first.endpoint, lambda _info: PLAN)
        source = FailoverSource("a", [remote], patience_s=60.0)
        source.connect()
        port = first.grpc_port
    for file, target in zip((*files.foreign, new_cert), (*own, ca), strict=True):
        shutil.copy(file, target)
    tls = {"tls_cert": new_cert, "tls_key": new_key, "tls_client_ca": files.other.cert}
    with running_teacher("fake:layers=2", tmp_path / "log2", engine="fake", grpc_port=port, **tls), closing(source):
        (answer,) = source.fetch([SAMPLE])
        assert isinstance(answer, EncodedSampleKV)


def test_settings_that_do_not_fit_together_are_refused(
    files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def client() -> None:
        RemoteSource("a", "127.0.0.1:1", lambda _info: PLAN)

    monkeypatch.setenv(TLS_CERT, str(files.own[0]))
    with pytest.raises(FieldError, match=f"^{TLS_KEY}: set it too: {TLS_CERT} is set"):
        client()
    monkeypatch.setenv(TLS_KEY, str(files.foreign[1]))
    with pytest.raises(FieldError, match=f"^{TLS_CERT}: .* are not a certificate and its key"):
        client()
    monkeypatch.setenv(TLS_KEY, str(files.own[1]))
    monkeypatch.setenv(TLS_CA, str(files.own[1]))
    with pytest.raises(FieldError, match=f"^{TLS_CA}: .* holds no certificate"):
        client()
    monkeypatch.delenv(TLS_CA)
    with pytest.raises(FieldError, match=f"^{TLS_CERT}: a client's certificate needs TLS; set {TLS_CA}"):
        client()
    plain = {"model": "fake:", "engine": "fake"}
    with pytest.raises(ValueError, match="tls_client_ca: client certificates need TLS; set tls_cert and tls_key"):
        ServeConfig.model_validate({**plain, "tls_client_ca": files.trusted.cert})
    tls = {**plain, "tls_cert": files.cert, "tls_key": files.key, "tls_client_ca": files.trusted.cert}
    ServeConfig.model_validate({**tls, "grpc_host": "0.0.0.0"})
    with pytest.raises(FieldError, match=f"^tls_client_ca: cannot read {tmp_path / 'none'}"):
        certificate_files(ServeConfig.model_validate({**tls, "tls_client_ca": tmp_path / "none"}))
    with pytest.raises(FieldError, match=r"^tls_client_ca: .* holds no certificate in PEM format"):
        certificate_files(ServeConfig.model_validate({**tls, "tls_client_ca": files.key}))
