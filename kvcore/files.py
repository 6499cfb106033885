"""Files that appear whole or not at all, and strict JSON: every report, result and marker is written through here."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast


def finite_or_null(value: Any) -> Any:
    """The same value, at any depth of mappings, lists and tuples, with None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {name: finite_or_null(entry) for name, entry in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(entry) for entry in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any, **options: Any) -> str:
    """Strict JSON, which has no NaN and no infinity: a number that is not finite becomes null.

    `options`: more arguments of `json.dumps`.
    """
    return json.dumps(finite_or_null(value), allow_nan=False, **options)


def write_json(path: Path, value: Any) -> None:
    """Replaces a file with indented JSON, as `json_text` and `replace_file` do."""
    replace_file(path, json_text(value, indent=2) + "\n")


def replace_file(path: Path, content: bytes | str) -> None:
    """Writes a file so that a reader sees, and a crash leaves, the old or the new one, never a mixture."""
    temporary = write_beside(path, content)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink()
        raise
    sync(path.parent)


def write_beside(path: Path, content: bytes | str) -> Path:
    """Writes a temporary file next to `path`, under a name that no other process or machine uses, and syncs it."""
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
    """Returns when the disk has a file's content, or a directory's entries: a rename in it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
