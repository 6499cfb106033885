"""`kvdistill sweep`: runs a matrix of trainings, here or as a SLURM array, and writes one table."""

from __future__ import annotations

import fcntl
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from kvcore.config import load_config
from kvcore.errors import ConfigError, FieldError, KVDistillError
from kvcore.files import write_json
from kvcore.monitoring.progress import Meter
from kvdistill.report.finished_runs import find_runs
from kvdistill.sweep.sweep_config import SweepConfig
from kvdistill.sweep.sweep_runs import STATE, SweepRun, plan, search_path
from kvdistill.sweep.sweep_slurm import submit
from kvdistill.sweep.sweep_table import write_table
from student_trainer.config import BEST_MODEL
from student_trainer.launching.processes import ended_by_sigterm, killed_with_parent, start_logged, tail


class SweepError(KVDistillError):
    """A run of the sweep failed."""


def main(
    file: Path,
    overrides: Sequence[str],
    *,
    slurm: bool = False,
    list_only: bool = False,
    table_only: bool = False,
    task: int | None = None,
) -> None:
    """Runs, lists or submits a sweep, or writes its table.

    A failed run does not stop the others. The same command continues with the runs that are not done.

    Args:
        file: the sweep's file; see `SweepConfig`.
        overrides: `key.path=value` for fields of the file.
        slurm: submit the remaining runs as an array.
        list_only: only list the runs.
        table_only: only write the table.
        task: run only the run of this number, without the table. Tasks of an array use it.

    Raises:
        ConfigError: the file or the settings of a run are wrong.
        SweepError: runs failed; with their names.
    """
    if sum((slurm, list_only, table_only, task is not None)) > 1:
        raise ConfigError("--slurm, --list, --table and --task exclude each other; give only one")
    runs = plan(load_config(file, overrides, SweepConfig))
    left = [run for run in runs if not run.is_done]
    if task is not None:
        _run_task(runs, task)
    elif list_only:
        _print("\n".join(_list_line(run) for run in runs))
    elif table_only or (slurm and not left):
        _write_table(runs)
    elif slurm:
        job, table = submit(runs, left)
        _print(
            f"submitted {len(left)} of {len(runs)} runs as job {job}, and the table as job {table}, which runs after it"
        )
    else:
        failed = _run_all(left)
        _write_table(runs)
        if failed:
            raise SweepError(
                f"{len(failed)} of {len(runs)} runs failed, see above or the logs in their folders: "
                f"{', '.join(failed)}; run the same command to retry them"
            )


def _run_task(runs: Sequence[SweepRun], number: int) -> None:
    if number >= len(runs):
        raise FieldError("--task", f"the sweep has runs 0 to {len(runs) - 1}, got {number}")
    run = runs[number]
    with ended_by_sigterm():
        _print(f"{run.name}: done before" if run.is_done else f"{run.name}: {shlex.join(run.command)}")
        execute(run)


def _list_line(run: SweepRun) -> str:
    state = "done" if run.is_done else "trained" if run.is_trained else "left"
    return f"{run.number}  {run.name}  {state}  {shlex.join(run.command)}"


def _write_table(runs: Sequence[SweepRun]) -> None:
    text, paths = write_table(runs)
    _print("\n".join((text, *map(str, paths))))
    left = [run.name for run in runs if not run.is_done]
    if left:
        _print(f"{len(left)} of {len(runs)} runs are not done and not in the table: {', '.join(left)}")


def _run_all(left: Sequence[SweepRun]) -> list[str]:
    """Runs all in order; reports failures as they happen and returns the names of the failed runs."""
    failed: list[str] = []
    with ended_by_sigterm(), Meter({"runs": len(left)}, Console(), every=0, log=_print) as meter:
        for run in left:
            try:
                execute(run)
            except SweepError as error:
                failed.append(run.name)
                _print(f"FAILED  {error}")
            else:
                _print(f"done  {run.name}")
            meter.advance("runs")
    return failed


def execute(run: SweepRun) -> None:
    """Trains and evaluates one run, as far as it is not done; each step has a log in the run's folder.

    Raises:
        SweepError: a step failed, or the run is locked by another sweep.
    """
    with _locked(run):
        if not run.is_trained:
            _step(run, run.command, "train")
            _check_trained(run)
            write_json(run.directory / STATE, {"training": run.training})
        if not run.is_done:
            for number, command in enumerate(run.evaluations()):
                _step(run, command, f"evaluate{number}")
            write_json(run.directory / STATE, {"training": run.training, "evaluation": run.evaluation})


def _check_trained(run: SweepRun) -> None:
    """Raises a SweepError if the command succeeded without training."""
    try:
        found = find_runs([run.directory])
    except ConfigError as error:
        raise SweepError(f"{run.name}: `train` succeeded but wrote no training run: {error}") from error
    without = [str(one.path) for one in found if not (one.path / BEST_MODEL).is_dir()]
    if run.sweep.evaluation is not None and without:
        raise SweepError(f"{run.name}: `train` wrote no {BEST_MODEL} to evaluate in {', '.join(without)}")


@contextmanager
def _locked(run: SweepRun) -> Iterator[None]:
    run.directory.mkdir(parents=True, exist_ok=True)
    with (run.directory / ".sweep_lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SweepError(f"{run.name}: locked by another sweep; wait until it ends") from error
        yield


def _step(run: SweepRun, command: Sequence[str], name: str) -> None:
    log = run.directory / "logs" / f"{name}.log"
    process = start_logged(killed_with_parent(command), log, {"PATH": search_path()})
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            # No time limit: the training may be saving a checkpoint.
            process.terminate()
            process.wait()
    if code != 0:
        raise SweepError(f"{run.name}: `{name}` ended with code {code}; the end of {log}:\n{tail(log)}")


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
