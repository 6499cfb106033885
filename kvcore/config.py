"""Strict configuration: unknown keys, wrong types and values out of range fail with the field's name."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from kvcore.errors import ConfigError, FieldError


class StrictModel(BaseModel):
    """Base of every configuration: frozen, no unknown keys, no silent conversion of types, only finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


ModelT = TypeVar("ModelT", bound=StrictModel)


def load_config(path: Path, overrides: Iterable[str], model: type[ModelT]) -> ModelT:
    """Reads a YAML file, applies `key.path=value` overrides (values are YAML), and validates.

    Raises:
        ConfigError: the file is missing or is no YAML mapping.
        FieldError: a field is unknown, has the wrong type, or is out of range.
    """
    tree = read_yaml(path)
    for override in overrides:
        apply_override(tree, override)
    return parse(tree, model)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        ConfigError: the file is missing or is no YAML mapping.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such configuration file; kvdistill's repository has some to start from, in configs/"
        )
    try:
        raw = _load_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping at the top level, found {type(raw).__name__}")
    return cast("dict[str, Any]", raw)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one `a.b.c=value` in a nested mapping; a number in the path indexes a list."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: expected key=value, for example run.steps=500")
    *parents, last = key.split(".")
    node: Any = tree
    for index, name in enumerate(parents):
        where = ".".join(parents[: index + 1])
        if isinstance(node, list):
            node = cast("list[Any]", node)[_list_index(cast("list[Any]", node), name, where)]
        else:
            node = cast("dict[str, Any]", node).setdefault(name, {})
        if not isinstance(node, dict | list):
            raise FieldError(where, f"is a plain value, so --set {override} cannot go below it")
    try:
        value = _load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error
    if isinstance(node, list):
        node[_list_index(cast("list[Any]", node), last, key)] = value
    else:
        node[last] = value


class _Yaml(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number, as YAML 1.2 and people have it; YAML 1.1 wants 1.0e-3."""


cast("Any", _Yaml).add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _load_yaml(text: str) -> object:
    return yaml.load(text, Loader=_Yaml)  # noqa: S506, the loader is a safe one


def _list_index(items: list[Any], name: str, where: str) -> int:
    if not name.isdecimal() or int(name) >= len(items):
        raise FieldError(where, f"expected an index below {len(items)}, got '{name}'")
    return int(name)


def parse(tree: Mapping[str, Any], model: type[ModelT]) -> ModelT:
    """Validates a mapping against a configuration model.

    Raises:
        FieldError: naming the first wrong field, its value and the limit.
    """
    try:
        # Strict JSON takes a list for a tuple and a string for a path, as YAML writes them.
        return model.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise _field_error(error, model) from error


def _field_error(error: ValidationError, model: type[StrictModel]) -> FieldError:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or model.__name__
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(first["loc"][-1]), _names_beside(model, first["loc"]), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return FieldError(field, f"unknown key{hint}")
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], dict | list):
        return FieldError(field, message)
    return FieldError(field, f"{message} (got {first['input']!r})")


def _names_beside(model: type[StrictModel], location: tuple[int | str, ...]) -> list[str]:
    """The field names that would have been right where an unknown key stands."""
    names: set[str] = set(model.model_fields)
    current: type[BaseModel] | None = model
    for part in location[:-1]:
        if current is None or not isinstance(part, str) or part not in current.model_fields:
            continue
        current = _model_in(current.model_fields[part].annotation)
        if current is not None:
            names = set(current.model_fields)
    return sorted(names)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None
