"""Submits a sweep as a SLURM array with one task per run, followed by a job that writes the table."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from kvcore.errors import ConfigError, KVDistillError
from kvdistill.sweep.sweep_config import SweepConfig
from kvdistill.sweep.sweep_runs import SweepRun

# The signal leaves time for a checkpoint. Options in the sweep's file override these.
_DEFAULTS: dict[str, str | int] = {"signal": "B:TERM@120", "requeue": "", "open-mode": "append"}


class SubmissionError(KVDistillError):
    """sbatch refused a job."""


def submit(runs: Sequence[SweepRun], left: Sequence[SweepRun]) -> list[str]:
    """Submits the remaining runs as one array, and the job that writes the table after it.

    Tasks read a copy of the sweep's file, since a change of the file while they are queued would change their numbers.

    Returns:
        The ids of both jobs.

    Raises:
        ConfigError: sbatch is not on the PATH.
        SubmissionError: sbatch refused a job; with its message.
    """
    sweep = runs[0].sweep
    logs = sweep.output_dir.resolve() / "logs"
    # If the folder of its log does not exist, SLURM ends a job before it starts, without a message.
    logs.mkdir(parents=True, exist_ok=True)
    parallel = f"%{sweep.max_parallel}" if sweep.max_parallel else ""
    array = ",".join(str(run.number) for run in left) + parallel
    command = ["sweep", str(_copy(sweep))]
    name = sweep.output_dir.name
    options = _DEFAULTS | {"job-name": name, "output": f"{logs}/%A_%a.log"} | sweep.slurm | {"array": array}
    job = _sbatch(_script(options, command, ' --task "$SLURM_ARRAY_TASK_ID"'), sweep.output_dir / "array.sbatch")
    after = {"job-name": f"{name}_table", "output": f"{logs}/table_%j.log", "dependency": f"afterany:{job}"}
    shared = {option: sweep.slurm[option] for option in ("partition", "account", "qos") if option in sweep.slurm}
    table = _sbatch(_script(after | shared, command, " --table"), sweep.output_dir / "table.sbatch")
    return [job, table]


def _copy(sweep: SweepConfig) -> Path:
    text = yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False)
    digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    path = sweep.output_dir.resolve() / f"submitted_{digest}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _script(options: dict[str, str | int], command: Sequence[str], last: str) -> str:
    lines = (f"#SBATCH --{name}{f'={value}' if value != '' else ''}" for name, value in options.items())
    # exec: SLURM sends the signal to the sweep itself, which forwards it.
    run = shlex.join([sys.executable, "-m", "kvdistill", *command])
    return "\n".join(
        ("#!/usr/bin/env bash", *lines, "set -euo pipefail", 'cd "$SLURM_SUBMIT_DIR"', f"exec {run}{last}", "")
    )


def _sbatch(script: str, path: Path) -> str:
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ConfigError("--slurm: there is no sbatch on the PATH; run on a SLURM cluster, or omit --slurm")
    path.write_text(script, encoding="utf-8")
    done = subprocess.run([sbatch, "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SubmissionError(f"sbatch refused {path}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
