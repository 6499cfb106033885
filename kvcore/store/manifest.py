"""The store's manifest: the teacher and the plan that all samples of the store share."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from kvcore.errors import StoreError
from kvcore.files import replace_file, sync, write_beside
from kvcore.plan import KVPlan
from kvcore.store.journal import FORMAT, seal, unseal
from kvcore.tensors.kv_map import KVMap, map_digest
from kvcore.types import TeacherInfo

MANIFEST_NAME = "manifest.json"
MAP_NAME = "{digest}.kvmap"

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
    try:
        tree = cast("dict[str, Any]", json.loads(content))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: not valid JSON: {error}") from error
    if tree.get("format") != FORMAT:
        raise StoreError(f"{path}: store format {tree.get('format')!r}, this version reads {FORMAT}")
    try:
        teacher = _TEACHER.validate_json(json.dumps(tree.get("teacher")), strict=True)
        plan = KVPlan.model_validate_json(json.dumps(tree.get("plan")))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "teacher or plan"
        raise StoreError(f"{path}: {field}: {first['msg']}") from error
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


def keep_map(directory: Path, kv_map: KVMap) -> None:
    """Writes the map of the plan that a store is about to be claimed for, so that offline runs need no teacher."""
    path = directory / MAP_NAME.format(digest=kv_map.named.digest)
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(path, kv_map.content())


def stored_map(directory: Path) -> KVMap | None:
    """The map of a store's plan; None if the plan has none.

    Raises:
        StoreError: the directory is not a store, or its map is missing or damaged.
    """
    named = read_manifest(directory).plan.map
    if named is None:
        return None
    path = directory / MAP_NAME.format(digest=named.digest)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise StoreError(f"{path}: missing, but the store's plan names this map") from error
    if map_digest(content) != named.digest:
        raise StoreError(f"{path}: damaged: the content does not match its digest")
    kv_map = KVMap.read(content)
    if kv_map.named != named:
        raise StoreError(f"{path}: has the shape {kv_map.named}, the store's plan has {named}")
    return kv_map


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
        if isinstance(value, dict) and asked[name] is not None:
            return _difference(path, f"{what}.{name}", cast("dict[str, Any]", value), asked[name])
        return f"{path}: the store has another {what}.{name}: {value!r}, not {asked[name]!r}"
    raise AssertionError(f"{what} do not differ")
