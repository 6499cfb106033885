"""Tests of the file helpers: atomic replacement and strict JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from safetensors.numpy import save_file

from kvcore.command_line import run_command
from kvcore.errors import EXIT_FAILED, OutputError
from kvcore.files import json_text, new_directory, replace_file, write_json
from tests.support.small_disk import small_files_only


def save(tensors: dict[str, bytes], path: Path) -> None:
    save_file({name: np.frombuffer(content, np.uint8) for name, content in tensors.items()}, path)


def refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


def test_non_finite_numbers_are_written_as_null_at_any_depth() -> None:
    text = json_text({"a": [1.5, math.nan, (math.inf,)], "b": {"c": -math.inf}, "d": "NaN"})
    assert json.loads(text, parse_constant=refuse) == {"a": [1.5, None, [None]], "b": {"c": None}, "d": "NaN"}


def test_failed_json_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"steps": 1})
    with pytest.raises(TypeError):
        write_json(path, {"steps": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"steps": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [Path.write_bytes, lambda path, content: save({"x": content}, path)])
def test_a_full_disk_is_one_error_and_leaves_no_directory(
    tmp_path: Path, write: Callable[[Path, bytes], object]
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/earlier").touch()
    with (
        pytest.raises(OutputError, match=rf"^cannot write {tmp_path / 'new'}: File too large$"),
        small_files_only(100),
        new_directory(tmp_path / "new"),
    ):
        write(tmp_path / "new/weights", bytes(4000))
    assert list(tmp_path.iterdir()) == []


def test_other_errors_pass_through_a_new_directory_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError), new_directory(tmp_path / "new"):
        write_json(tmp_path / "new/report.json", {"steps": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_cannot_write_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()

    def command() -> None:
        write_json(tmp_path / "file/report.json", {})

    assert run_command("kvdistill", command) == EXIT_FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kvdistill: cannot read or write {tmp_path / 'file'}/")
    assert ": Not a directory; next: free space" in line


def test_failed_replacement_leaves_no_temporary_file(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(IsADirectoryError):
        replace_file(taken, b"content")
    assert list(tmp_path.iterdir()) == [taken]


def test_replace_file_overwrites_with_text_or_bytes(tmp_path: Path) -> None:
    path = tmp_path / "text"
    replace_file(path, b"long old content")
    replace_file(path, "né")
    assert path.read_bytes() == "né".encode()
