"""Typer commands whose flags are a FlagSet's. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvcore.flags import FlagSet
from kvcore.typer_help import Command

# Typer passes everything after the command's name on, `--help` too.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


@dataclass(frozen=True)
class ShellCompletion:
    """One proposal of shell completion, as typer prints it."""

    value: str
    help: str | None = None
    type: str = "plain"


def forwarding_command(flags: Callable[[], FlagSet[Any]]) -> type[Command]:
    """Makes the class of a command with the flags of a FlagSet, which a shell completes.

    Args:
        flags: returns the flags; only called for shell completion.
    """

    class ForwardingCommand(Command):
        def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
            """Proposes flags, or the choices of the flag before; the shell completes other words as paths."""
            if not incomplete.startswith("-"):
                before = ctx.args[-1].replace("_", "-") if ctx.args else ""
                choices = [names for flag, _, names in flags().completions() if flag == before]
                return [ShellCompletion(name) for names in choices for name in names if name.startswith(incomplete)]
            underscores = "_" in incomplete
            proposals: list[Any] = []
            for flag, text, _ in flags().completions():
                spelled = f"--{flag[2:].replace('-', '_')}" if underscores else flag
                if spelled.startswith(incomplete):
                    proposals.append(ShellCompletion(spelled, text))
            return proposals

    return ForwardingCommand
