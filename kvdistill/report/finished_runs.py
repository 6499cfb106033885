"""Finds training runs below folders and reads their files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from kvcore.errors import ConfigError
from kvcore.intervals import wilson_interval

METRICS, RESULTS, SUMMARY = "metrics.jsonl", "eval_results.json", "summary.json"
# Folders inside a run that contain no other runs.
_NOT_RUNS = frozenset({"best_model", "checkpoints", "tensorboard", "logs"})
AVERAGE = "average"

Points = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Score:
    """A score on one dataset in percent. `low` and `high`: its 95 % confidence interval, if it is known."""

    value: float
    low: float | None = None
    high: float | None = None
    num_examples: int | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One training run.

    Attributes:
        name: shown in tables.
        path: its folder.
        metrics: the lines of metrics.jsonl.
        scores: scores of eval_results.json by dataset.
        average: the average in eval_results.json.
        summary: summary.json, or None if the run has not ended.
    """

    name: str
    path: Path
    metrics: Sequence[Mapping[str, float]] = ()
    scores: Mapping[str, Score] = field(default_factory=dict)
    average: float | None = None
    summary: Mapping[str, Any] | None = None

    def series(self, name: str) -> Points:
        """One metric over steps."""
        return [(int(line["step"]), line[name]) for line in self.metrics if name in line]

    def names(self, prefix: str) -> list[str]:
        """The rests of all metric names that begin with `prefix`, in order of appearance."""
        found = (name.removeprefix(prefix) for line in self.metrics for name in line if name.startswith(prefix))
        return list(dict.fromkeys(found))

    @property
    def steps(self) -> int | None:
        """The last logged step."""
        return max((int(line["step"]) for line in self.metrics), default=None)

    @property
    def validation(self) -> Mapping[str, float]:
        """The validation metrics of the best step, or of the last validation if the run has not ended; may be empty."""
        lines = [line for line in self.metrics if "val/loss" in line]
        best = (self.summary or {}).get("best_step")
        return next((line for line in lines if line["step"] == best), lines[-1] if lines else {})


def find_runs(outputs: Iterable[Path]) -> list[Run]:
    """Reads each run in or below the folders once, sorted by name within each folder.

    Raises:
        ConfigError: a folder is missing or has no run, or a file in it cannot be read.
    """
    found: dict[Path, None] = {}
    for output in outputs:
        below = list(_run_folders(output))
        if not below:
            raise ConfigError(
                f"{output}: {'has no run' if output.is_dir() else 'no such folder'}; give the run.output_dir of a "
                f"training run or a parent folder (a run has {METRICS}, {RESULTS} or {SUMMARY})"
            )
        found |= dict.fromkeys(path.resolve() for path in below)
    paths = list(found)
    shared = Path(os.path.commonpath(paths)) if len(paths) > 1 else paths[0].parent
    return [read_run(path, path.relative_to(shared).as_posix()) for path in paths]


def _run_folders(folder: Path) -> Iterator[Path]:
    if any((folder / name).is_file() for name in (METRICS, RESULTS, SUMMARY)):
        yield folder
        return
    if folder.is_dir():
        for below in sorted(folder.iterdir()):
            if below.is_dir() and not below.is_symlink() and below.name not in _NOT_RUNS:
                yield from _run_folders(below)


def read_run(path: Path, name: str) -> Run:
    """Reads one run's folder.

    Raises:
        ConfigError: a file in it does not have the format of the trainer or the evaluation.
    """
    results: Mapping[str, Any] = _json(path / RESULTS) or {}
    entries = {dataset: entry for dataset, entry in results.items() if dataset != AVERAGE}
    try:
        scores = {dataset: _score(entry) for dataset, entry in entries.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path / RESULTS}: an entry has no 'score' between 0 and 100 ({error!r})") from error
    average = results.get(AVERAGE)
    return Run(
        name, path, _lines(path / METRICS), scores, None if average is None else float(average), _json(path / SUMMARY)
    )


def _score(entry: Mapping[str, Any]) -> Score:
    interval = entry.get("ci95")
    score, count = float(entry["score"]), entry.get("num_examples")
    if interval is None and count:
        # A share of exact answers, as validation measures it.
        interval = [100 * end for end in wilson_interval(score / 100, count)]
    low, high = (None, None) if interval is None else (float(interval[0]), float(interval[1]))
    return Score(score, low, high, count)


def _lines(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    # A line without a newline is still being written by a running training.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [cast("dict[str, float]", _parsed(line, path)) for line in lines]


def _json(path: Path) -> dict[str, Any] | None:
    return _parsed(path.read_text(encoding="utf-8"), path) if path.is_file() else None


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        tree: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}; restore it, or leave this run out") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(tree).__name__}; leave this run out")
    return cast("dict[str, Any]", tree)
