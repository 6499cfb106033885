"""Compares losses on latents on a real model: `python -m experiments.real.latents`.

Models, data and settings are those of `experiments.real.maps`. All arms of a seed start from one student that was
trained on cross-entropy alone, reason in the same number of latents and passes, and take equal steps: the answer's and
the text's cross-entropy alone, with the teacher's K/V, with the cross-entropy of the reasoning's steps on blocks of
latents, with both, and with both and the K/V of other samples. It prints a table and writes latents.json. Runs that
have finished are kept, so an interrupted command continues.

Examples:
  python -m experiments.real.latents --seeds 0 1 2
  python -m experiments.real.latents --arms ce kv --seeds 0
  python -m experiments.real.latents --quick --output outputs/latents
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.local_copies import default_data_dir
from experiments.demo.demo_config import Config
from experiments.demo.demo_processes import CPU_ONLY
from experiments.demo.results import finished
from experiments.real.maps import MapRuns, arms_parser
from experiments.real.maps_config import HEALING_STEPS, healing_name
from experiments.real.real_config import TEACHER, RealPaths, Settings, base_config, teacher_sections
from experiments.real.real_results import RealRunResult, gather_run
from kvcore.command_line import run_command
from kvcore.files import write_json
from kvdistill.report.report_table import UNKNOWN, markdown
from kvdistill.sweep.sweep_table import Mean
from student_trainer.config import BEST_MODEL
from student_trainer.launching.processes import ended_by_sigterm

# Three blocks of eight: short questions of GSM8K have two or three lines of reasoning.
LATENTS, PER_STEP, PASSES, STEPS = 24, 8, 3, 40
_ACCURACY = "val/task_metrics/accuracy"
_HEADINGS = ("arm", "answer's cross-entropy by seed", "mean", "minus `ce`", "KV loss", "accuracy")


@dataclass(frozen=True, slots=True)
class LatentArm:
    """One arm. `kv`: whether it has a teacher. `step_ce`: the weight of the steps. `control`: see `kv.control`."""

    name: str
    shown: str
    kv: bool = False
    step_ce: float = 0.0
    control: str = "none"


REFERENCE = "ce"
ARMS = (
    LatentArm(REFERENCE, "cross-entropy alone"),
    LatentArm("kv", "K/V", kv=True),
    LatentArm("step", "steps", step_ce=1.0),
    LatentArm("kv_step", "K/V and steps", kv=True, step_ce=1.0),
    LatentArm("shuffled_step", "K/V of other samples and steps", kv=True, step_ce=1.0, control="shuffled"),
)


def latent_config(arm: LatentArm, seed: int, settings: Settings, paths: RealPaths, port: int) -> Config:
    """The configuration of one run. Arms differ only in the teacher, its control, and the weight of the steps."""
    config = base_config(run_name(arm, seed), seed, settings, paths)
    start = paths.runs.run(healing_name(seed, HEALING_STEPS)) / BEST_MODEL
    config["student"] = {"path": str(start), "mode": "latent", "latents": LATENTS, "passes": PASSES}
    config["run"]["steps"] = settings.steps
    # An answer and its end.
    config["data"]["answer_tokens"] = 8
    if arm.kv:
        selection = {"selector": "r_kv", "budget": LATENTS, "span": "reasoning"}
        config |= teacher_sections(settings, selection, port)
        config["kv"]["control"] = arm.control
    if arm.step_ce:
        config["student"]["latents_per_step"] = PER_STEP
        config["loss"] = {**config.get("loss", {}), "step_ce_weight": arm.step_ce}
    return config


def run_name(arm: LatentArm, seed: int) -> str:
    """The name of one run."""
    return f"latent-{arm.name}-seed{seed}"


@dataclass(frozen=True, slots=True)
class LatentRun:
    """One run: its losses and cost, and the share of held-out questions that it answers correctly."""

    run: RealRunResult
    accuracy: float


@dataclass(frozen=True, slots=True)
class LatentResults:
    """The content of latents.json. `arms`: one run per seed."""

    seeds: tuple[int, ...]
    arms: Mapping[str, list[LatentRun]]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]


class LatentRuns(MapRuns):
    """The runs of some arms on latents, each from the healed student of its seed.

    Args:
        output: the folder of models, data, runs and logs.
        arms: in the order in which they run.
        seeds: of each arm.
        quick: few steps on few records.
        data_dir: directory of local copies of GSM8K; the hub if None.
    """

    def __init__(
        self, output: Path, arms: Sequence[LatentArm], seeds: Sequence[int], *, quick: bool, data_dir: Path | None
    ) -> None:
        super().__init__(output, (), seeds, quick=quick, data_dir=data_dir, healing=HEALING_STEPS)
        self.latent_arms = tuple(arms)
        self.latent_settings = self.settings if quick else replace(self.settings, steps=STEPS)

    def run_latents(self) -> LatentResults:
        """Trains every arm with every seed."""
        data, servers = self.prepare(), self.servers()
        with servers as endpoints:
            port = int(endpoints[TEACHER].rpartition(":")[2])
            for seed in self.seeds:
                self.heal(seed)
                for arm in self.latent_arms:
                    config = latent_config(arm, seed, self.latent_settings, self.paths, port)
                    self.train(run_name(arm, seed), config, servers)
        arms = {arm.name: [self._gathered(arm, seed) for seed in self.seeds] for arm in self.latent_arms}
        return LatentResults(self.seeds, arms, data, asdict(self.latent_settings))

    def _gathered(self, arm: LatentArm, seed: int) -> LatentRun:
        name = run_name(arm, seed)
        run = gather_run(self.paths.runs, name, self.latent_settings.batch)
        return LatentRun(run, finished(self.paths.runs.run(name)).validation[_ACCURACY])


def table(arms: Mapping[str, Sequence[LatentRun]]) -> str:
    """The table as Markdown. Intervals are Student's t over the seeds, 95 %; differences are paired by seed."""
    shown = {arm.name: arm.shown for arm in ARMS}
    reference = arms.get(REFERENCE)
    return markdown(_HEADINGS, [_row(shown[name], runs, reference) for name, runs in arms.items()])


def _row(shown: str, runs: Sequence[LatentRun], reference: Sequence[LatentRun] | None) -> list[str]:
    losses = [one.run.held_out["answer_ce"] for one in runs]
    minus = UNKNOWN
    if reference is not None and runs is not reference:
        pairs = zip(losses, reference, strict=True)
        minus = Mean.of([loss - other.run.held_out["answer_ce"] for loss, other in pairs]).shown("+.3f")
    return [
        shown,
        " / ".join(f"{loss:.3f}" for loss in losses),
        Mean.of(losses).shown(".3f"),
        minus,
        " / ".join(f"{one.run.held_out['kv_loss']:.3f}" for one in runs if "kv_loss" in one.run.held_out) or UNKNOWN,
        " / ".join(f"{one.accuracy:.1%}" for one in runs),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    by_name = {arm.name: arm for arm in ARMS}
    given = arms_parser(__doc__, by_name).parse_args(arguments)

    def command() -> int:
        os.environ.update(CPU_ONLY)
        arms = [by_name[name] for name in given.arms]
        runs = LatentRuns(given.output, arms, given.seeds, quick=given.quick, data_dir=default_data_dir())
        with ended_by_sigterm():
            found = runs.run_latents()
        path = runs.paths.runs.output / "latents.json"
        write_json(path, asdict(found))
        sys.stdout.write(f"\n{table(found.arms)}\n{path}\n")
        return 0

    return run_command("latents", command, "interrupted; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
