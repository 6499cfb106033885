"""What training runs left on disk: found below the folders that are given, and read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from kvcore.errors import ConfigError

METRICS, RESULTS, SUMMARY = "metrics.jsonl", "eval_results.json", "summary.json"
# What a run keeps below itself, in which no other run is to be looked for.
_NOT_RUNS = frozenset({"best_model", "checkpoints", "tensorboard", "logs"})
AVERAGE = "average"

Points = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Score:
    """One dataset's score in percent; `low` and `high` bound it with 95 % confidence, where that was measured."""

    value: float
    low: float | None = None
    high: float | None = None
    num_examples: int | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One training run.

    `metrics`: the lines of metrics.jsonl. `scores`: by dataset. `average`: as eval_results.json has it. `summary`: None
    while the run has not ended.
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
        """What follows `prefix` in the metrics' names, in the order in which they first appear."""
        found = (name.removeprefix(prefix) for line in self.metrics for name in line if name.startswith(prefix))
        return list(dict.fromkeys(found))

    @property
    def steps(self) -> int | None:
        """The last step that was logged."""
        return max((int(line["step"]) for line in self.metrics), default=None)

    @property
    def validation(self) -> Mapping[str, float]:
        """The best step's validation, or the last one's in a run that has not ended; empty if there is none."""
        lines = [line for line in self.metrics if "val/loss" in line]
        best = (self.summary or {}).get("best_step")
        return next((line for line in lines if line["step"] == best), lines[-1] if lines else {})


def find_runs(outputs: Iterable[Path]) -> list[Run]:
    """Reads every run in or below the folders, in the order of their names, each once.

    Raises:
        ConfigError: a folder is missing or holds no run, or a file in it cannot be read.
    """
    found: dict[Path, None] = {}
    for output in outputs:
        below = list(_run_folders(output))
        if not below:
            raise ConfigError(
                f"{output}: {'holds no run' if output.is_dir() else 'no such folder'}; give the run.output_dir of a "
                f"training run, or a folder above some (a run has {METRICS}, {RESULTS} or {SUMMARY})"
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
        ConfigError: a file in it is not what the trainer or the evaluation writes.
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
    low, high = (None, None) if interval is None else (float(interval[0]), float(interval[1]))
    return Score(float(entry["score"]), low, high, entry.get("num_examples"))


def _lines(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    # A line without its end is being written by a run that goes on.
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
