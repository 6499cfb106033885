"""The look of `--help` for typer's commands: the same as for commands made from configuration models."""

from __future__ import annotations

import inspect
from typing import Any

from typer.core import TyperCommand, TyperGroup

from kvcore.command_line import help_page


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
    records = [(parameter, parameter.get_help_record(ctx)) for parameter in command.get_params(ctx)]
    for heading, kind in (("Arguments", "argument"), ("Options", "option")):
        shown = [record for parameter, record in records if record and parameter.param_type_name == kind]
        if shown:
            sections[heading] = shown
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    return help_page(usage, inspect.cleandoc(command.help or ""), sections, command.epilog or "")
