"""The models, data, teacher server and training runs of an experiment on a real model."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.records import content_digest
from experiments.demo.demo_config import PROGRESS, Config
from experiments.demo.demo_processes import CPU_ONLY, DemoError, run_logged
from experiments.demo.timed_stages import TimedStages
from experiments.real.prepare_data import prepare
from experiments.real.real_config import TEACHER, RealPaths, Settings
from experiments.real.real_models import make_models
from experiments.real.real_results import run_result
from kvcore.files import write_json
from student_trainer.launching.local_teachers import LocalTeachers


class RealRuns(TimedStages):
    """Trains runs in processes of their own and keeps those that are finished.

    Args:
        paths: the folders of models, data, runs and logs.
        settings: sizes of the runs.
        seeds: the seeds of the arms.
        data_dir: directory of local copies of GSM8K; the hub if None.
    """

    def __init__(self, paths: RealPaths, settings: Settings, seeds: Sequence[int], data_dir: Path | None) -> None:
        super().__init__()
        self.paths, self.settings = paths, settings
        self.seeds, self.data_dir = tuple(seeds), data_dir

    def prepare(self) -> dict[str, Any]:
        """Makes the models, unless they are there, and the records. Returns the facts of `Prepared`."""
        with self.stage("models"):
            make_models(self.paths.teacher, self.paths.student)
        with self.stage("data"):
            return self._prepare_data()

    def servers(self) -> LocalTeachers:
        """The teacher's server on this machine; a context manager that gives its endpoint."""
        return LocalTeachers(
            {TEACHER: str(self.paths.teacher)},
            self.paths.runs.logs,
            device="cpu",
            dtype="fp32",
            options={"threads": 1},
            environment=CPU_ONLY,
        )

    def train(self, name: str, config: Config, servers: LocalTeachers | None = None) -> None:
        """Trains one run in a process of its own, unless it is finished.

        Raises:
            DemoError: the run failed.
            TeacherUnavailableError: it failed because a server has ended.
        """
        key = self.key(config)
        if self.is_finished(name, key):
            self.say(f"{name}: finished earlier")
            return
        job = self.paths.runs.output / "jobs" / f"{name}.json"
        job.parent.mkdir(parents=True, exist_ok=True)
        write_json(job, {"name": name, "config": config, "key": key})
        try:
            with self.stage(name):
                self.run_module(f"train_{name}", ["experiments.real.real_arm", str(job)])
        except DemoError:
            if servers is not None:
                servers.check_alive()
            raise

    def is_finished(self, name: str, key: str) -> bool:
        """Whether a run with this key has ended."""
        return (run_result(self.paths.runs.run(name)) or {}).get("key") == key

    def key(self, config: Config) -> str:
        """A digest of what determines a run: its configuration without ports, its models and its data."""
        teachers = [{"name": one["name"]} for one in config.get("teachers", [])]
        files = [Path(config["student"]["path"]) / "model.safetensors", self.paths.teacher / "model.safetensors"]
        files += [self.paths.runs.split(split) for split in ("train", "val")]
        content = [{**config, "teachers": teachers}, [content_digest(file) for file in files]]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()

    def run_module(self, name: str, arguments: Sequence[str]) -> None:
        """Runs `python -m` with these arguments; the output goes to the log of this name, progress lines are shown."""

        def show(line: str) -> None:
            if line.startswith(PROGRESS):
                self.say(line.removeprefix(PROGRESS))

        run_logged([sys.executable, "-m", *arguments], self.paths.runs.logs / f"{name}.log", show)

    def _prepare_data(self) -> dict[str, Any]:
        settings, runs = self.settings, self.paths.runs
        prepared = prepare(
            runs.split("train"),
            runs.split("val"),
            (settings.train, settings.val),
            data_dir=self.data_dir,
            tokenizer=self.paths.student,
            max_tokens=settings.max_tokens,
            seed=0,
        )
        self.say(f"{prepared.short_share:.0%} of GSM8K's questions have at most {settings.max_tokens} tokens")
        return asdict(prepared)
