"""Checkpoints in safetensors and JSON. Tensors are whole, so a run can resume with any ZeRO stage and world size."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from kvcore.errors import ConfigError
from kvcore.files import sync, write_json
from kvcore.types import Tensor
from student_trainer.loop.ds_engine import Engine

WEIGHTS, MOMENTS, FROZEN, STATE = "weights.safetensors", "moments.safetensors", "frozen.safetensors", "state.json"


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
        return load_file(self.path / FROZEN)

    def load_weights(self, module: nn.Module) -> None:
        """Loads the weights into a module before its engine is created: an engine copies its parameters."""
        _, unexpected = module.load_state_dict(load_file(self.path / WEIGHTS), strict=False)
        assert not unexpected, f"weights of another model: {unexpected}"

    def restore(self, engine: Engine) -> None:
        """Loads fp32 weights and optimiser state into an engine created after `load_weights`."""
        engine.restore(load_file(self.path / WEIGHTS), load_file(self.path / MOMENTS), self.step)


def latest(directory: Path) -> Checkpoint | None:
    """The newest complete checkpoint under a run's `checkpoints/`, or None."""
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


def _read(path: Path) -> Checkpoint:
    return Checkpoint(path, json.loads((path / STATE).read_text(encoding="utf-8")))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def check_same_run(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Refuses to resume a run with other settings, teachers or data.

    Raises:
        ConfigError: names the settings that differ.
    """
    saved = checkpoint.state["identity"]
    differing = sorted(name for name in saved.keys() | identity.keys() if saved.get(name) != identity.get(name))
    if differing:
        shown = "; ".join(f"{name}: {saved.get(name)!r} then, {identity.get(name)!r} now" for name in differing)
        raise ConfigError(
            f"{checkpoint.path} belongs to a run with other settings ({shown}); restore them, choose another "
            "run.output_dir, or start over with --set run.resume=never"
        )


def save(directory: Path, engine: Engine, frozen: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Writes a checkpoint, which gets its final name only when complete. All ranks must call it."""
    weights, moments = engine.weights(), engine.moments()
    final = directory / _name(state["step"])
    if dist.get_rank() == 0 and (final / STATE).is_file():
        write_json(final / STATE, state)  # The tensors of one step never change.
    elif dist.get_rank() == 0:
        temporary = directory / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(weights, temporary / WEIGHTS)
        save_file(moments, temporary / MOMENTS)
        save_file({name: tensor.contiguous() for name, tensor in frozen.items()}, temporary / FROZEN)
        write_json(temporary / STATE, state)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync(directory)
        for old in sorted(directory.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def forget(directory: Path) -> None:
    """Removes every checkpoint, for a run that starts over."""
    shutil.rmtree(directory, ignore_errors=True)
