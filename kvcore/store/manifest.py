"""The store's manifest: the one teacher and the one plan that all its samples share."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from kvcore.errors import StoreError
from kvcore.files import sync, write_beside
from kvcore.plan import KVPlan
from kvcore.store.journal import FORMAT, seal, unseal
from kvcore.types import TeacherInfo

MANIFEST_NAME = "manifest.json"

_TEACHER: TypeAdapter[TeacherInfo] = TypeAdapter(TeacherInfo)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What every sample of a store has in common."""

    teacher: TeacherInfo
    plan: KVPlan


def read_manifest(directory: Path) -> Manifest:
    """Reads a store's manifest.

    Raises:
        StoreError: there is none, it is damaged, or another version wrote it.
    """
    path = directory / MANIFEST_NAME
    try:
        content = unseal(path.read_bytes())
    except FileNotFoundError as error:
        raise StoreError(f"{directory}: no KV store: {MANIFEST_NAME} is missing") from error
    if content is None:
        raise StoreError(f"{path}: damaged: the content does not match its digest")
    tree = cast("dict[str, Any]", json.loads(content))
    if tree.get("format") != FORMAT:
        raise StoreError(f"{path}: store format {tree.get('format')!r}, this version reads {FORMAT}")
    try:
        teacher = _TEACHER.validate_json(json.dumps(tree.get("teacher")), strict=True)
        plan = KVPlan.model_validate_json(json.dumps(tree.get("plan")))
    except ValidationError as error:
        raise StoreError(f"{path}: {error}") from error
    return Manifest(teacher, plan)


def claim(directory: Path, manifest: Manifest) -> None:
    """Writes the manifest of a directory that has none, or compares it with the one that is there.

    Raises:
        StoreError: the directory belongs to another teacher or plan; says in what they differ.
    """
    path = directory / MANIFEST_NAME
    if not path.exists():
        _create(path, manifest)
    stored = read_manifest(directory)
    if not stored.teacher.same_teacher(manifest.teacher):
        raise StoreError(_difference(path, "teacher", _identity(stored.teacher), _identity(manifest.teacher)))
    if stored.plan.digest() != manifest.plan.digest():
        raise StoreError(_difference(path, "plan", stored.plan.model_dump(), manifest.plan.model_dump()))


def _create(path: Path, manifest: Manifest) -> None:
    """Of several writers that start at once, one wins: a link, unlike a rename, never replaces."""
    teacher, plan = asdict(manifest.teacher), manifest.plan.model_dump(mode="json")
    temporary = write_beside(path, seal({"format": FORMAT, "teacher": teacher, "plan": plan}))
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    finally:
        temporary.unlink()
    sync(path.parent)


def _identity(info: TeacherInfo) -> dict[str, Any]:
    """What makes two endpoints the same teacher, by name."""
    names = ("weights_digest", "tokenizer_fingerprint", "layers", "kv_heads", "head_dim")
    return {name: getattr(info, name) for name in names}


def _difference(path: Path, what: str, stored: dict[str, Any], asked: dict[str, Any]) -> str:
    """Names the first field that differs, with both values."""
    for name, value in stored.items():
        if value == asked[name]:
            continue
        if isinstance(value, dict):
            return _difference(path, f"{what}.{name}", cast("dict[str, Any]", value), asked[name])
        return f"{path}: the store was written for another {what}.{name}: {value!r}, not {asked[name]!r}"
    raise AssertionError(f"{what} do not differ")
