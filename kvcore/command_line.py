"""The parts that all commands share: exit statuses, errors in one line, and the look of `--help`."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from kvcore.errors import EXIT_FAILED, KVDistillError, OutputError
from kvcore.files import write_problem

_BOLD, _DIM, _RED = "1", "2", "1;31"
_WIDEST = 100
_COLUMN = 12


def run_command(program: str, command: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Runs a command and returns its exit status: 1 for an error of kvdistill, 2 if it is a mistake of usage.

    Args:
        program: begins the line of an error.
        command: does the work; returns an exit status, or None for 0.
        interrupted: what to print after Ctrl-C.
    """
    try:
        return command() or 0
    except KVDistillError as error:
        print_error(program, error)
        return error.exit_status
    except OSError as error:
        if (problem := write_problem(error)) is None:
            raise
        where = "a file" if error.filename is None else error.filename
        print_error(program, OutputError(f"cannot read or write {where}: {problem}"))
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: {interrupted}\n")
        return 128 + signal.SIGINT


def print_error(program: str, error: KVDistillError) -> None:
    """Writes an error to stderr in one line, in colour on a terminal."""
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    if not in_color(sys.stderr):
        sys.stderr.write(f"{program}: {rank}{error.line()}\n")
        return
    hint = f" {_paint(f'next: {error.next_step}', _DIM)}" if error.next_step else ""
    sys.stderr.write(f"{_paint('error:', _RED)} {rank}{error}{hint}\n")


def in_color(stream: TextIO) -> bool:
    """Whether to write colours to a stream: it is a terminal, and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def help_page(usage: str, description: str, sections: Mapping[str, Sequence[tuple[str, str]]], examples: str) -> str:
    """The text of `--help`.

    Args:
        usage: the command line in short.
        description: what the command does; its paragraphs are wrapped.
        sections: for each heading its names (flags, arguments or commands), each with its description.
        examples: commands to copy, printed as they are, with `#` before what they show.
    """
    color, width = in_color(sys.stdout), min(shutil.get_terminal_size().columns, _WIDEST)

    def heading(text: str) -> str:
        return _paint(f"{text}:", _BOLD) if color else f"{text}:"

    def wrapped(text: str, indent: str) -> str:
        return textwrap.fill(
            " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )

    blocks = [wrapped(paragraph, "") for paragraph in description.split("\n\n")]
    blocks.append(f"{heading('Usage')} {usage}")
    for title, entries in sections.items():
        lines = [heading(title)]
        longest = max(len(name) for name, _ in entries)
        indent = " " * (longest + 4 if longest <= _COLUMN else 10)
        for name, text in entries:
            shown, described = _paint(name, _BOLD) if color else name, wrapped(text, indent)
            # Short names and their descriptions stand side by side.
            lines.append(f"  {shown}{described[2 + len(name) :] if longest <= _COLUMN else chr(10) + described}")
        blocks.append("\n".join(lines))
    if examples:
        blocks.append(f"{heading('Examples')}\n{textwrap.indent(examples.strip(), '  ')}")
    return "\n\n".join(blocks) + "\n"


def _paint(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m"
