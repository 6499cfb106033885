"""Compares maps between teacher and student on a real model: `python -m experiments.real.maps`.

Models, data and settings are those of `make real`, with shorter questions. All arms take equal steps with equal seeds:
cross-entropy alone; `align.direction: to_teacher` with all heads, and with the first 64, 16 or 4 principal components
of each layer (`align.basis_rank`); rank 16 with the K/V of other samples; a frozen ridge map to the student; and all
heads and rank 16 in other codecs than int8. It prints a table and writes maps.json. Runs that have finished with the
same settings, models and data are kept, so an interrupted command continues.

Examples:
  python -m experiments.real.maps --seeds 0 1 2
  python -m experiments.real.maps --arms ce heads basis16 --seeds 0
  python -m experiments.real.maps --quick --output outputs/maps
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from data.local_copies import default_data_dir
from experiments.demo.demo_processes import CPU_ONLY
from experiments.real.maps_config import ARMS, FULL, QUICK, MapArm, map_config, planned, run_name
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
    """

    def __init__(
        self, output: Path, arms: Sequence[MapArm], seeds: Sequence[int], *, quick: bool, data_dir: Path | None
    ) -> None:
        super().__init__(RealPaths(output, quick), QUICK if quick else FULL, seeds, data_dir)
        self.arms = tuple(arms)

    def run(self) -> MapsResults:
        """Trains every arm with every seed."""
        data = self.prepare()
        servers = self.servers()
        with servers as endpoints:
            port = int(endpoints[TEACHER].rpartition(":")[2])
            for arm, seed in planned(self.arms, self.seeds):
                self.train(run_name(arm, seed), map_config(arm, seed, self.settings, self.paths, port), servers)
        return gather(self.paths, self.arms, self.seeds, data=data, settings=asdict(self.settings))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    by_name = {arm.name: arm for arm in ARMS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/maps"), help="folder of everything it writes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the arms; 0 by default")
    parser.add_argument("--arms", nargs="+", choices=by_name, default=list(by_name), help="arms; all by default")
    parser.add_argument("--quick", action="store_true", help="few steps on few records")
    given = parser.parse_args(arguments)

    def command() -> int:
        os.environ.update(CPU_ONLY)
        arms = [by_name[name] for name in given.arms]
        runs = MapRuns(given.output, arms, given.seeds, quick=given.quick, data_dir=default_data_dir())
        with ended_by_sigterm():
            results = runs.run()
        write_report(results, runs.paths.runs.output)
        return 0

    return run_command("maps", command, "interrupted; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
