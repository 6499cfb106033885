"""Several runs in one command. Each starts from the best model of the previous one; interrupted stages resume."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.records import content_digest
from kvcore.errors import ConfigError
from kvcore.files import write_json
from student_trainer.config import TrainConfig
from student_trainer.loop import ds_engine

logger = logging.getLogger(__name__)

DONE = "stage_done.json"


def run_stages(config: TrainConfig, run: Callable[[TrainConfig], dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs every unfinished stage in order. An interrupted stage resumes from its own checkpoint.

    Args:
        config: with `stages`.
        run: trains one configuration on this rank.

    Returns:
        each stage's summary.

    Raises:
        ConfigError: a finished stage had other settings or data than in `config`.
    """
    rank, _ = ds_engine.start(config.run.seed)
    summaries: list[dict[str, Any]] = []
    for index, stage in enumerate(config.stages):
        settings = config.stage(index)
        directory = settings.run.output_dir
        digest = _digest(settings)
        done = config.run.resume == "auto" and _is_done(directory, digest)
        # No rank may write before all have looked.
        dist.barrier()
        if rank == 0 and not done:
            # The results of an earlier run of this stage are no longer valid.
            for later in config.stages[index:]:
                (config.run.output_dir / later.name / DONE).unlink(missing_ok=True)
        if rank == 0:
            name = f"stage {index + 1} of {len(config.stages)}, {stage.name}"
            logger.info("%s: %s", name, "done before" if done else f"from {settings.student.path}")
        if done:
            summaries.append(json.loads((directory / "summary.json").read_text(encoding="utf-8")))
            continue
        summaries.append(run(settings))
        if rank == 0:
            write_json(directory / DONE, {"settings": digest})
        dist.barrier()
    return summaries


def _is_done(directory: Path, digest: str) -> bool:
    marker = directory / DONE
    if not marker.is_file():
        return False
    if json.loads(marker.read_text(encoding="utf-8"))["settings"] != digest:
        raise ConfigError(
            f"{directory} holds a finished stage of other settings or data; restore them, choose another "
            "run.output_dir, or start over with --set run.resume=never"
        )
    return True


def _digest(settings: TrainConfig) -> str:
    """Digest of the settings and data that affect the result. `kv.mode` does not, if the teachers are the same."""
    tree = settings.model_dump(mode="json", include={"student", "align", "fuse", "loss", "data", "optim"})
    run = {"seed", "steps", "epochs", "curriculum_epochs", "global_batch"}
    tree["run"] = settings.run.model_dump(mode="json", include=run)
    tree["kv"] = settings.kv.model_dump(mode="json", include={"selection", "codec", "on_missing", "control"})
    # The path alone does not identify the data: the file may have changed.
    tree["content"] = [content_digest(path) for path in (settings.data.train, settings.data.val) if path]
    tree["teachers"] = [[teacher.name, teacher.weight] for teacher in settings.teachers]
    tree["self_teacher"] = settings.self_teacher
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=16).hexdigest()
