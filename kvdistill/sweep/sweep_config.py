"""The configuration of `kvdistill sweep`. Imports no torch, so that validation is fast."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from kvcore.config import PositiveInt, StrictModel

Scalar = bool | int | float | str
Flags = dict[str, Scalar | tuple[Scalar, ...]]
# Options name folders.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
# Flags that the sweep sets for each run.
_OWN_FLAGS = ("output_dir", "seed")
_OWN_EVALUATION_FLAGS = ("model_path", "output_file")


class SweepConfig(StrictModel):
    """A matrix of training runs: every combination of the axes' options, each with every seed."""

    output_dir: Path
    """Directory that receives one folder per run, table.md and table.csv."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of the repetitions over which the confidence intervals are computed."""
    config: Path | None = None
    """File of flags of experiments/train_multi_teacher_kv.py, such as configs/experiments/*.yaml."""
    flags: Flags = Field(default_factory=dict)
    """Flags that override `config`, with underscores and without leading dashes."""
    matrix: Annotated[dict[str, dict[str, Flags] | tuple[Scalar, ...]], Field(min_length=1)]
    """The options of each axis. An option is a name with a mapping of flags (`config` is allowed too). If the axis has
    the name of a flag, a list of values is enough. Axes override `flags`, and later axes override earlier ones."""
    command: str = "python experiments/train_multi_teacher_kv.py"
    """Training command, to which the flags are appended. Put torchrun here."""
    evaluation: Flags | None = None
    """Flags of evaluation/multi_task_eval.py for every best model. Without it, only validation scores are compared."""
    slurm: dict[str, str | int] = Field(default_factory=dict)
    """Options of sbatch for `--slurm`, by their long names."""
    max_parallel: PositiveInt | None = None
    """Maximum number of array tasks that run at the same time."""

    @property
    def axes(self) -> dict[str, dict[str, Flags]]:
        """The flags of every option of every axis."""
        return {
            axis: options if isinstance(options, dict) else {_text(value): {axis: value} for value in options}
            for axis, options in self.matrix.items()
        }

    @model_validator(mode="after")
    def _names_are_plain(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: must differ, got {list(self.seeds)}")
        for axis, options in self.matrix.items():
            names = list(self.axes[axis])
            if not names:
                raise ValueError(f"matrix.{axis}: has no option")
            if len(names) != len(options):
                raise ValueError(f"matrix.{axis}: options must differ, got {list(options)}")
            for name in (axis, *names):
                if not _NAME.fullmatch(name):
                    raise ValueError(
                        f"matrix.{axis}: '{name}' names a folder, so only letters, digits and _.+- are allowed; write "
                        "the option as NAME: {FLAG: VALUE}"
                    )
        return self

    @model_validator(mode="after")
    def _flags_are_free(self) -> Self:
        places = {"flags": self.flags} | {
            f"matrix.{axis}.{name}": flags for axis, options in self.axes.items() for name, flags in options.items()
        }
        for place, flags in places.items():
            for flag in _OWN_FLAGS:
                if flag in flags:
                    raise ValueError(f"{place}.{flag}: is set for each run; see {'seeds' if flag == 'seed' else flag}")
        for flag in _OWN_EVALUATION_FLAGS:
            if flag in (self.evaluation or {}):
                raise ValueError(f"evaluation.{flag}: is set for each best model")
        if not shlex.split(self.command):
            raise ValueError("command: is empty")
        return self


def _text(value: Scalar) -> str:
    """A value as text on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_arguments(flags: Flags) -> list[str]:
    """Flags as command-line arguments."""
    arguments: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, tuple) else (value,)
        arguments += [f"--{name}", *(_text(one) for one in values)]
    return arguments
