"""A whole job on a SLURM allocation, or on this machine: teacher servers, then ranks, all ended at the end.

`python -m experiments.recipe.job [--local]` takes its settings from environment variables, as the two shell scripts
set them (scripts/run_three_stage_routing.sh, scripts/run_large_scale_multi_teacher.sh). Free of torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import yaml

from experiments.recipe.config import FLAGS, RecipeSettings
from experiments.recipe.environment import JobSettings, job_settings, recipe_flags
from experiments.recipe.run_recipe import serve_flags
from kvcore.command_line import run_command
from kvcore.errors import KVDistillError, TeacherUnavailableError
from student_trainer.launching.endpoints import write_endpoints
from student_trainer.launching.hosts import Hosts, LocalHost, SlurmHosts, end_all
from student_trainer.launching.local_teachers import as_arguments, find_event, teacher_names
from student_trainer.launching.placement import Placement, ServerPlacement, lay_out
from student_trainer.launching.processes import tail

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
READY_SECONDS = 1800.0
REPORT_SECONDS = 15.0
POLL_SECONDS = 0.2

Processes = Sequence[subprocess.Popen[str]]


class JobError(KVDistillError):
    """A process of the job failed."""


class StoppedError(KVDistillError):
    """The job was told to end."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"told to end by {number.name}")
        self.number = number


