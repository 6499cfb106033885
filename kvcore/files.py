"""Atomic file writes and strict JSON, used for all reports, results and markers."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast


def finite_or_null(value: Any) -> Any:
    """Replaces NaN and infinity by None, at any depth of mappings, lists and tuples."""
    if isinstance(value, Mapping):
        return {name: finite_or_null(entry) for name, entry in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(entry) for entry in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any, **options: Any) -> str:
    """Serialises to strict JSON: NaN and infinity become null.

    `options`: further arguments of `json.dumps`.
    """
    return json.dumps(finite_or_null(value), allow_nan=False, **options)


def write_json(path: Path, value: Any) -> None:
    """Atomically writes a value as indented strict JSON."""
    replace_file(path, json_text(value, indent=2) + "\n")


def replace_file(path: Path, content: bytes | str) -> None:
    """Atomically replaces a file: readers and crashes see the old or the new content, never a mixture."""
    temporary = write_beside(path, content)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink()
        raise
    sync(path.parent)


def write_beside(path: Path, content: bytes | str) -> Path:
    """Writes and syncs a temporary file next to `path`, under a name that no other process or machine uses."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def sync(path: Path) -> None:
    """Flushes a file, or a directory's entries, to disk, so that it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
