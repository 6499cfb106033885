"""Command lines made from configuration models: one flag for each field."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Generic, cast, get_origin

from pydantic.fields import FieldInfo

from kvcore.command_line import help_page
from kvcore.config import Alias, ModelT, annotation_of, choices, leaves, parse, read_yaml
from kvcore.errors import ConfigError, FieldError

_CONFIG = "config"
_CONFIG_HELP = "YAML file with these settings, named as the flags with underscores. Flags override it."


@dataclass(frozen=True)
class FlagSet(Generic[ModelT]):
    """The flags of a command: one for each field of a model, described by the field's docstring.

    Dashes and underscores in a flag are interchangeable. A boolean's flag takes `true` or `false`, and alone means
    true. Lists take several values; lists of numbers may also be written as `0.5,0.5`. The last of repeated flags wins.

    Args:
        model: what the flags are read into. An error of fields that conflict begins with the name of one of them.
        description: what the command does.
        examples: the end of `--help`; COMMAND stands for the command.
        config_file: whether `--config FILE` reads a YAML file of fields, which flags override.
        script: the script that runs the command where it is not started as `kvdistill NAME`.
    """

    model: type[ModelT]
    description: str
    examples: str
    config_file: bool = False
    script: str = ""

    def read(self, arguments: Sequence[str], program: str) -> ModelT:
        """Reads a command line; `--help` prints and exits.

        Raises:
            ConfigError: a flag is unknown (names the nearest one) or lacks a value, or two flags conflict.
            FieldError: a value is missing or invalid; names the flag.
        """
        if "--help" in arguments or "-h" in arguments:
            sys.stdout.write(self.help(program))
            raise SystemExit(0)
        given = self._given(arguments)
        _, files = given.pop(_CONFIG, ("", [])) if self.config_file else ("", [])
        tree = read_yaml(Path(files[0])) if files else {}
        tree |= {name: self._value(name, flag, words) for name, (flag, words) in given.items()}
        try:
            return parse(tree, self.model)
        except FieldError as error:
            name = error.field.partition(".")[0]
            if name in self.model.model_fields:
                problem = "is required" if error.problem.startswith("Field required") else error.problem
            else:  # An unknown key of the file.
                raise
            raise FieldError(given[name][0] if name in given else as_flag(name), problem) from error

    def help(self, program: str) -> str:
        """The text of `--help`."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": [("-h, --help", "Show this message and exit.")]}
        if self.config_file:
            sections["Options"].append((f"--{_CONFIG} PATH", _CONFIG_HELP))
        starts = {first: heading for heading, first in self.model.headings.items()}
        section = sections["Options"]
        for name, about in self.model.model_fields.items():
            if name in starts:
                section = sections.setdefault(starts[name], [])
            section.append((f"{', '.join(flags_of(name, about))} {_metavar(about)}", _description(about)))
        if self.model.headings:
            sections["Options"] = sections.pop("Options")
        command = program if program.startswith("kvdistill ") else f"python {self.script}"
        return help_page(f"{command} [OPTIONS]", self.description, sections, self.examples.replace("COMMAND", command))

    def completions(self) -> Iterator[tuple[str, str, list[str]]]:
        """Every flag, its description, and the choices of its value."""
        yield "--help", "Show this message and exit.", []
        for name, about in self.model.model_fields.items():
            for flag in flags_of(name, about):
                yield flag, about.description or "", [str(choice) for choice in choices(annotation_of(about))]

    def _given(self, arguments: Sequence[str]) -> dict[str, tuple[str, list[str]]]:
        """For each field that was given: its flag as the user typed it, and the words after it."""
        known = {
            flag[2:].replace("-", "_"): name
            for name, about in self.model.model_fields.items()
            for flag in flags_of(name, about)
        }
        if self.config_file:
            known[_CONFIG] = _CONFIG
        given: dict[str, tuple[str, list[str]]] = {}
        words: list[str] | None = None
        for argument in arguments:
            if not argument.startswith("--"):
                if words is None:
                    raise ConfigError(f"'{argument}': no flag before it; --help lists the flags")
                words.append(argument)
                continue
            flag, equals, value = argument.partition("=")
            key = flag[2:].replace("-", "_")
            if key not in known:
                near = as_flag(difflib.get_close_matches(key, [*known, "help"], n=1, cutoff=0.0)[0])
                raise FieldError(flag, f"unknown flag; did you mean {_spelled_like(flag, near)}?")
            words = [value] if equals else []
            given[known[key]] = flag, words
        for name, (flag, values) in given.items():
            if name == _CONFIG and self.config_file:
                _one(flag, values)
        return given

    def _value(self, name: str, flag: str, words: list[str]) -> Any:
        """The value of a field, as its type if the words can be read so; the model refuses the others."""
        about = self.model.model_fields[name]
        kinds = _kinds(about)
        numeric = bool({int, float} & kinds)
        if is_list(about):
            if not words:
                raise FieldError(flag, "expected at least one value")
            return [_number(part) for part in re.split(r"[\s,;]+", " ".join(words)) if part] if numeric else words
        if bool in kinds:
            text = _one(flag, words or ["true"]).lower()
            if text not in ("true", "false"):
                raise FieldError(flag, f"expected true or false, got '{text}'")
            return text == "true"
        return _number(_one(flag, words)) if numeric else _one(flag, words)


def as_flag(name: str) -> str:
    """A field's flag, as `--help` shows it."""
    return f"--{name.replace('_', '-')}"


def flags_of(name: str, about: FieldInfo) -> list[str]:
    """A field's flag and its aliases."""
    return [as_flag(name), *(as_flag(alias.name) for alias in about.metadata if isinstance(alias, Alias))]


def _spelled_like(typed: str, flag: str) -> str:
    return f"--{flag[2:].replace('-', '_')}" if "_" in typed else flag


def _one(flag: str, words: list[str]) -> str:
    if len(words) != 1:
        raise FieldError(flag, f"expected one value, got {' '.join(words) or 'none'}")
    return words[0]


def _number(text: str) -> int | float | str:
    """The finite number that is written, or the text where there is none."""
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        return text
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else number


def _kinds(about: FieldInfo) -> set[type]:
    return {leaf if isinstance(leaf, type) else type(leaf) for leaf in leaves(annotation_of(about))}


def is_list(about: FieldInfo) -> bool:
    """Whether a field takes several values."""
    return get_origin(about.annotation) is tuple


def _metavar(about: FieldInfo) -> str:
    kinds, names = _kinds(about) - {NoneType}, [str(choice) for choice in choices(annotation_of(about))]
    if bool in kinds:
        return "[true|false]"
    if names:
        return "|".join(["NUMBER"] * (float in kinds) + names)
    kind = "PATH" if Path in kinds else "NUMBER" if {int, float} & kinds else "TEXT"
    return f"{kind}..." if is_list(about) else kind


def _description(about: FieldInfo) -> str:
    text, default = about.description or "", about.get_default()
    if about.is_required():
        return f"{text} [required]"
    if default in (None, ()):
        return text
    shown = " ".join(map(str, cast("tuple[object, ...]", default) if isinstance(default, tuple) else (default,)))
    return f"{text} [default: {shown.lower() if isinstance(default, bool) else shown}]"