class Job:
    """One job from start to end.

    Args:
        place: where processes run.
        settings: of the recipe.
        how: servers and ranks.
        log_dir: servers' logs, the endpoints file and the ranks' settings.
    """

    def __init__(self, place: Hosts, settings: RecipeSettings, how: JobSettings, log_dir: Path) -> None:
        self._place, self._settings, self._how, self._log_dir = place, settings, how, log_dir
        self._servers: dict[tuple[str, int], tuple[subprocess.Popen[str], ServerPlacement, Path]] = {}
        self._told: signal.Signals | None = None

    def run(self) -> None:
        """Everything, in order.

        Raises:
            KVDistillError: a process failed.
            StoppedError: the job was told to end, and its ranks did so.
        """
        settings = self._settings
        named = {} if settings.kv_mode == "offline" else teacher_names(settings.teachers)
        layout = lay_out(
            self._place.nodes,
            self._place.gpus,
            list(named),
            replicas=self._how.replicas,
            ranks_per_node=self._how.ranks_per_node,
        )
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._say(layout)
        with self._listening():
            try:
                self._serve_and_train(layout, named)
            except StoppedError as stopped:
                # SLURM sends it when the time is nearly over; whoever sends SIGTERM runs the job again if they want to.
                if stopped.number == signal.SIGUSR1:
                    # Last of all, since it ends whatever the job still runs.
                    self._place.requeue()
                raise

    def _serve_and_train(self, layout: Placement, named: Mapping[str, str]) -> None:
        try:
            self._prepare()
            for name, model in named.items():
                for number, seat in enumerate(layout.teachers[name]):
                    self._serve(name, model, number, seat)
            self._train(layout, self._endpoints(list(named)))
        finally:
            self._place.stop_servers([process for process, _, _ in self._servers.values()])

    def _say(self, layout: Placement) -> None:
        nodes = ", ".join(node.name for node in layout.trainers)
        logger.info("job %s: %d ranks on each of %s", self._place.name, layout.ranks_per_node, nodes)
        for name, seats in layout.teachers.items():
            logger.info("  teacher %s on %s", name, ", ".join(f"{seat.node.name} ({seat.device})" for seat in seats))
        logger.info("  logs in %s", self._log_dir)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Notes signals instead of dying of them: what was started has to be ended."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._told = self._told or signal.Signals(number)

    def _prepare(self) -> None:
        """Makes the data before any rank waits for it."""
        command = self._command(prepare_only=True)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, text=True)
        self._finish([process], "making the data ready", end_all)

    def _serve(self, name: str, model: str, number: int, seat: ServerPlacement) -> None:
        flags = {
            "model": model,
            "name": name,
            "device": seat.device,
            "grpc_host": self._place.bind,
            "grpc_port": 0,
            "http_port": 0,
            **serve_flags(self._settings),
        }
        log = self._log_dir / f"serve_{name}{f'.{number}' if number else ''}.log"
        command = [sys.executable, "-m", "kvdistill", "serve", *as_arguments(flags)]
        self._servers[name, number] = self._place.start_server(command, seat.node, log), seat, log

    def _endpoints(self, names: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """Waits until every server is ready; where each one listens."""
        started = reported = time.monotonic()
        found: dict[tuple[str, int], str] = {}
        while waiting := [key for key in self._servers if key not in found]:
            for key in waiting:
                process, seat, log = self._servers[key]
                if event := find_event(log, "ready"):
                    found[key] = f"{seat.node.address}:{event['grpc_port']}"
                elif process.poll() is not None:
                    raise self._lost(key, f"ended with code {process.returncode}")
            self._stop_if_told()
            now = time.monotonic()
            if now - started > READY_SECONDS:
                raise self._lost(waiting[0], f"was not ready after {READY_SECONDS:.0f} s")
            if now - reported > REPORT_SECONDS:
                reported = now
                logger.info("waiting for %s to load (%.0f s)", ", ".join(name for name, _ in waiting), now - started)
            time.sleep(POLL_SECONDS)
        return {name: [found[key] for key in sorted(found) if key[0] == name] for name in names}

    def _lost(self, key: tuple[str, int], problem: str) -> TeacherUnavailableError:
        name, _ = key
        _, seat, log = self._servers[key]
        return TeacherUnavailableError(
            name, f"its server on {seat.node.name} {problem}; the end of {log}:\n{tail(log)}"
        )

    def _train(self, layout: Placement, endpoints: Mapping[str, Sequence[str]]) -> None:
        path = self._log_dir / "endpoints.txt"
        if endpoints:
            write_endpoints(path, endpoints)
            logger.info("teachers: %s", ", ".join(f"{name}={','.join(found)}" for name, found in endpoints.items()))
        command = self._command(teacher_endpoints=(f"@{path}",) if endpoints else ())
        self._finish(self._place.start_ranks(command, layout), "training", self._save_and_end)

    def _save_and_end(self, ranks: Processes) -> None:
        assert self._told is not None
        logger.info("%s: asking for a checkpoint and an end", self._told.name)
        self._place.stop_ranks(ranks, self._told)

    def _command(self, **changes: object) -> list[str]:
        """The recipe with this job's settings, which are left on disk for whoever wants to know them."""
        # Weights are quantised where they are served.
        changed = self._settings.model_copy(update={"load_in_8bit": False, "load_in_4bit": False, **changes})
        path = self._log_dir / ("prepare.yaml" if changed.prepare_only else "train.yaml")
        tree = changed.model_dump(mode="json", exclude_defaults=True)
        path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return [sys.executable, "-m", "experiments.train_multi_teacher_kv", "--config", str(path)]

    def _finish(
        self,
        processes: Processes,
        what: str,
        stop: Callable[[Processes], None],
    ) -> None:
        """Waits for all of them; the first that fails ends the others. `stop` is called if the job is told to end.

        Raises:
            JobError: one failed.
            StoppedError: they ended because they were told to.
        """
        forwarding_command = False
        lost: set[tuple[str, int]] = set()
        try:
            while True:
                codes = [process.poll() for process in processes]
                failed = [code for code in codes if code]
                if failed and self._told:
                    raise StoppedError(self._told)
                if failed:
                    raise JobError(f"{what} failed with code {failed[0]}; its message is above")
                if all(code == 0 for code in codes):
                    return
                if self._told and not forwarding_command:
                    forwarding_command = True
                    stop(processes)
                self._report_lost(lost)
                time.sleep(POLL_SECONDS)
        finally:
            end_all(processes)

    def _report_lost(self, lost: set[tuple[str, int]]) -> None:
        """Says once that a server is gone. Whether the training can go on without it, the training knows."""
        for key, (process, _, _) in self._servers.items():
            if key not in lost and process.poll() is not None and not self._told:
                lost.add(key)
                logger.warning("%s", self._lost(key, f"ended with code {process.returncode}"))

    def _stop_if_told(self) -> None:
        if self._told:
            raise StoppedError(self._told)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status tells SLURM how the job ended."""
    parser = argparse.ArgumentParser(prog="job", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--local", action="store_true", help="run on this machine, without SLURM")
    local = parser.parse_args(arguments).local
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)

    def command() -> int:
        settings = FLAGS.read(recipe_flags(os.environ), "job")
        how = job_settings(os.environ, local=local)
        place = LocalHost(how.gpus) if local else SlurmHosts(how.gpus)
        try:
            Job(place, settings, how, how.log_dir / place.name).run()
        except StoppedError as stopped:
            logger.info("%s", stopped)
            return 128 + stopped.number
        logger.info("done: %s", settings.output_dir)
        return 0

    return run_command("job", command)


if __name__ == "__main__":
    sys.exit(main())
