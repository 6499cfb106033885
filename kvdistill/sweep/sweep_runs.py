"""The runs of a sweep: flags, folders and state."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.recipe.build import DataFiles
from experiments.recipe.config import FLAGS, RecipeSettings
from experiments.recipe.run_recipe import check
from kvcore.errors import ConfigError
from kvdistill.report.finished_runs import find_runs
from kvdistill.sweep.sweep_config import Flags, SweepConfig, as_arguments
from student_trainer.config import BEST_MODEL

RUNS, STATE = "runs", "sweep_state.json"
_PROGRAM = "train_multi_teacher_kv.py"
# Locations do not change the results.
_LOCATIONS = {"output_dir", "teacher_endpoints", "teacher_device", "data_dir", "kv_store", "kv_mode", "prepare_only"}


@dataclass(frozen=True)
class SweepRun:
    """One training of a sweep, and the evaluation of its best models."""

    number: int
    options: dict[str, str]
    seed: int
    directory: Path
    arguments: tuple[str, ...]
    sweep: SweepConfig

    @property
    def name(self) -> str:
        """Its folder, relative to the sweep's folder of runs."""
        return self.directory.relative_to(self.sweep.output_dir / RUNS).as_posix()

    @property
    def command(self) -> list[str]:
        """The training command."""
        return [*resolved(self.sweep.command), *self.arguments]

    @cached_property
    def settings(self) -> RecipeSettings:
        """The settings of the training.

        Raises:
            ConfigError: a flag is wrong; with the name of the run.
        """
        try:
            settings = FLAGS.read(self.arguments, _PROGRAM)
            check(settings, DataFiles.under(self.directory / "data"), 1)
        except ConfigError as error:
            raise ConfigError(f"run {self.name}: {error}") from error
        return settings

    @property
    def training(self) -> str:
        """A digest of everything that determines the training's result."""
        return _digest(self.settings.model_dump(mode="json", exclude=_LOCATIONS))

    @property
    def evaluation(self) -> str:
        """A digest of the training and of the evaluation's settings."""
        return _digest([self.training, self.sweep.model_dump(mode="json", include={"evaluation"})])

    def state(self) -> dict[str, str]:
        """The digests of the finished steps.

        Raises:
            ConfigError: the finished training had other settings.
        """
        path = self.directory / STATE
        if not path.is_file():
            return {}
        state: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        if state["training"] != self.training:
            raise ConfigError(
                f"{self.directory} has a finished training with other settings; restore the settings, choose "
                "another output_dir, or remove that folder"
            )
        return state

    @property
    def is_trained(self) -> bool:
        """Whether the training succeeded."""
        return bool(self.state())

    @property
    def is_done(self) -> bool:
        """Whether training and evaluation succeeded."""
        state = self.state()
        return bool(state) and (self.sweep.evaluation is None or state.get("evaluation") == self.evaluation)

    def evaluations(self) -> list[list[str]]:
        """The evaluation commands, one per best model. Requires a finished training."""
        flags = self.sweep.evaluation
        return [] if flags is None else [_evaluation(run.path, flags) for run in find_runs([self.directory])]


def _evaluation(folder: Path, flags: Flags) -> list[str]:
    own: Flags = {"model_path": str(folder / BEST_MODEL), "output_file": str(folder / "eval_results.json")}
    return [*resolved("python evaluation/multi_task_eval.py"), *as_arguments(own | flags)]


def plan(sweep: SweepConfig) -> list[SweepRun]:
    """Returns all runs of the sweep. Checks them all, so that a mistake is found before the first run starts.

    Raises:
        ConfigError: the settings of a run are wrong, or differ from those of its finished training.
    """
    runs: list[SweepRun] = []
    for chosen in itertools.product(*(options.items() for options in sweep.axes.values())):
        options = dict(zip(sweep.axes, (name for name, _ in chosen), strict=True))
        flags: Flags = {} if sweep.config is None else {"config": str(sweep.config)}
        for more in (sweep.flags, *(flags for _, flags in chosen)):
            flags = flags | more
        for seed in sweep.seeds:
            directory = sweep.output_dir.joinpath(RUNS, *options.values(), f"seed{seed}")
            own: Flags = {"seed": seed, "output_dir": str(directory)}
            runs.append(SweepRun(len(runs), options, seed, directory, tuple(as_arguments(flags | own)), sweep))
    for run in runs:
        run.state()
        assert run.settings.output_dir == run.directory
    return runs


def search_path() -> str:
    """PATH with the commands of this Python first, such as torchrun."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))


def resolved(command: str) -> list[str]:
    """Splits a command and resolves its program.

    Raises:
        ConfigError: the program is not on PATH.
    """
    program, *rest = shlex.split(command)
    found = sys.executable if program == "python" else shutil.which(program, path=search_path())
    if found is None:
        raise ConfigError(f"command: no program '{program}' on PATH")
    return [found, *rest]


def _digest(tree: Any) -> str:
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=16).hexdigest()
