"""Tests of the file helpers: atomic replacement and strict JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NoReturn

import pytest

from kvcore.files import json_text, replace_file, write_json


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
