"""Atomic file writes and strict JSON, used for all reports, results and markers."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from kvcore.errors import OutputError

# Errors of a disk or of permissions, not of a program.
_WRITE_ERRORS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)")


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


def write_problem(error: BaseException) -> str | None:
    """What kept a file from being written; None for other errors. Libraries in Rust raise types of their own."""
    if isinstance(error, OSError) and error.errno in _WRITE_ERRORS:
        return error.strerror
    if isinstance(error, Exception) and (found := _RUST_OS_ERROR.search(str(error))):
        number = int(found[1] or found[2])
        return os.strerror(number) if number in _WRITE_ERRORS else None
    return None


@contextmanager
def new_directory(path: Path) -> Generator[None]:
    """Makes an empty directory, in place of an earlier one, for the block to fill. Removes it if the block fails.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    shutil.rmtree(path, ignore_errors=True)
    try:
        path.mkdir(parents=True)
        yield
        follow_umask(*path.rglob("*.safetensors"))
    except BaseException as error:
        shutil.rmtree(path, ignore_errors=True)
        if problem := write_problem(error):
            raise OutputError(f"cannot write {path}: {problem}") from error
        raise


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


def follow_umask(*paths: Path) -> None:
    """Gives files the mode of ordinary new files.

    The safetensors library creates files that only their owner can read.
    """
    for path in paths:
        ordinary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        ordinary.touch(exist_ok=False)
        try:
            path.chmod(ordinary.stat().st_mode & 0o777)
        finally:
            ordinary.unlink()


def sync(path: Path) -> None:
    """Flushes a file, or a directory's entries, to disk, so that it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
