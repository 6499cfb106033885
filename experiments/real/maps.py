"""Compares maps between teacher and student on a real model: `python -m experiments.real.maps`.

Models, data and settings are those of `make real`, with shorter questions. All arms take equal steps with equal seeds:
cross-entropy alone; `align.direction: to_teacher` with all heads, and with the first 64, 16 or 4 principal components
of each layer (`align.basis_rank`); rank 16 with the K/V of other samples; a frozen ridge map to the student, of any
rank and of rank 16; and all heads and rank 16 in other codecs than int8. With `--healed`, each seed first trains one
student on cross-entropy alone, from which all its arms start. It prints a table and writes maps.json, or
maps_healed<steps>.json. Runs that have finished with the same settings, models and data are kept, so an interrupted
command continues.

Examples:
  python -m experiments.real.maps --seeds 0 1 2
  python -m experiments.real.maps --arms ce heads basis16 --seeds 0
  python -m experiments.real.maps --arms ce heads to_student reduced16 basis16 basis4 --seeds 0 1 2 --healed
  python -m experiments.real.maps --quick --output outputs/maps
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from data.local_copies import default_data_dir
from experiments.demo.demo_processes import CPU_ONLY
from experiments.real.maps_config import (
    ARMS,
    FULL,
    HEALING_STEPS,
    QUICK,
    MapArm,
    healing_config,
    healing_name,
    map_config,
    planned,
    run_name,
)
from experiments.real.maps_report import MapsResults, gather, write_report
from experiments.real.real_config import TEACHER, RealPaths
from experiments.real.real_runs import RealRuns
from kvcore.command_line import run_command
from student_trainer.launching.processes import ended_by_sigterm


class MapRuns(RealRuns):
    """The runs of some arms.

    Args:
        output: the folder of models, data, runs and logs.
        arms: in the order in which they run.
        seeds: of each arm.
        quick: few steps on few records.
        data_dir: directory of local copies of GSM8K; the hub if None.
        healing: steps on cross-entropy alone that train the student of each seed's arms; 0 for the cut student.
    """

    def __init__(
        self,
        output: Path,
        arms: Sequence[MapArm],
        seeds: Sequence[int],
        *,
        quick: bool,
        data_dir: Path | None,
        healing: int = 0,
    ) -> None:
        super().__init__(RealPaths(output, quick), QUICK if quick else FULL, seeds, data_dir)
        self.arms, self.healing = tuple(arms), healing

    def run(self) -> MapsResults:
        """Trains every arm with every seed."""
        data = self.prepare()
        servers = self.servers()
        with servers as endpoints:
            port = int(endpoints[TEACHER].rpartition(":")[2])
            for arm, seed in planned(self.arms, self.seeds):
                self.heal(seed)
                config = map_config(arm, seed, self.settings, self.paths, port, self.healing)
                self.train(run_name(arm, seed, self.healing), config, servers)
        settings = asdict(self.settings)
        return gather(self.paths, self.arms, self.seeds, data=data, settings=settings, healing=self.healing)

    def heal(self, seed: int) -> None:
        """Trains the student from which the arms of a seed start, unless that is done."""
        if self.healing:
            config = healing_config(seed, self.healing, self.settings, self.paths)
            self.train(healing_name(seed, self.healing), config)


def arms_parser(description: str | None, arms: Iterable[str]) -> argparse.ArgumentParser:
    """The options of an experiment with arms."""
    names = list(arms)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/maps"), help="folder of everything it writes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the arms; 0 by default")
    parser.add_argument("--arms", nargs="+", choices=names, default=names, help="arms; all by default")
    parser.add_argument("--quick", action="store_true", help="few steps on few records")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    by_name = {arm.name: arm for arm in ARMS}
    parser = arms_parser(__doc__, by_name)
    parser.add_argument(
        "--healed",
        type=_steps,
        nargs="?",
        const=HEALING_STEPS,
        default=0,
        metavar="STEPS",
        help=f"arms start from a student that was trained on cross-entropy alone, for {HEALING_STEPS} steps by default",
    )
    given = parser.parse_args(arguments)

    def command() -> int:
        os.environ.update(CPU_ONLY)
        arms = [by_name[name] for name in given.arms]
        data_dir, healing = default_data_dir(), given.healed
        runs = MapRuns(given.output, arms, given.seeds, quick=given.quick, data_dir=data_dir, healing=healing)
        with ended_by_sigterm():
            results = runs.run()
        write_report(results, runs.paths.runs.output)
        return 0

    return run_command("maps", command, "interrupted; the same command continues")


def _steps(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of steps of at least 1; got '{value}'")
    return int(value)


if __name__ == "__main__":
    sys.exit(main())
