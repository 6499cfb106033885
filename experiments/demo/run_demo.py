"""`kvdistill demo`: two tiny teachers, their servers, a student with control runs, and a report."""

from __future__ import annotations

import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data.records import Record, load_records, write_records
from data.synthetic import make_splits
from experiments.demo import results
from experiments.demo.demo_config import (
    ARMS,
    FULL,
    PROGRESS,
    QUICK,
    TEACHERS,
    DemoPaths,
    ModelName,
    Settings,
    arm_config,
    epoch_config,
)
from experiments.demo.demo_processes import CPU_ONLY, DemoError, run_logged
from experiments.demo.demo_report import write_report
from experiments.demo.pretrain import Pretrained, pretrain
from experiments.demo.questions import Inference, ask, measure_inference
from experiments.demo.timed_stages import TimedStages
from kvcore.early_checks import check_output
from kvcore.errors import FieldError
from kvcore.files import write_json
from student_trainer.launching.local_teachers import LocalTeachers
from student_trainer.launching.processes import ended_by_sigterm

_MARKER = ".kvdistill-demo"


def main(output: Path, *, quick: bool = False, seeds: int = 1) -> None:
    """Runs the whole pipeline at toy scale and writes report.json, report.png and report.html into `output`.

    Accuracies that are not as expected are no error; the report names them.

    Raises:
        DemoError: a process failed, or the run from the store does not repeat the recorded one.
    """
    check_output(output, "--output")
    demo = Demo(output, QUICK if quick else FULL, seeds)
    with ended_by_sigterm():
        demo_results = demo.run()
    paths = write_report(demo_results, output)
    if not demo_results.replay.matches:
        raise DemoError("the run from the store does not repeat the recorded one; see the report")
    for path in paths:
        print(path)
    ask(demo_results.inference)


