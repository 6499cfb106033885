"""Tests of authentication by certificate and token over real TLS, with the trainer's client."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from kvcore import watched_files
from kvcore.errors import FieldError, TeacherRefusedError, TeacherUnavailableError
from kvcore.plan import KVPlan, Selection
from kvcore.types import EncodedSampleKV, Sample
from student_trainer.kv_sources.remote import RemoteSource
from student_trainer.launching.local_teachers import LocalTeachers
from student_trainer.launching.transport_variables import TLS_CA, TOKEN_FILE
from teacher_server.config import ServeConfig
from teacher_server.requests.authentication import read_tokens
from tests.support.certificates import certificate
from tests.support.servers import TeacherProcess, running_teacher, wait_until

SECRET = "a-long-secret-for-tests"
PLAN = KVPlan(layers=(0,), selection=Selection(span="all"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("tls")
    cert, key = certificate(directory / "own")
    other, _ = certificate(directory / "other")
    paths = {"cert": cert, "key": key, "other": other}
    for name, text in (("token", f"{SECRET}\n"), ("wrong", "a-long-secres")):
        paths[name] = directory / name
        paths[name].write_text(text, encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def teacher(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    secrets = {"tls_cert": files["cert"], "tls_key": files["key"], "token_file": files["token"]}
    with running_teacher("fake:layers=2", log, engine="fake", **secrets) as running:
        yield running


def ask(teacher: TeacherProcess) -> None:
    with closing(RemoteSource("a", teacher.endpoint, lambda _info: PLAN)) as source:
        source.connect()
        (answer,) = source.fetch([Sample("s", text="1 + 2 = 3")])
        assert isinstance(answer, EncodedSampleKV)


def test_a_caller_with_certificate_and_token_is_served(
    teacher: TeacherProcess, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TLS_CA, str(files["cert"]))
    monkeypatch.setenv(TOKEN_FILE, str(files["token"]))
    ask(teacher)
    assert SECRET not in teacher.log_path.read_text(encoding="utf-8")


@pytest.mark.parametrize("shown", [None, "wrong"])
def test_a_caller_without_the_token_is_refused(
    teacher: TeacherProcess, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, shown: str | None
) -> None:
    monkeypatch.setenv(TLS_CA, str(files["cert"]))
    if shown is not None:
        monkeypatch.setenv(TOKEN_FILE, str(files[shown]))
    with pytest.raises(TeacherRefusedError, match="requires a token"):
        ask(teacher)


@pytest.mark.parametrize("authority", [None, "other"])
def test_a_client_refuses_a_server_that_it_cannot_verify(
    teacher: TeacherProcess, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, authority: str | None
) -> None:
    if authority is not None:
        monkeypatch.setenv(TLS_CA, str(files[authority]))
    with pytest.raises(TeacherUnavailableError):
        ask(teacher)


def test_a_changed_token_is_used_by_server_and_clients_without_a_restart(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    token, old, new = (tmp_path / name for name in ("token", "old", "new"))
    for path, text in ((token, SECRET), (old, SECRET), (new, "another-long-secret")):
        path.write_text(text, encoding="utf-8")
    monkeypatch.setenv(TLS_CA, str(files["cert"]))
    secrets = {"tls_cert": files["cert"], "tls_key": files["key"], "token_file": token}
    with running_teacher("fake:layers=2", tmp_path / "log", engine="fake", **secrets) as running:
        monkeypatch.setenv(TOKEN_FILE, str(token))
        with closing(RemoteSource("a", running.endpoint, lambda _info: PLAN)) as source:
            source.connect()
            token.write_text("another-long-secret", encoding="utf-8")
            # Before and after the client has noticed the change.
            for number in range(2):
                (answer,) = source.fetch([Sample(f"s{number}", text="1 + 2 = 3")])
                assert isinstance(answer, EncodedSampleKV)
                time.sleep(watched_files.LOOK_SECONDS)
        for path in (new, old):
            monkeypatch.setenv(TOKEN_FILE, str(path))
            ask(running)
        # A token that is being written does not shut out the callers.
        token.write_text("", encoding="utf-8")
        monkeypatch.setenv(TOKEN_FILE, str(new))
        ask(running)
        monkeypatch.setenv(TOKEN_FILE, str(files["wrong"]))
        with pytest.raises(TeacherRefusedError, match="requires a token"):
            ask(running)


def reconnected(teacher: TeacherProcess) -> str:
    """The server's log after a new connection."""
    with suppress(TeacherUnavailableError):
        ask(teacher)
    return teacher.log_path.read_text(encoding="utf-8")


