"""The hashes in a checkpoint's `state.json`: of its other files and of itself, so that damage is noticed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import xxhash

from kvcore.errors import KVDistillError
from kvcore.files import json_text, write_json

# Members of the state: the hashes of the files of tensors by name, and the hash of the other members.
FILES_XXH3, STATE_XXH3 = "files_xxh3", "state_xxh3"


class DamagedCheckpointError(KVDistillError):
    """A file of a checkpoint is missing, or is not what was saved."""


def file_hash(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def write_state(path: Path, state: dict[str, Any], files: dict[str, str]) -> None:
    """Writes a state with the hashes of its files and of itself."""
    # Read back from JSON, because the hash is compared with that of a state which was read.
    content = json.loads(json_text(state | {FILES_XXH3: files}))
    write_json(path, content | {STATE_XXH3: _state_hash(content)})


def read_verified(path: Path) -> dict[str, Any]:
    """Reads a state, and compares it and the files beside it with their hashes.

    Raises:
        DamagedCheckpointError: names the file that is missing or damaged.
    """
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if state[STATE_XXH3] != _state_hash(state):
            raise DamagedCheckpointError(f"{path} does not match its hash")
        for name, expected in state[FILES_XXH3].items():
            if file_hash(path.with_name(name)) != expected:
                raise DamagedCheckpointError(f"{path.with_name(name)} does not match its hash")
    except OSError as error:
        raise DamagedCheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} is not the state of a checkpoint") from error
    return state


def _state_hash(state: dict[str, Any]) -> str:
    hashed = {name: value for name, value in state.items() if name != STATE_XXH3}
    return xxhash.xxh3_128_hexdigest(json_text(hashed, sort_keys=True).encode())
