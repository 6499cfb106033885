"""Finds a model's files and computes the digest of its weights."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

from huggingface_hub import snapshot_download

from kvcore.errors import FieldError
from kvcore.files import replace_file

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The digests of smaller files are not cached.
CACHE_FROM_BYTES = 256 << 20

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_OTHER_COPIES = ["original/*", "consolidated*", "onnx/*"]


def model_directory(model: str, revision: str | None, with_code: bool) -> Path:
    """The directory of a model: the given path, or the hub's files in the local cache, downloaded if missing.

    Raises:
        FieldError: neither a directory nor a hub id that can be downloaded.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise FieldError("revision", f"got '{revision}', but {model} is a directory, which has no revisions")
        return path
    patterns = [*_PATTERNS, "*.py"] if with_code else _PATTERNS
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=_OTHER_COPIES))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FieldError("model", f"'{model}' is not a directory, and the hub cannot provide it: {reason}") from error


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the model, sorted.

    Raises:
        FieldError: there are none, or a file of the index is missing.
    """
    index = directory / INDEX
    if index.is_file():
        weight_map = cast("dict[str, str]", json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        files = [directory / SINGLE]
    for file in files:
        if not file.is_file():
            raise FieldError("model", f"{file} is missing; kvdistill loads weights from safetensors files only")
    return files


def weights_digest(directory: Path, config: Mapping[str, Any], loaded_as: str) -> str:
    """BLAKE2b over the weights, the model's configuration, and how they are loaded (dtype, quantisation).

    It is the same in all processes that serve the same files in the same precision. Cache paths and the transformers
    release are not part of it.
    """
    files = weight_files(directory)
    with ThreadPoolExecutor(max_workers=min(len(files), os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_file_digest, files))
    geometry = {key: value for key, value in config.items() if not key.startswith("_") and key not in _NOT_IDENTITY}
    canonical = json.dumps([digests, geometry, loaded_as], sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


_NOT_IDENTITY = {"transformers_version", "dtype", "torch_dtype", "use_cache"}


def _file_digest(file: Path) -> str:
    """The file's BLAKE2b. For a large file it is cached until the file's size, modification time or inode changes."""
    status = file.resolve().stat()
    if status.st_size < CACHE_FROM_BYTES:
        return _hash(file)
    identity = f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvdistill" / "weights"
    entry = cache / hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    if entry.is_file():
        return entry.read_text(encoding="ascii")
    digest = _hash(file)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        replace_file(entry, digest)
    except OSError as error:
        logger.warning("cannot cache the digest of %s: %s", file, error)
    return digest


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, partial(hashlib.blake2b, digest_size=16)).hexdigest()