class Demo(TimedStages):
    """One run of the demo.

    Args:
        output: the folder for data, models, runs and logs.
        settings: sizes, steps and learning rates.
        seeds: number of runs per arm.
    """

    def __init__(self, output: Path, settings: Settings, seeds: int) -> None:
        super().__init__()
        self.paths = DemoPaths(output)
        self.settings = settings
        self.seeds = seeds
        self.task = settings.task

    def run(self) -> results.Results:
        """Runs all stages before the report."""
        models, servers_mb = self.train_arms()
        with self.stage("questions"):
            inference = self._inference()
        self.seconds["total"] = self.elapsed()
        return self._results(models, servers_mb, inference)

    def teachers(self, models: dict[ModelName, Pretrained]) -> dict[str, Path]:
        """The models to serve, by the teachers' names."""
        return {name: models[name].path for name in TEACHERS}

    def models(self) -> dict[ModelName, Pretrained]:
        """Writes the data, and trains the teachers and the first student unless they are cached."""
        with self.stage("data"):
            train = self._write_data()
        with self.stage("teachers and warm-up"):
            return pretrain(self.settings, self.paths, train, self.say)

    def train_arms(self) -> tuple[dict[ModelName, Pretrained], dict[str, float]]:
        """Runs every arm with its data, models and servers; returns the models and each server's peak memory in MiB."""
        self.prepare_runs()
        models = self.models()
        served = {name: str(path) for name, path in self.teachers(models).items()}
        servers = LocalTeachers(
            served, self.paths.logs, device="cpu", dtype="fp32", options={"threads": 1}, environment=CPU_ONLY
        )
        with ExitStack() as stack:
            with self.stage("teacher servers"):
                endpoints = stack.enter_context(servers)
            self._train(models["student"], endpoints, servers)
        return models, servers.peak_memory_mb

    def prepare_runs(self) -> None:
        """Empties the folder of runs."""
        _empty(self.paths.output / "runs")

    def unfinished(self, plan: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The runs that are still to do: all."""
        return plan

    def _write_data(self) -> list[Record]:
        settings = self.settings
        splits = make_splits(self.task, settings.train, settings.val, settings.test, settings.data_seed)
        for name, records in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
            write_records(self.paths.split(name), records)
        write_records(self.paths.split("record"), splits.train[: settings.record])
        return splits.train

    def _train(self, student: Pretrained, endpoints: dict[str, str], servers: LocalTeachers) -> None:
        """Runs the plan in one launch of the ranks."""
        ports = {name: int(endpoint.rpartition(":")[2]) for name, endpoint in endpoints.items()}
        plan_path = self.paths.output / "runs" / "plan.json"
        to_do = self.unfinished(self.plan(student.path, ports))
        if not to_do:
            return
        write_json(plan_path, to_do)
        ranks = ["--nproc_per_node", str(self.settings.ranks)]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", *ranks]
        began = time.monotonic()
        try:
            run_logged(
                [*launcher, "-m", "experiments.demo.arms", str(plan_path)], self.paths.logs / "arms.log", self._show
            )
        except DemoError:
            servers.check_alive()
            raise
        servers.check_alive()
        for run in to_do:
            self.seconds[run["name"]] = results.result(Path(run["config"]["run"]["output_dir"]))["seconds"]
        inside = sum(self.seconds[run["name"]] for run in to_do)
        self.seconds["launch of the ranks"] = time.monotonic() - began - inside

    def plan(self, student: Path, ports: dict[str, int]) -> list[dict[str, Any]]:
        """The runs of one launch, in order: all arms, then the recorded epoch and its replay."""
        test = str(self.paths.split("test"))
        arms = [
            {
                "name": f"{arm} seed {seed}",
                "config": arm_config(arm, seed, self.settings, self.paths, student, ports),
                "test": test,
            }
            for arm in ARMS
            for seed in range(self.seeds)
        ]
        epochs = [
            {"name": mode, "config": epoch_config(mode, self.settings, self.paths, student, ports), "test": None}
            for mode in ("record", "offline")
        ]
        return arms + epochs

    def _show(self, line: str) -> None:
        if line.startswith(PROGRESS):
            self.say(line.removeprefix(PROGRESS))
        elif "  validation: " in line:
            self.say(f"  {line}")

    def _inference(self) -> Inference:
        """How the student of the first arm answers test items."""
        test = load_records(self.paths.split("test"))
        return measure_inference(
            self.paths.run(f"{ARMS[0]}-seed0") / "best_model", test, self.settings.reasoning_tokens
        )

    def _results(
        self, models: dict[ModelName, Pretrained], servers_mb: dict[str, float], inference: Inference
    ) -> results.Results:
        kv_run = results.finished(self.paths.run(f"{ARMS[0]}-seed0"))
        summary = results.summary(kv_run)
        return results.Results(
            arms=results.gather_arms(self.seeds, self.paths),
            chance=self.task.chance,
            bytes_per_sample=float(summary["bytes_per_sample"]),
            raw_bf16_bytes_per_sample=float(summary["raw_bf16_bytes_per_sample"]),
            stall_fraction=float(summary["stall_fraction"]),
            samples_per_second=float(summary["samples_per_second"]),
            teacher_tokens_per_second=float(summary["teacher_tokens_per_second"]),
            peak_memory_mb={f"trainer_{rank}": mb for rank, mb in summary["peak_memory_mb"].items()} | servers_mb,
            replay=results.gather_replay(self.paths),
            seconds=dict(self.seconds),
            inference=inference,
            stages_ms=results.stages_ms(kv_run, len(TEACHERS)),
            facts=self._facts(models),
        )

    def _facts(self, models: dict[ModelName, Pretrained]) -> dict[str, str]:
        settings = self.settings
        example = self.task.record(12345)
        return {
            "Question": f"{example.prompt}  (reasoning{example.reasoning}, answer{example.answer})",
            "Training records": f"{settings.train}, none of them among the {settings.test} test items",
            "Steps of an arm": f"{settings.arm_steps} at 64 samples, {settings.ranks} DeepSpeed ranks, ZeRO-2",
            "Accuracy with written reasoning": ", ".join(
                f"{name} {model.accuracy:.1%}" for name, model in models.items()
            ),
            "Recorded epoch": f"{settings.record} records",
        }


def _empty(runs: Path) -> None:
    """Empties the folder of runs. Refuses to if the demo did not make it."""
    if runs.exists() and not (runs / _MARKER).is_file():
        raise FieldError("--output", f"{runs} exists but was not made by the demo; choose another directory")
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True)
    (runs / _MARKER).touch()
