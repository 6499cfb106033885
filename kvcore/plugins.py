"""Tables of implementations by name: the built-in ones, and those that installed packages add. Imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from kvcore.errors import ConfigError, did_you_mean

T = TypeVar("T")


class NameTable(Collection[str]):
    """The implementations of one kind by name. The names are known without imports; only `load` imports.

    A configuration field `Annotated[str, TABLE]` accepts the names of the table.

    Args:
        kind: the kind in error messages, such as `selector`.
        group: the entry-point group in which packages add implementations.
        builtin: `module:attribute` of each built-in name.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind, self.group, self.builtin = kind, group, builtin

    def __iter__(self) -> Iterator[str]:
        """The names, built-in ones first."""
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def __contains__(self, name: object) -> bool:
        # A built-in name does not need the installed packages, which are slow to list.
        return name in self.builtin or name in self._points

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def check(self, name: str) -> str:
        """Returns the name if it is in the table.

        Raises:
            ConfigError: the name is unknown; lists the known names and suggests the nearest.
        """
        if name not in self:
            names = list(self)
            raise ConfigError(f"expected one of {', '.join(names)}; got '{name}'{did_you_mean(name, names)}")
        return name

    def load(self, name: str, expected: type[T]) -> T:
        """Imports an implementation.

        Raises:
            ConfigError: the name is unknown, or the entry point of a package cannot be imported or has another type.
        """
        point = self._points[self.check(name)]
        try:
            found: object = point.load()
        except (ImportError, AttributeError) as error:
            if name in self.builtin:
                raise
            raise ConfigError(f"cannot import the {self.kind} {_described(point)}: {error}") from error
        if not isinstance(found, expected):
            actual = type(found).__name__
            raise ConfigError(f"the {self.kind} {_described(point)} must be a {expected.__name__}, but is a {actual}")
        return found

    @functools.cached_property
    def _points(self) -> dict[str, EntryPoint]:
        points = {name: EntryPoint(name, target, self.group) for name, target in self.builtin.items()}
        for point in entry_points(group=self.group):
            if point.name in points:
                conflict = "has a built-in name" if point.name in self.builtin else "has the name of another package's"
                raise ConfigError(f"the {self.kind} {_described(point)} {conflict}; rename the entry point")
            points[point.name] = point
        return points


def _described(point: EntryPoint) -> str:
    package = f" of the package {point.dist.name}" if point.dist else ""
    return f"'{point.name}'{package} ({point.value})"