def test_new_connections_use_a_changed_certificate(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    shutil.copy(files["cert"], cert)
    shutil.copy(files["key"], key)
    new_cert, new_key = certificate(tmp_path / "new")
    monkeypatch.setenv(TLS_CA, str(files["cert"]))
    with running_teacher("fake:layers=2", tmp_path / "log", engine="fake", tls_cert=cert, tls_key=key) as running:
        with closing(RemoteSource("a", running.endpoint, lambda _info: PLAN)) as source:
            source.connect()
            shutil.copy(new_key, key)
            # A key without its certificate is not used.
            wait_until(lambda: "are not a certificate and its key" in reconnected(running))
            shutil.copy(new_cert, cert)
            wait_until(lambda: reconnected(running).count("read again after a change") == 1)
            monkeypatch.setenv(TLS_CA, str(new_cert))
            ask(running)
            # An open connection continues.
            (answer,) = source.fetch([Sample("s", text="1 + 2 = 3")])
            assert isinstance(answer, EncodedSampleKV)
        monkeypatch.setenv(TLS_CA, str(files["cert"]))
        with pytest.raises(TeacherUnavailableError):
            ask(running)


def test_probes_need_no_token(teacher: TeacherProcess, files: dict[str, Path]) -> None:
    with grpc.secure_channel(teacher.endpoint, grpc.ssl_channel_credentials(files["cert"].read_bytes())) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = check(health_pb2.HealthCheckRequest(), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_token_requires_tls(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_FILE, str(files["token"]))
    with pytest.raises(FieldError, match=f"{TOKEN_FILE}: a token is only sent over TLS"):
        RemoteSource("a", "127.0.0.1:1", lambda _info: PLAN)
    with pytest.raises(ValueError, match="token_file: a token needs TLS"):
        ServeConfig(model="fake:", engine="fake", token_file=files["token"])
    with pytest.raises(ValueError, match="tls_key: set both tls_cert and tls_key, or neither"):
        ServeConfig(model="fake:", engine="fake", tls_cert=files["cert"])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "teacher.example"])
def test_a_server_beyond_loopback_needs_tls_and_a_token_or_insecure(files: dict[str, Path], host: str) -> None:
    plain = {"model": "fake:", "engine": "fake", "grpc_host": host}
    tls = {"tls_cert": files["cert"], "tls_key": files["key"]}
    for refused_options in (plain, {**plain, **tls}):
        with pytest.raises(ValueError, match=f"grpc_host: '{host}' lets other machines use the teacher; set tls_cert"):
            ServeConfig.model_validate(refused_options)
    ServeConfig.model_validate({**plain, **tls, "token_file": files["token"]})
    ServeConfig.model_validate({**plain, "insecure": True})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_a_server_on_loopback_needs_neither(host: str) -> None:
    ServeConfig(model="fake:", engine="fake", grpc_host=host)


def test_a_short_token_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    short = tmp_path / "token"
    short.write_text("fifteen-letters\n", encoding="ascii")
    config = ServeConfig(model="fake:", engine="fake", tls_cert=files["cert"], tls_key=files["key"], token_file=short)
    with pytest.raises(FieldError, match=r"token_file: the token in .* has 15 characters; at least 16 are needed"):
        read_tokens(config)


def test_a_missing_file_raises_with_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(TLS_CA, str(tmp_path / "none"))
    with pytest.raises(FieldError, match=TLS_CA):
        RemoteSource("a", "127.0.0.1:1", lambda _info: PLAN)


def test_local_teachers_refuse_the_tls_variables(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(TLS_CA, str(files["cert"]))
    with pytest.raises(FieldError, match="unset it"):
        LocalTeachers(["fake:layers=1"], tmp_path)


@pytest.mark.parametrize("content", ["", " \n", "ünsafe"])
def test_an_invalid_token_is_refused(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    (tmp_path / "token").write_text(content, encoding="utf-8")
    monkeypatch.setenv(TLS_CA, str(files["cert"]))
    monkeypatch.setenv(TOKEN_FILE, str(tmp_path / "token"))
    with pytest.raises(FieldError, match=TOKEN_FILE):
        RemoteSource("a", "127.0.0.1:1", lambda _info: PLAN)
