"""Name tables: what is built in, and what installed packages add through entry points. Free of torch."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from kvcore.errors import ConfigError

T = TypeVar("T")


class NameTable(Collection[str]):
    """Implementations of one kind by name. Only `load` imports one; the names are known without any import.

    `Annotated[str, TABLE]` is a configuration field that accepts the names in the table.

    Args:
        kind: what an error calls one of them, such as `selector`.
        group: the entry-point group through which packages add their own.
        builtin: the built-in ones, `module:attribute` by name.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind, self.group, self.builtin = kind, group, builtin

    def __iter__(self) -> Iterator[str]:
        """The names: built-in ones first."""
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def __contains__(self, name: object) -> bool:
        # Built-in names need no look at what is installed, which takes a moment.
        return name in self.builtin or name in self._points

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def check(self, name: str) -> str:
        """Gives back a name that is in the table.

        Raises:
            ConfigError: it is not; the message says the nearest and all known names.
        """
        if name not in self:
            near = difflib.get_close_matches(name, self._points, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ";"
            raise ConfigError(f"unknown {self.kind}{hint} known: {', '.join(self._points)}")
        return name

    def load(self, name: str, expected: type[T]) -> T:
        """Imports an implementation.

        Raises:
            ConfigError: the name is unknown, or a package's entry point cannot be imported or is not of that type.
        """
        point = self._points[self.check(name)]
        try:
            found: object = point.load()
        except (ImportError, AttributeError) as error:
            if name in self.builtin:
                raise
            raise ConfigError(f"cannot import the {self.kind} {_described(point)}: {error}") from error
        if not isinstance(found, expected):
            wrong = type(found).__name__
            raise ConfigError(f"the {self.kind} {_described(point)} must be a {expected.__name__}, not a {wrong}")
        return found

    @functools.cached_property
    def _points(self) -> dict[str, EntryPoint]:
        points = {name: EntryPoint(name, place, self.group) for name, place in self.builtin.items()}
        for point in entry_points(group=self.group):
            if point.name in points:
                taken = "is a built-in name" if point.name in self.builtin else "is offered by two packages"
                raise ConfigError(f"the {self.kind} {_described(point)} {taken}; rename the entry point")
            points[point.name] = point
        return points


def _described(point: EntryPoint) -> str:
    package = f" of the package {point.dist.name}" if point.dist else ""
    return f"'{point.name}'{package} ({point.value})"
