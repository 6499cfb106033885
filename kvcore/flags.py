"""Command lines made from configuration models: a flag for each field, and mistakes told by the flag's name."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Generic, Literal, NoReturn, cast, get_args, get_origin

from pydantic.fields import FieldInfo

from kvcore.config import ModelT, parse, read_yaml
from kvcore.errors import ConfigError, FieldError
from kvcore.plugins import NameTable

_CONFIG = "config"


@dataclass(frozen=True)
class FlagSet(Generic[ModelT]):
    """The flags of a command: `--NAME` for each field of a model, with its default.

    Booleans are true or false, lists take several values, and lists of numbers may be written `0.5,0.5` too.

    Args:
        model: what the flags are read into. Where its fields do not go together, its message begins with one of them.
        description: what the command does.
        examples: shown at the end of `--help`; COMMAND stands for the command.
        groups: headings of `--help`, in order; under each its fields and what to say about them.
        aliases: further flags for a field.
        config_file: whether `--config FILE` reads a YAML file of fields, over which flags win.
        switches: whether a boolean's flag alone means true.
        script: the script that is the command where it is not `kvdistill NAME`.
    """

    model: type[ModelT]
    description: str
    examples: str
    groups: Mapping[str, Mapping[str, str]]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    config_file: bool = False
    switches: bool = False
    script: str = ""

    def parser(self, program: str) -> argparse.ArgumentParser:
        """The parser with every flag; one that is not given leaves no trace in what it returns."""
        command = program if program.startswith("kvdistill ") else f"python {self.script}"
        made = _Parser(
            prog=program,
            description=self.description,
            epilog=self.examples.replace("COMMAND", command),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        if self.config_file:
            about = "YAML file of these flags without dashes; flags given here win"
            made.add_argument(f"--{_CONFIG}", type=Path, metavar="PATH", help=about)
        for heading, fields in self.groups.items():
            group = made.add_argument_group(heading)
            for name, text in fields.items():
                group.add_argument(*self._flags(name), dest=name, **self._options(name, text))
        return made

    def texts(self) -> Iterator[tuple[str, str]]:
        """Every flag with what is said about it."""
        yield "--help", "Show every flag, with examples."
        for fields in self.groups.values():
            for name, text in fields.items():
                for flag in self._flags(name):
                    yield flag, text

    def read(self, arguments: Sequence[str], program: str) -> ModelT:
        """Reads a command line; `--help` prints and exits.

        Raises:
            ConfigError: a flag is unknown (names the nearest) or lacks a value, or two do not go together.
            FieldError: a value is missing or cannot be used, by its flag.
        """
        known, extra = self.parser(program).parse_known_args(list(arguments))
        if extra:
            raise self._unknown(extra[0])
        given = vars(known)
        path: Path | None = given.pop(_CONFIG, None) if self.config_file else None
        tree = read_yaml(path) if path else {}
        tree |= {name: self._value(name, text) for name, text in given.items()}
        try:
            return parse(tree, self.model)
        except FieldError as error:
            raise self._as_flag(error) from error

    def _flags(self, name: str) -> tuple[str, ...]:
        return (f"--{name}", *self.aliases.get(name, ()))

    def _options(self, name: str, text: str) -> dict[str, Any]:
        """What argparse is told of a field."""
        about = self.model.model_fields[name]
        options: dict[str, Any] = {"metavar": _metavar(about), "help": _help(about, text)}
        if _is_list(about):
            options["nargs"] = "+"
        elif self.switches and bool in _kinds(about):
            options |= {"nargs": "?", "const": "true"}
        return options

    def _value(self, name: str, text: str | list[str]) -> Any:
        """What stands on the command line, as the type of its field; what is of no such type the model refuses."""
        kinds = _kinds(self.model.model_fields[name])
        numeric = bool({int, float} & kinds)
        if isinstance(text, list):
            return [_number(part) for part in re.split(r"[\s,;]+", " ".join(text)) if part] if numeric else text
        if bool in kinds:
            if text.lower() not in ("true", "false"):
                raise FieldError(f"--{name}", f"expected true or false, got '{text}'")
            return text.lower() == "true"
        return _number(text) if numeric else text

    def _unknown(self, extra: str) -> ConfigError:
        flag = extra.partition("=")[0]
        if not flag.startswith("-"):
            return ConfigError(f"'{extra}': no flag stands before it; --help lists them")
        known = [option for fields in self.groups.values() for name in fields for option in self._flags(name)]
        known += ["--help", *([f"--{_CONFIG}"] if self.config_file else [])]
        near = difflib.get_close_matches(flag, known, n=1, cutoff=0.0)
        return FieldError(flag, f"unknown flag; did you mean {near[0]}?")

    def _as_flag(self, error: FieldError) -> ConfigError:
        name = error.field.partition(".")[0]
        if name in self.model.model_fields:
            missing = error.problem.startswith("Field required")
            return FieldError(f"--{name}", "is required" if missing else error.problem)
        # Fields that do not go together: the message begins with one of them. Else an unknown key of the file.
        return ConfigError(f"--{error.problem}" if name == self.model.__name__ else str(error))


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as our errors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _number(text: str) -> int | float | str:
    """The finite number that is written, or the text where there is none."""
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        return text
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else number


def _leaves(annotation: Any) -> list[Any]:
    """The types, and the choices of literals, that an annotation is made of."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return list(parts)
    if get_origin(annotation) is Annotated:
        tables = [part for part in parts if isinstance(part, NameTable)]
        return list(tables[0]) if tables else _leaves(parts[0])
    return [leaf for part in parts for leaf in _leaves(part)] if parts else [annotation]


def _kinds(about: FieldInfo) -> set[type]:
    return {leaf if isinstance(leaf, type) else type(leaf) for leaf in _leaves(about.annotation)}


def _is_list(about: FieldInfo) -> bool:
    return get_origin(about.annotation) is tuple


def _metavar(about: FieldInfo) -> str:
    kinds = _kinds(about) - {NoneType}
    choices = [str(leaf) for leaf in _leaves(about.annotation) if isinstance(leaf, str | int)]
    if bool in kinds:
        return "true|false"
    if choices:
        return "|".join(["NUMBER"] * (float in kinds) + choices)
    if Path in kinds:
        return "PATH"
    return "NUMBER" if {int, float} & kinds else "TEXT"


def _help(about: FieldInfo, text: str) -> str:
    default = about.get_default()
    if about.is_required():
        text += " (required)"
    elif default not in (None, ()):
        parts = cast("tuple[object, ...]", default) if isinstance(default, tuple) else (default,)
        shown = " ".join(map(str, parts))
        text += f" (default: {shown.lower() if isinstance(default, bool) else shown})"
    return text.replace("%", "%%")
