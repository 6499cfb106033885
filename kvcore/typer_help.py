"""The look of `--help` for typer's commands: the same as for commands made from configuration models."""

from __future__ import annotations

import inspect
import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

from kvcore.command_line import help_page

# How the values of typer's types are shown.
_VALUES = {"path": "PATH", "int": "NUMBER", "int range": "NUMBER", "float": "NUMBER", "float range": "NUMBER"}


class Command(TyperCommand):
    """A command whose epilog holds examples to copy, with `#` before what they show."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help page."""
        formatter.write(_page(self, ctx, {}))


class Group(TyperGroup):
    """The program, whose help lists its commands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help page."""
        commands = [(name, command.help or "") for name, command in self.commands.items() if not command.hidden]
        formatter.write(_page(self, ctx, {"Commands": commands}))


def _page(command: Any, ctx: Any, sections: dict[str, list[tuple[str, str]]]) -> str:
    usage = f"{ctx.command_path} [OPTIONS]{' COMMAND [ARGS]...' * bool(sections)}"
    arguments: list[tuple[str, str]] = []
    options: list[tuple[str, str]] = []
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if parameter.param_type_name == "argument":
            name = f"{parameter.name.upper()}{'...' * (parameter.nargs == -1)}"
            usage += f" {name}"
            arguments.append((name, record[1]))
        elif record:
            options.append((re.sub("<(.*?)>", lambda kind: _VALUES.get(kind[1], "TEXT"), record[0]), record[1]))
    if arguments:
        sections["Arguments"] = arguments
    sections["Options"] = options
    return help_page(usage, inspect.cleandoc(command.help or ""), sections, command.epilog or "")
