"""Strict configuration: unknown keys, wrong types and values out of range fail with the field's name."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from kvcore.endpoints import LARGEST_PORT, check_endpoint
from kvcore.errors import ConfigError, FieldError, did_you_mean
from kvcore.plugins import NameTable


class StrictModel(BaseModel):
    """Base of every configuration: frozen, no unknown keys, no silent conversion of types, only finite numbers.

    The string literal below a field is its only description: `--help` and docs/configuration.md show it.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    headings: ClassVar[Mapping[str, str]] = {}
    """Headings of `--help`, in order, each with the first field below it."""

    @field_validator("*")
    @classmethod
    def _expand_home(cls, value: object) -> object:
        """Expands `~` in every path."""
        try:
            return value.expanduser() if isinstance(value, Path) else value
        except RuntimeError as error:
            raise ValueError(f"cannot expand '~' in {value}: {error}") from error


@dataclass(frozen=True, slots=True)
class Alias:
    """Field metadata: another name of the field's flag."""

    name: str


@dataclass(frozen=True, slots=True)
class Variable:
    """Field metadata: the environment variable that job scripts read the field from."""

    name: str


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        raise ValueError("expected auto, cpu, cuda or cuda:N")
    return text


def _file_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}", text):
        raise ValueError("expected a name of 1 to 64 letters, digits, '_', '-' and '.', and no '.' at the beginning")
    return text


def _expanded(text: str) -> str:
    return str(Path(text).expanduser()) if text.startswith("~/") else text


PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Text = Annotated[str, Field(min_length=1)]
# A directory or a hub id.
ModelPath = Annotated[str, AfterValidator(_expanded)]
FileName = Annotated[str, AfterValidator(_file_name)]
Port = Annotated[int, Field(ge=0, le=LARGEST_PORT)]
Endpoint = Annotated[str, AfterValidator(check_endpoint)]
# What torch takes as a seed.
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Device = Annotated[str, AfterValidator(_device)]

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
    """A YAML file's mapping. The file is UTF-8, with or without a byte-order mark.

    Raises:
        ConfigError: the file is missing, cannot be read, is not UTF-8, has a key twice, or is no YAML mapping.
    """
    path = path.expanduser()
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such configuration file; the folder configs/ of kvdistill's repository has examples"
        )
    try:
        raw = _load_yaml(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: line {line} is not valid UTF-8; save the file in UTF-8") from error
    except _YAML_ERRORS as error:
        raise ConfigError(f"{path}: not valid YAML: {_problem(error)}") from error
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
            raise FieldError(where, f"is a plain value without keys of its own, so --set {override} cannot set one")
    try:
        value = _load_yaml(text)
    except _YAML_ERRORS as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {_problem(error)}") from error
    if isinstance(node, list):
        node[_list_index(cast("list[Any]", node), last, key)] = value
    else:
        node[last] = value


class _Yaml(yaml.SafeLoader):
    """Safe YAML with the rules of YAML 1.2 where people expect them.

    1e-3 is a number; YAML 1.1 wants 1.0e-3. A mapping has a key only once; PyYAML lets the last one win.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key: object = cast("Any", self).construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue
            if key in first:
                problem = f"the key '{key}' is given twice, first in line {first[key]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            first[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


# PyYAML raises ValueError for impossible dates and for numbers of thousands of digits.
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


cast("Any", _Yaml).add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _load_yaml(text: str) -> object:
    return yaml.load(text, Loader=_Yaml)  # noqa: S506, the loader is a safe one


def _problem(error: Exception) -> str:
    """What is wrong, and in which line, without an excerpt."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        parts = [f"line {error.problem_mark.line + 1}", *filter(None, (error.context, error.problem))]
        return ": ".join([parts[0], ", ".join(parts[1:])])
    return " ".join(str(error).split())


def _list_index(items: list[Any], name: str, where: str) -> int:
    if not name.isdecimal() or int(name) >= len(items):
        raise FieldError(where, f"expected an index below {len(items)}, got '{name}'")
    return int(name)


def parse(tree: Mapping[str, Any], model: type[ModelT]) -> ModelT:
    """Validates a mapping against a configuration model. Choices may be spelled with dashes or underscores.

    Raises:
        FieldError: naming the first wrong field, its value and the limit.
    """
    try:
        # Strict JSON takes a list for a tuple and a string for a path, as YAML writes them.
        text = json.dumps(_with_known_spelling(tree, model), default=str)
    except TypeError as error:
        raise ConfigError(f"a key of the configuration is not text: {error}") from error
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise _field_error(error, model) from error


def choices(annotation: Any) -> list[str | int]:
    """The choices of every `Literal` and `NameTable` in an annotation."""
    return [leaf for leaf in leaves(annotation) if isinstance(leaf, str | int)]


def leaves(annotation: Any) -> list[Any]:
    """The types in an annotation, and the choices of its literals and name tables."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return list(arguments)
    if get_origin(annotation) is Annotated:
        tables = [argument for argument in arguments if isinstance(argument, NameTable)]
        return list(tables[0]) if tables else leaves(arguments[0])
    return [leaf for argument in arguments for leaf in leaves(argument)] if arguments else [annotation]


def annotation_of(about: FieldInfo) -> Any:
    """A field's annotation with its metadata, which pydantic keeps apart from it."""
    return Annotated[about.annotation, *about.metadata] if about.metadata else about.annotation


def _with_known_spelling(value: object, annotation: Any) -> object:
    """A value of a configuration's tree, its choices spelled as in the model."""
    if isinstance(value, str):
        known = {choice.replace("-", "_"): choice for choice in choices(annotation) if isinstance(choice, str)}
        return known.get(value.replace("-", "_"), value)
    if isinstance(value, list | tuple):
        return [_with_known_spelling(item, annotation) for item in cast("Sequence[Any]", value)]
    model = _model_in(annotation)
    if not isinstance(value, Mapping) or model is None:
        return cast("object", value)
    kinds = {name: annotation_of(about) for name, about in model.model_fields.items()}
    items = cast("Mapping[str, Any]", value).items()
    return {key: _with_known_spelling(item, kinds[key]) if key in kinds else item for key, item in items}


_FIELD = re.compile(r"[a-z_]\w*(\.\w+)*")


def _field_error(error: ValidationError, model: type[StrictModel]) -> FieldError:
    first = error.errors()[0]
    value, message = first["input"], first["msg"].removeprefix("Value error, ")
    path, around, annotation = _locate(model, first["loc"])
    name, separator, problem = message.partition(": ")
    if first["type"] == "value_error" and separator and _FIELD.fullmatch(name) and _model_in(annotation):
        path, message = [*path, name], problem  # A model's check of several fields begins with one of them.
    field = ".".join(path) or "configuration"
    if first["type"] == "extra_forbidden":
        return FieldError(field, f"unknown key{did_you_mean(path[-1], sorted(around.model_fields))}")
    known = choices(annotation)
    if known and (first["type"] == "literal_error" or isinstance(value, str)):
        names = [str(choice) for choice in known]
        expected = f"one of {', '.join(names)}" if len(names) > 1 else names[0]
        number = "a number or " if {int, float} & set(leaves(annotation)) else ""
        return FieldError(field, f"expected {number}{expected}; got {value!r}{did_you_mean(str(value), names)}")
    return FieldError(field, message if isinstance(value, dict | list) else f"{message} (got {value!r})")


def _locate(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel], Any]:
    """The path of an error as the user wrote it, the model around its last name, and that name's annotation."""
    path: list[str] = []
    annotation: Any = model
    for part in location:
        inner = _model_in(annotation)
        if inner is not None and isinstance(part, str):
            model, annotation = inner, annotation_of(inner.model_fields[part]) if part in inner.model_fields else None
        elif isinstance(part, str) and choices(annotation):
            break  # Pydantic's name of one type of a union.
        path.append(str(part))
    return path, model, annotation


def _model_in(annotation: Any) -> type[BaseModel] | None:
    return next((leaf for leaf in leaves(annotation) if isinstance(leaf, type) and issubclass(leaf, BaseModel)), None)
