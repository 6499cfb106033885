"""Commands that read their flags themselves: typer hands everything on, `--help` too. Free of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from typer.core import TyperCommand

from kvcore.flags import FlagSet

# What a command line of such a command needs to be told of typer.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


@dataclass(frozen=True)
class ShellCompletion:
    """One proposal of shell completion, as typer prints it."""

    value: str
    help: str | None = None
    type: str = "plain"


def forwarding_command(flags: Callable[[], FlagSet[Any]]) -> type[TyperCommand]:
    """The class of a command whose flags are a FlagSet's, so that a shell completes those.

    Args:
        flags: gives the flags; called only when a shell asks.
    """

    class PassedOn(TyperCommand):
        def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
            """Flags that begin with what was typed; other words are left to the shell, which completes paths."""
            del ctx
            if not incomplete.startswith("-"):
                return []
            return [ShellCompletion(flag, text) for flag, text in flags().texts() if flag.startswith(incomplete)]

    return PassedOn
