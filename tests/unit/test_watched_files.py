"""Tests of files that are read again when they change."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from kvcore.errors import FieldError
from kvcore.watched_files import WatchedFiles


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
