"""The runs of one table. Tables share their models, and runs that have finished with the same settings are kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from experiments.comparisons.bad_teacher import BAD, BAD_SEED
from experiments.comparisons.base import Comparison
from experiments.comparisons.selectors import TEACHER as ITSELF
from experiments.demo.demo_config import ModelName, Settings
from experiments.demo.make_models import make_model
from experiments.demo.pretrain import Pretrained
from experiments.paper.paper_tables import Table
from kvcore.files import write_json

_RESULT = "result.json"


class PaperRuns(Comparison):
    """All arms of one table with all seeds.

    Args:
        name: of the table, with which the names of its runs begin.
        table: the arms.
        output: the folder for models, data and runs of all tables.
        settings: sizes and steps; those of the table, or fewer steps.
        seeds: of the runs of each arm.
    """

    def __init__(self, name: str, table: Table, output: Path, settings: Settings, seeds: Sequence[int]) -> None:
        super().__init__(table.arms, output, settings, seeds)
        self.name = name

    def run_of(self, arm: str, seed: int) -> Path:
        """The output directory of one run."""
        return super().run_of(f"{self.name} {arm}", seed)

    def teachers(self, models: dict[ModelName, Pretrained]) -> dict[str, Path]:
        """The teachers that some arm has."""
        used = {name for arm in self.arms for name in arm.teachers}
        known = super().teachers(models) | {ITSELF: models["student"].path}
        if BAD in used:
            known[BAD] = self.paths.output / BAD
            make_model("teacher_b", AutoTokenizer.from_pretrained(models["teacher_b"].path), known[BAD], BAD_SEED)
        return {name: path for name, path in known.items() if name in used}

    def prepare_runs(self) -> None:
        """Keeps the runs that are there."""
        for folder in (self._planned_file("").parent, self.paths.output / "runs"):
            folder.mkdir(parents=True, exist_ok=True)

    def unfinished(self, plan: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The runs without a result, or whose configuration has changed."""
        to_do = [run for run in plan if not self._is_finished(run)]
        for run in to_do:
            Path(run["config"]["run"]["output_dir"], _RESULT).unlink(missing_ok=True)
            write_json(self._planned_file(run["name"]), _without_ports(run["config"]))
        if kept := len(plan) - len(to_do):
            self.say(f"{kept} of {len(plan)} runs are finished")
        return to_do

    def _is_finished(self, run: dict[str, Any]) -> bool:
        planned = self._planned_file(run["name"])
        if not planned.is_file() or not Path(run["config"]["run"]["output_dir"], _RESULT).is_file():
            return False
        return json.loads(planned.read_text(encoding="utf-8")) == _without_ports(run["config"])

    def _planned_file(self, name: str) -> Path:
        return self.paths.output / "planned" / f"{self.name} {name}.json".replace(" ", "_")


def _without_ports(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the teachers' endpoints, which change with each start of the servers."""
    names = [{**teacher, "endpoints": []} for teacher in config.get("teachers", [])]
    return json.loads(json.dumps({**config, "teachers": names}))
