"""The results of a table: a JSON file with the commit that made it, and a Markdown table."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.demo.results import result
from experiments.paper.paper_tables import Table
from kvdistill.report.report_table import UNKNOWN, markdown
from kvdistill.sweep.sweep_table import Mean

HEADINGS = ("arm", "accuracy by seed", "mean", "minus the reference", "seconds per run")
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm. `accuracy`: on test items, by seed. `seconds`: of training and testing, by seed."""

    name: str
    accuracy: list[float]
    seconds: list[float]


@dataclass(frozen=True, slots=True)
class TableResult:
    """The content of a table's JSON file.

    `weights`: by arm with several teachers, each teacher's mean weight at the end, by seed.
    """

    title: str
    commit: str
    machine: str
    seeds: list[int]
    reference: str
    settings: dict[str, Any]
    arms: list[ArmResult]
    weights: dict[str, dict[str, list[float]]]


def gather(
    table: Table,
    settings: Mapping[str, Any],
    measured: Mapping[str, Mapping[str, Any]],
    runs: Mapping[str, list[Path]],
    seeds: Sequence[int],
) -> TableResult:
    """Reads the results of all runs.

    Args:
        table: the table.
        settings: the sizes and steps of the runs.
        measured: what `Comparison.compare` returned.
        runs: each arm's output directories, by seed.
        seeds: of the runs.

    Raises:
        ResultError: a run did not write its result.
    """
    arms = [
        ArmResult(arm.name, measured[arm.name]["test_accuracy"], [result(run)["seconds"] for run in runs[arm.name]])
        for arm in table.arms
    ]
    weights = {name: found["mean_weight"] for name, found in measured.items() if "mean_weight" in found}
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    return TableResult(table.title, commit(), machine, list(seeds), table.reference, dict(settings), arms, weights)


def rows(found: TableResult) -> list[list[str]]:
    """The cells of the table. Intervals are Student's t over the seeds, 95 %; differences are paired by seed."""
    by_name = {arm.name: arm for arm in found.arms}
    reference = by_name[found.reference]
    return [_row(arm, None if arm is reference else reference) for arm in found.arms]


def table_text(found: TableResult) -> str:
    """The table as Markdown."""
    return markdown(HEADINGS, rows(found))


def as_json(found: TableResult) -> dict[str, Any]:
    """The table's JSON object."""
    return asdict(found)


def from_json(tree: Mapping[str, Any]) -> TableResult:
    """The result that `as_json` wrote."""
    return TableResult(**{**tree, "arms": [ArmResult(**arm) for arm in tree["arms"]]})


def commit() -> str:
    """The commit of this checkout, with `+` if Python files have changes; `unknown` outside a checkout."""
    git = shutil.which("git")
    if git is None or not (_ROOT / ".git").exists():
        return "unknown"
    head, changed = _output(git, "rev-parse", "HEAD"), _output(git, "status", "--porcelain", "--", "*.py")
    return f"{head}+" if changed else head


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _row(arm: ArmResult, reference: ArmResult | None) -> list[str]:
    minus = UNKNOWN
    if reference is not None:
        minus = Mean.of([100 * (a - b) for a, b in zip(arm.accuracy, reference.accuracy, strict=True)]).shown("+.1f")
    by_seed = " / ".join(f"{100 * value:.1f}" for value in arm.accuracy)
    mean = Mean.of([100 * value for value in arm.accuracy]).shown(".1f")
    return [arm.name, by_seed, mean, minus, f"{sum(arm.seconds) / len(arm.seconds):.0f}"]
