"""Trains the teachers and the first student from scratch with `kvdistill train`, and caches them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import yaml

from data.records import Record
from experiments.demo.demo_config import DemoPaths, ModelName, Settings, pretrain_config
from experiments.demo.demo_processes import CPU_ONLY, check
from student_trainer.launching.processes import end, start_logged

MODELS: tuple[ModelName, ...] = ("teacher_a", "teacher_b", "student")
_REPORT_SECONDS = 15.0
_PACKAGES = ("torch", "transformers", "tokenizers", "deepspeed", "numpy")
# A change of these files may change the weights.
_SOURCES = (
    "data/*.py",
    "student_trainer/config.py",
    "student_trainer/loop/*.py",
    "student_trainer/model/*.py",
    "experiments/demo/make_models.py",
    "experiments/demo/tokenizers.py",
)


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A trained model: its directory, and its accuracy on validation items when it writes the reasoning as text."""

    path: Path
    accuracy: float


@dataclass(slots=True)
class _Job:
    name: ModelName
    command: list[str]
    log: Path
    work: Path
    process: subprocess.Popen[str]


def pretrain(
    settings: Settings, paths: DemoPaths, records: Sequence[Record], say: Callable[[str], None]
) -> dict[ModelName, Pretrained]:
    """Returns the models, from the cache if they are there. The missing ones are trained at the same time.

    Raises:
        DemoError: a training failed; with the end of its log.
    """
    homes: dict[ModelName, Path] = {name: paths.cache / f"{name}-{_key(name, settings, paths)}" for name in MODELS}
    missing: list[ModelName] = [name for name in MODELS if not homes[name].is_dir()]
    for name in MODELS:
        if name not in missing:
            say(f"{name}: from the cache")
    if missing:
        _train(missing, homes, settings, paths, records, say)
    return {name: Pretrained(homes[name] / "model", _accuracy(homes[name])) for name in MODELS}


def _train(
    names: Sequence[ModelName],
    homes: dict[ModelName, Path],
    settings: Settings,
    paths: DemoPaths,
    records: Sequence[Record],
    say: Callable[[str], None],
) -> None:
    _make_starts(names, homes, records)
    with ExitStack() as stack:
        running = [_start(name, homes[name], settings, paths) for name in names]
        for job in running:
            stack.callback(shutil.rmtree, job.work, ignore_errors=True)
            stack.callback(end, job.process)
        reported = time.monotonic()
        while running:
            time.sleep(0.2)
            for job in [job for job in running if job.process.poll() is not None]:
                check(job.process, job.command, job.log)
                _keep(job, homes[job.name])
                running.remove(job)
                say(f"{job.name}: trained, solves {_accuracy(homes[job.name]):.1%} of the validation items")
            if running and time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                say(", ".join(f"{job.name}: {_progress(job)}" for job in running))


def _make_starts(names: Sequence[ModelName], homes: dict[ModelName, Path], records: Sequence[Record]) -> None:
    """Writes the models with random weights, and their tokenizers."""
    os.environ.update(CPU_ONLY)
    # These imports are slow, and not needed if all models are cached.
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    from experiments.demo.make_models import make_model  # noqa: PLC0415
    from experiments.demo.tokenizers import build_tokenizer  # noqa: PLC0415

    transformers_logging.disable_progress_bar()
    for name in names:
        work = _work(homes[name])
        shutil.rmtree(work, ignore_errors=True)
        make_model(name, build_tokenizer(name, records), work / "start")


def _work(home: Path) -> Path:
    return home.with_name(f".{home.name}.tmp")


def _start(name: ModelName, home: Path, settings: Settings, paths: DemoPaths) -> _Job:
    work = _work(home)
    config = pretrain_config(name, work / "start", settings, paths, work / "run")
    config_path = work / "config.yaml"
    config_path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "kvdistill", "train", "--config", str(config_path)]
    log = paths.logs / f"train_{name}.log"
    return _Job(name, command, log, work, start_logged(command, log, CPU_ONLY))


def _keep(job: _Job, home: Path) -> None:
    """Moves a trained model into the cache in one step, so that the cache never holds an incomplete one."""
    finished = job.work / "finished"
    finished.mkdir()
    (job.work / "run" / "best_model").rename(finished / "model")
    (job.work / "run" / "summary.json").rename(finished / "summary.json")
    finished.rename(home)


def _accuracy(home: Path) -> float:
    summary = json.loads((home / "summary.json").read_text(encoding="utf-8"))
    return float(summary["val_task_metrics"]["accuracy"])


def _progress(job: _Job) -> str:
    metrics = job.work / "run" / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    if not lines or not lines[-1].endswith("}"):
        return "starting"
    last = json.loads(lines[-1])
    return f"step {last['step']}" + (f", loss {last['train/loss']:.3f}" if "train/loss" in last else "")


def _key(name: ModelName, settings: Settings, paths: DemoPaths) -> str:
    """A digest of everything that determines a model: data, settings, sources (with shapes and seeds), versions."""
    root = Path(__file__).resolve().parents[2]
    config = pretrain_config(name, Path("model"), settings, DemoPaths(Path()), Path("run"))
    sources = {str(path.relative_to(root)): path.read_text("utf-8") for glob in _SOURCES for path in root.glob(glob)}
    data = [hashlib.blake2b(paths.split(split).read_bytes()).hexdigest() for split in ("train", "val")]
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    content = [name, config, sorted(sources.items()), data, versions]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()
