"""Tests of files that are read again when they change."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

from kvcore import watched_files
from kvcore.errors import FieldError
from kvcore.watched_files import WatchedFiles
from teacher_server.requests import authentication
from teacher_server.requests.authentication import Tokens


@pytest.fixture(autouse=True)
def _look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_files, "LOOK_SECONDS", 0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "token"
    found.write_text("first", encoding="utf-8")
    return found


def reader(path: Path, reads: list[str]) -> WatchedFiles[str]:
    def read() -> str:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if not text:
            raise FieldError("token_file", f"{path} is empty")
        reads.append(text)
        return text

    return WatchedFiles((path,), read)


def test_a_file_is_read_once_until_it_changes(path: Path) -> None:
    reads: list[str] = []
    files = reader(path, reads)
    assert [files.current(), files.current()] == ["first", "first"]
    path.write_text("second text", encoding="utf-8")
    assert [files.current(), files.current()] == ["second text", "second text"]
    assert reads == ["first", "second text"]


def test_a_replaced_file_of_the_same_size_and_time_is_read_again(path: Path) -> None:
    files = reader(path, [])
    stat = path.stat()
    other = path.with_name("other")
    other.write_text("third", encoding="utf-8")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.rename(path)
    assert files.current() == "third"


def test_invalid_and_missing_files_keep_the_last_content_with_one_warning(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = reader(path, [])
    with caplog.at_level(logging.WARNING):
        path.write_text("", encoding="utf-8")
        assert [files.current(), files.current()] == ["first", "first"]
        assert [record.getMessage() for record in caplog.records] == [
            f"token_file: {path} is empty; the content from before stays in use"
        ]
        path.unlink()
        assert files.current() == "first"
    path.write_text("back again", encoding="utf-8")
    assert files.current() == "back again"


def test_an_invalid_file_at_the_start_is_an_error(path: Path) -> None:
    path.write_text("", encoding="utf-8")
    with pytest.raises(FieldError, match="token_file"):
        reader(path, [])


def test_a_file_that_becomes_readable_is_read_again(path: Path) -> None:
    readable = False

    def read() -> bool:
        if not readable and path.read_text(encoding="utf-8") != "first":
            raise FieldError("token_file", "permission denied")
        return readable

    files = WatchedFiles((path,), read)
    path.write_text("second", encoding="utf-8")
    assert files.current() is False
    readable = True
    path.chmod(0o600)
    assert files.current() is True


def test_files_are_looked_at_once_per_interval_unless_asked_at_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_files, "LOOK_SECONDS", 1000.0)
    files = reader(path, [])
    path.write_text("second text", encoding="utf-8")
    assert files.current() == "first"
    assert files.current(at_once=True) == "second text"


def test_the_token_before_a_change_is_accepted_for_ten_minutes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = b"a-token-of-20-letters", b"another-token-of-26-letters"
    path.write_bytes(old)
    tokens = Tokens(path)
    assert [tokens.accept(each) for each in (old, new, b"")] == [True, False, False]
    path.write_bytes(new)
    assert [tokens.accept(each) for each in (old, new, b"")] == [True, True, False]
    later = time.monotonic() + authentication.GRACE_SECONDS
    monkeypatch.setattr(authentication.time, "monotonic", lambda: later)
    assert [tokens.accept(each) for each in (old, new)] == [False, True]
