"""Checkpoints in safetensors and JSON. Tensors are whole, so a run can resume with any ZeRO stage and world size."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from kvcore.errors import ConfigError
from kvcore.files import new_directory, sync
from kvcore.tensors.kv_map import KVMap
from kvcore.types import Tensor
from student_trainer.loop.checkpoint_hashes import (
    FILES_XXH3,
    DamagedCheckpointError,
    file_hash,
    read_verified,
    write_state,
)
from student_trainer.loop.ds_engine import Engine
from student_trainer.loop.rank_failures import shared_failure
from student_trainer.loop.run_identity import differences
from student_trainer.model.partitions import set_value

logger = logging.getLogger(__name__)

WEIGHTS, MOMENTS, FROZEN, STATE = "weights.safetensors", "moments.safetensors", "frozen.safetensors", "state.json"
TENSORS = (WEIGHTS, MOMENTS, FROZEN)
# Prefix of the directory that a damaged checkpoint is moved to.
DAMAGED = "damaged-"
# Prefix of the tensors of maps.
MAP = "map/"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved checkpoint."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return int(self.state["step"])

    def frozen(self) -> dict[str, Tensor]:
        """The tensors fitted before the first step, which are not trained: adapters and scales."""
        return {name: tensor for name, tensor in load_file(self.path / FROZEN).items() if not name.startswith(MAP)}

    def maps(self) -> dict[str, KVMap]:
        """The map that each teacher applies, by the teacher's name."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_file(self.path / FROZEN).items():
            if name.startswith(MAP):
                teacher, _, part = name.removeprefix(MAP).partition("/")
                tensors.setdefault(teacher, {})[part] = tensor
        return {teacher: KVMap(parts) for teacher, parts in tensors.items()}

    def load_weights(self, module: nn.Module) -> None:
        """Loads the weights into a module before its engine is created: an engine copies its parameters."""
        parameters = dict(module.named_parameters())
        with _opened(self.path / WEIGHTS) as weights:
            unexpected = weights.keys() - parameters.keys()
            assert not unexpected, f"weights of another model: {unexpected}"
            for name in weights.keys():  # noqa: SIM118 - not a dictionary
                set_value(parameters[name], weights.get_tensor(name))

    def restore(self, engine: Engine, began_at: int = 0) -> None:
        """Loads fp32 weights and optimiser state into an engine created after `load_weights`.

        `began_at`: the step before which the optimiser began without moments.
        """
        with _opened(self.path / WEIGHTS) as weights, _opened(self.path / MOMENTS) as moments:
            engine.restore(weights.get_tensor, moments.get_tensor, self.step - began_at)


def map_tensors(maps: Mapping[str, KVMap]) -> dict[str, Tensor]:
    """The teachers' maps as tensors of a checkpoint, next to those that are frozen."""
    return {f"{MAP}{teacher}/{name}": tensor for teacher, one in maps.items() for name, tensor in one.tensors.items()}


def newest_intact(directory: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are as they were saved; None if there is no checkpoint at all.

    Moves newer, damaged ones out of the way and warns of each.

    Raises:
        ConfigError: every checkpoint is damaged.
    """
    damaged: list[tuple[Path, DamagedCheckpointError]] = []
    for path in sorted(directory.glob("step-*"), reverse=True):
        try:
            found = Checkpoint(path, read_verified(path / STATE))
        except DamagedCheckpointError as error:
            damaged.append((path, error))
            continue
        for broken, error in damaged:
            aside = broken.with_name(DAMAGED + broken.name)
            shutil.rmtree(aside, ignore_errors=True)
            broken.rename(aside)
            logger.warning(
                "damaged checkpoint: %s; it was moved to %s, and the run resumes from %s", error, aside, path
            )
        return found
    if damaged:
        problems = "; ".join(str(error) for _, error in damaged)
        raise ConfigError(
            f"run.output_dir: no checkpoint in {directory} can be used: {problems}; restore a copy of one, or start "
            "over with --set run.resume=never"
        )
    return None


def latest(directory: Path) -> Checkpoint | None:
    """The newest complete checkpoint under a run's `checkpoints/`, or None. Its files are not compared with hashes."""
    found = sorted(path for path in directory.glob("step-*") if (path / STATE).is_file())
    return _read(found[-1]) if found else None


def at(directory: Path, step: int) -> Checkpoint:
    """The checkpoint of one step.

    Raises:
        ConfigError: there is none.
    """
    path = directory / _name(step)
    if not (path / STATE).is_file():
        raise ConfigError(f"run.output_dir: {path} cannot be read on this node; every rank needs the same directory")
    return _read(path)


def _opened(path: Path) -> Any:
    """A file of tensors, which reads one at a time: mapped into memory, they would stay there together."""
    return safe_open(path, framework="pt", backend="pread")


def _read(path: Path) -> Checkpoint:
    return Checkpoint(path, json.loads((path / STATE).read_text(encoding="utf-8")))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def check_same_run(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Refuses to resume a run with other settings, teachers or data.

    Raises:
        ConfigError: names the settings that differ.
    """
    if differing := differences(checkpoint.state["identity"], identity):
        raise ConfigError(
            f"{checkpoint.path} belongs to a run with other settings ({'; '.join(differing)}); restore them, choose "
            "another run.output_dir, or start over with --set run.resume=never"
        )


def save(directory: Path, engine: Engine, frozen: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Writes a checkpoint, which gets its final name only when complete. All ranks must call it.

    Raises:
        OutputError: on every rank: the disk is full or cannot be written; earlier checkpoints are kept.
    """
    weights, moments = engine.weights(), engine.moments()
    final = directory / _name(state["step"])
    with shared_failure():
        if dist.get_rank() == 0 and (final / STATE).is_file():
            # The tensors of one step never change.
            write_state(final / STATE, state, _read(final).state[FILES_XXH3])
        elif dist.get_rank() == 0:
            temporary = directory / f".{final.name}.tmp"
            with new_directory(temporary):
                save_file(weights, temporary / WEIGHTS)
                save_file(moments, temporary / MOMENTS)
                save_file({name: tensor.contiguous() for name, tensor in frozen.items()}, temporary / FROZEN)
                write_state(temporary / STATE, state, {name: file_hash(temporary / name) for name in TENSORS})
                for path in (*temporary.iterdir(), temporary):
                    sync(path)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            sync(directory)
            for old in sorted(directory.glob("step-*"))[:-keep]:
                shutil.rmtree(old)
    return final


def forget(directory: Path) -> None:
    """Removes every checkpoint, for a run that starts over."""
    shutil.rmtree(directory, ignore_errors=True)
