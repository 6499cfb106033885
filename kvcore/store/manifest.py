"""The store's manifest: the teacher and the plan that all samples of the store share."""

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
    """The teacher and the plan of a store."""

    teacher: TeacherInfo
    plan: KVPlan


def read_manifest(directory: Path) -> Manifest:
    """Reads a store's manifest.

    Raises:
        StoreError: the manifest is missing, damaged, or of another format version.
    """
    path = directory / MANIFEST_NAME
    try:
        content = unseal(path.read_bytes())
    except FileNotFoundError as error:
        raise StoreError(f"{directory}: not a KV store: {MANIFEST_NAME} is missing") from error
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
    """Writes the manifest of a directory without one; otherwise checks that the existing one is equal.

    Raises:
        StoreError: the directory belongs to another teacher or plan; the message names the first difference.
    """
    path = directory / MANIFEST_NAME
    if not path.exists():
        _create(path, manifest)
    stored = read_manifest(directory)
    if not stored.teacher.same_teacher(manifest.teacher):
        raise StoreError(_difference(path, "teacher", stored.teacher.identity(), manifest.teacher.identity()))
    if stored.plan.digest() != manifest.plan.digest():
        raise StoreError(_difference(path, "plan", stored.plan.model_dump(), manifest.plan.model_dump()))


def _create(path: Path, manifest: Manifest) -> None:
    """Creates the manifest atomically: of several writers one wins, since a link, unlike a rename, never replaces."""
    teacher, plan = asdict(manifest.teacher), manifest.plan.model_dump(mode="json")
    temporary = write_beside(path, seal({"format": FORMAT, "teacher": teacher, "plan": plan}))
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    finally:
        temporary.unlink()
    sync(path.parent)


def _difference(path: Path, what: str, stored: dict[str, Any], asked: dict[str, Any]) -> str:
    """Returns a message that names the first field that differs, with both values."""
    for name, value in stored.items():
        if value == asked[name]:
            continue
        if isinstance(value, dict):
            return _difference(path, f"{what}.{name}", cast("dict[str, Any]", value), asked[name])
        return f"{path}: the store has another {what}.{name}: {value!r}, not {asked[name]!r}"
    raise AssertionError(f"{what} do not differ")
