"""Tests of `--help`: every command has examples, and it accepts each of them."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer

from data.multi_task_dataset import EXAMPLES as DATA_EXAMPLES
from data.multi_task_dataset import prepare
from evaluation.config import FLAGS as EVAL_FLAGS
from experiments.recipe.config import FLAGS as RECIPE_FLAGS
from extraction.config import FLAGS as EXTRACT_FLAGS
from kvcore.errors import KVDistillError
from kvcore.flags import FlagSet
from kvdistill.cli import app
from teacher_server.config import FLAGS as SERVE_FLAGS
from tests.support.servers import REPOSITORY

FLAG_SETS: dict[str, FlagSet[Any]] = {
    "kvdistill serve": SERVE_FLAGS,
    "kvdistill extract": EXTRACT_FLAGS,
    "kvdistill eval": EVAL_FLAGS,
    "experiments/train_multi_teacher_kv.py": RECIPE_FLAGS,
}
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
OWN_HELP = [name for name in COMMANDS if f"kvdistill {name}" not in FLAG_SETS]


def examples(text: str) -> list[str]:
    """The command lines of a block of examples, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def arguments_after(command: str, line: str) -> list[str]:
    """The arguments after `command`; a launcher may come before it."""
    assert command in line, line
    return shlex.split(line.partition(command)[2])


@pytest.mark.parametrize("name", OWN_HELP)
def test_every_example_of_a_command_is_accepted_by_it(name: str) -> None:
    command = COMMANDS[name]
    shown = examples(command.epilog or "")
    assert shown
    for line in shown:
        command.make_context(name, arguments_after(f"kvdistill {name}", line))


@pytest.mark.parametrize("name", FLAG_SETS)
def test_every_example_of_a_flag_set_is_accepted_by_it(name: str) -> None:
    flags = FLAG_SETS[name]
    shown = examples(flags.help(name).partition("Examples:")[2])
    assert shown
    for line in shown:
        flags.read(arguments_after(name, line), name)


def test_every_example_of_the_data_command_is_accepted_by_it() -> None:
    made = typer.Typer()
    made.command()(prepare)
    command = typer.main.get_command(made)
    shown = examples(DATA_EXAMPLES)
    assert shown
    for line in shown:
        command.make_context("prepare", arguments_after("-m data.multi_task_dataset", line))


@pytest.mark.parametrize("name", OWN_HELP)
def test_every_flag_of_a_command_has_a_help_text(name: str) -> None:
    assert COMMANDS[name].help
    silent = [flag.name for flag in COMMANDS[name].params if not (getattr(flag, "help", None) or flag.hidden)]
    assert silent == []


def error_classes(kind: type[KVDistillError]) -> list[type[KVDistillError]]:
    return [kind, *(found for below in kind.__subclasses__() for found in error_classes(below))]


def test_commands_and_flags_in_the_next_steps_of_errors_exist() -> None:
    steps = [error.next_step for error in error_classes(KVDistillError) if "kvdistill " in error.next_step]
    assert len(steps) > 3
    for step in steps:
        name, *arguments = shlex.split(re.search(r"kvdistill ([^,)]*)", step)[1])  # pyright: ignore[reportOptionalSubscript]
        if name == "--version":
            continue
        flags = [flag for parameter in COMMANDS[name].params for flag in parameter.opts]
        if listed := FLAG_SETS.get(f"kvdistill {name}"):
            flags += [flag for flag, _, _ in listed.completions()]
        assert all(word in flags for word in arguments if word.startswith("--")), step


def test_files_in_the_examples_exist() -> None:
    named = [
        word
        for command in COMMANDS.values()
        for line in examples(command.epilog or "")
        for word in shlex.split(line)
        if word.startswith("configs/")
    ]
    assert named
    assert [path for path in named if not (REPOSITORY / path).is_file()] == []
