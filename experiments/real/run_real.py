"""Runs the whole pipeline on a real model and real data: `make real`, or `python -m experiments.real.run_real`.

The teacher is SmolLM2-135M-Instruct, served as in production; the student is the same model with every third layer;
the data are short questions of GSM8K. Three arms train with equal steps and seeds: cross-entropy alone, K/V, and K/V of
other samples. A short run in latent mode, a recorded and a replayed run, an extraction, an evaluation and a report
follow. Runs that have finished with the same settings, models and data are kept, so an interrupted command
continues.

Examples:
  python -m experiments.real.run_real
  python -m experiments.real.run_real --seeds 0 1 2
  python -m experiments.real.run_real --quick --output outputs/real
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.local_copies import default_data_dir
from data.records import load_records
from experiments.demo.demo_config import Config
from experiments.demo.demo_processes import CPU_ONLY
from experiments.real.real_config import (
    ARMS,
    FULL,
    LATENT_ARMS,
    QUICK,
    TEACHER,
    RealPaths,
    arm_config,
    latent_config,
    replay_config,
)
from experiments.real.real_report import write_report
from experiments.real.real_results import RealResults, gather
from experiments.real.real_runs import RealRuns
from experiments.real.served_kv import compare_served
from kvcore.command_line import run_command
from student_trainer.config import BEST_MODEL
from student_trainer.launching.processes import ended_by_sigterm

_COMPARED_TEXTS = 4
# GSM8K's test split, as evaluation names it.
HELD_OUT = "gsm8k_test"


class RealRun(RealRuns):
    """One run of everything.

    Args:
        output: the folder of models, data, runs and logs.
        seeds: the seeds of the arms; the first one is that of all other runs.
        quick: few steps on few records.
        data_dir: directory of local copies of GSM8K; the hub if None.
    """

    def __init__(self, output: Path, seeds: Sequence[int], *, quick: bool, data_dir: Path | None) -> None:
        super().__init__(RealPaths(output, quick), QUICK if quick else FULL, seeds, data_dir)

    def run(self) -> RealResults:
        """Runs all stages before the report."""
        data = self.prepare()
        servers = self.servers()
        with servers as endpoints:
            endpoint = endpoints[TEACHER]
            with self.stage("served K/V"):
                served = self._compare_served(endpoint)
            for name, config in self._online_runs(int(endpoint.rpartition(":")[2])):
                if name == "record" and not self.is_finished(name, self.key(config)):
                    self._forget_recording()
                self.train(name, config, servers)
            with self.stage("extraction"):
                self._extract(endpoint)
            servers.check_alive()
        # Without a server: everything below works from the store and the saved models.
        self.train("offline", replay_config("offline", self.seeds[0], self.settings, self.paths, 0))
        with self.stage("evaluation"):
            self._evaluate()
        with self.stage("comparison"):
            runs = str(self.paths.runs.output / "runs")
            self._kvdistill("report", (runs,), {"output": self.paths.runs.output / "report"})
        self.seconds["total"] = self.elapsed()
        return gather(
            self.paths,
            self.seeds,
            served=served,
            data=data,
            settings=asdict(self.settings),
            server_mb=servers.peak_memory_mb[TEACHER],
            seconds=self.seconds,
        )

    def _compare_served(self, endpoint: str) -> list[dict[str, Any]]:
        texts = [record.text for record in load_records(self.paths.runs.split("val"), _COMPARED_TEXTS)]
        found = compare_served(endpoint, self.paths.teacher, texts, ("raw", "int8"), dtype=torch.float32, device="cpu")
        for one in found:
            self.say(f"K/V as {one.codec} against transformers: relative difference up to {one.worst_relative:.1e}")
        return [asdict(one) for one in found]

    def _online_runs(self, port: int) -> Iterator[tuple[str, Config]]:
        first, settings, paths = self.seeds[0], self.settings, self.paths
        for seed in self.seeds:
            for arm in ARMS:
                yield f"{arm}-seed{seed}", arm_config(arm, seed, settings, paths, port)
        for arm in LATENT_ARMS:
            yield arm, latent_config(arm, first, settings, paths, port)
        yield "record", replay_config("record", first, settings, paths, port)

    def _forget_recording(self) -> None:
        """Removes the store and its replay: a replay must read what the new recording writes."""
        shutil.rmtree(self.paths.runs.run("store"), ignore_errors=True)
        shutil.rmtree(self.paths.runs.run("offline"), ignore_errors=True)

    def _extract(self, endpoint: str) -> None:
        flags = {
            "teacher_models": self.paths.teacher,
            "teacher_endpoints": f"{self.paths.teacher.name}={endpoint}",
            "student_model": self.paths.student,
            "dataset_path": self.paths.runs.split("val"),
            "limit": self.settings.extracted,
            "output_dir": self.paths.runs.output / "extracted",
        }
        self._kvdistill("extract", (), flags)

    def _evaluate(self) -> None:
        best = self.paths.runs.run(f"kv-seed{self.seeds[0]}") / BEST_MODEL
        flags: dict[str, object] = {
            "model_path": best,
            "eval_datasets": HELD_OUT,
            "limit": self.settings.questions,
            "max_new_tokens": self.settings.answer_tokens,
            "output_file": self.paths.runs.output / "eval.json",
        }
        if self.data_dir is not None:
            flags["data_dir"] = self.data_dir
        self._kvdistill("eval", (), flags)

    def _kvdistill(self, command: str, arguments: Sequence[str], flags: Mapping[str, object]) -> None:
        given = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        self.run_module(command, ["kvdistill", command, *arguments, *given])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/real"), help="folder of everything it writes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the arms; 0 by default")
    parser.add_argument("--quick", action="store_true", help="few steps on few records")
    given = parser.parse_args(arguments)

    def command() -> int:
        os.environ.update(CPU_ONLY)
        run = RealRun(given.output, given.seeds, quick=given.quick, data_dir=default_data_dir())
        with ended_by_sigterm():
            results = run.run()
        write_report(results, run.paths.runs.output)
        return 0 if results.works else 1

    return run_command("make real", command, "interrupted; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
