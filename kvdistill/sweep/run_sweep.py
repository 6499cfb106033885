"""`kvdistill sweep`: runs what is left of a matrix of trainings, here or as a SLURM array, and ends in one table."""

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
    """Runs, lists, submits or sums up a sweep.

    A run that fails does not stop the others; the same command takes up what is left.

    Args:
        file: the sweep; see `SweepConfig`.
        overrides: `key.path=value` over it.
        slurm: submit what is left as an array.
        list_only: only say what there is.
        table_only: only write the table.
        task: run this one alone, without the table, as an array's task does.

    Raises:
        ConfigError: the file, or the settings of any run, are wrong.
        SweepError: runs failed; names them and their logs.
    """
    if sum((slurm, list_only, table_only, task is not None)) > 1:
        raise ConfigError("--slurm, --list, --table and --task exclude one another; give one of them")
    runs = plan(load_config(file, overrides, SweepConfig))
    left = [run for run in runs if not run.is_done]
    if task is not None:
        _one(runs, task)
    elif list_only:
        _say("\n".join(_line(run) for run in runs))
    elif table_only or (slurm and not left):
        _sum_up(runs)
    elif slurm:
        job, table = submit(runs, left)
        _say(f"submitted {len(left)} of {len(runs)} runs as job {job}, and the table after them as job {table}")
    else:
        failed = _all(left)
        _sum_up(runs)
        if failed:
            raise SweepError(
                f"{len(failed)} of {len(runs)} runs failed, see above or the logs in their folders: "
                f"{', '.join(failed)}; the same command tries them again"
            )


def _one(runs: Sequence[SweepRun], number: int) -> None:
    if number >= len(runs):
        raise FieldError("--task", f"the sweep has runs 0 to {len(runs) - 1}, got {number}")
    run = runs[number]
    with ended_by_sigterm():
        _say(f"{run.name}: done before" if run.is_done else f"{run.name}: {shlex.join(run.command)}")
        execute(run)


def _line(run: SweepRun) -> str:
    state = "done" if run.is_done else "trained" if run.is_trained else "left"
    return f"{run.number}  {run.name}  {state}  {shlex.join(run.command)}"


def _sum_up(runs: Sequence[SweepRun]) -> None:
    text, paths = write_table(runs)
    _say("\n".join((text, *map(str, paths))))
    left = [run.name for run in runs if not run.is_done]
    if left:
        _say(f"{len(left)} of {len(runs)} runs are not done and not in the table: {', '.join(left)}")


def _all(left: Sequence[SweepRun]) -> list[str]:
    """Runs one after the other; gives the names of those that failed, and says why at once."""
    failed: list[str] = []
    with ended_by_sigterm(), Meter({"runs": len(left)}, Console(), every=0, log=_say) as meter:
        for run in left:
            try:
                execute(run)
            except SweepError as error:
                failed.append(run.name)
                _say(f"FAILED  {error}")
            else:
                _say(f"done  {run.name}")
            meter.advance("runs")
    return failed


def execute(run: SweepRun) -> None:
    """Trains, then evaluates, what is not done yet; each step's output goes to a log in the run's folder.

    Raises:
        SweepError: a step failed, or somebody else is at this run.
    """
    with _alone(run):
        if not run.is_trained:
            _step(run, run.command, "train")
            _check_trained(run)
            write_json(run.directory / STATE, {"training": run.training})
        if not run.is_done:
            for number, command in enumerate(run.evaluations()):
                _step(run, command, f"evaluate{number}")
            write_json(run.directory / STATE, {"training": run.training, "evaluation": run.evaluation})


def _check_trained(run: SweepRun) -> None:
    """A command that ends well without having trained must not count as done."""
    try:
        found = find_runs([run.directory])
    except ConfigError as error:
        raise SweepError(f"{run.name}: `train` ended well and left no training behind: {error}") from error
    without = [str(one.path) for one in found if not (one.path / BEST_MODEL).is_dir()]
    if run.sweep.evaluation is not None and without:
        raise SweepError(f"{run.name}: `train` left no {BEST_MODEL} to evaluate in {', '.join(without)}")


@contextmanager
def _alone(run: SweepRun) -> Iterator[None]:
    run.directory.mkdir(parents=True, exist_ok=True)
    with (run.directory / ".sweep_lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SweepError(f"{run.name}: another sweep is at it; wait for that one's end") from error
        yield


def _step(run: SweepRun, command: Sequence[str], name: str) -> None:
    log = run.directory / "logs" / f"{name}.log"
    process = start_logged(killed_with_parent(command), log, {"PATH": search_path()})
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            # However long a checkpoint takes.
            process.terminate()
            process.wait()
    if code != 0:
        raise SweepError(f"{run.name}: `{name}` ended with code {code}; the end of {log}:\n{tail(log)}")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
