"""Computes the digest of a model's weights."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from kvcore.files import replace_file
from kvcore.models.files import weight_files

logger = logging.getLogger(__name__)

# The digests of smaller files are not cached.
CACHE_FROM_BYTES = 256 << 20


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
