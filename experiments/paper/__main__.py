"""Trains latent students on toy tasks in many ways and writes the tables of docs/results.md.

Tables share data and models. An interrupted command continues with the runs that are missing.

Examples:
  python -m experiments.paper --quick
  python -m experiments.paper --tables methods --seeds 0 1 2
  python -m experiments.paper --tables methods --seeds 10 --arms "CE, T=3" "KV, T=3" --output outputs/choose
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from experiments.demo.demo_processes import CPU_ONLY
from experiments.paper.paper_report import TableResult, as_json, gather, table_text
from experiments.paper.paper_runs import PaperRuns
from experiments.paper.paper_tables import QUICK_TEST, TABLES, Table
from kvcore.command_line import run_command
from kvcore.errors import FieldError
from kvcore.files import write_json
from student_trainer.launching.processes import ended_by_sigterm


def run_table(name: str, table: Table, output: Path, seeds: Sequence[int], *, quick: bool) -> TableResult:
    """Runs what is missing of one table, writes its JSON file and prints it."""
    settings = table.settings
    if quick:
        settings = replace(settings, arm_steps=table.quick_steps, test=QUICK_TEST, evaluations=1)
    runs = PaperRuns(name, table, output, settings, seeds)
    with ended_by_sigterm():
        measured = runs.compare()
    by_arm = {arm.name: [runs.run_of(arm.name, seed) for seed in seeds] for arm in table.arms}
    found = gather(table, asdict(settings), measured, by_arm, seeds)
    # A part of the table does not replace the whole one.
    path = output / (f"{name}.json" if table.arms == TABLES[name].arms else f"{name}-arms.json")
    write_json(path, as_json(found))
    sys.stdout.write(f"\n{table.title}\n\n{table_text(found)}\n{path}\n")
    sys.stdout.flush()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="folder of the results; outputs/paper by default")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="all by default")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="arms of a single table; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", help="0 1 2 by default, 0 with --quick")
    parser.add_argument("--quick", action="store_true", help="few steps: the shape of the tables, not their values")
    given = parser.parse_args(arguments)
    output = given.output or Path("outputs/paper-quick" if given.quick else "outputs/paper")
    seeds = given.seeds or ([0] if given.quick else [0, 1, 2])

    def command() -> int:
        os.environ.update(CPU_ONLY)
        tables = {name: _with_arms(TABLES[name], given.arms) for name in given.tables}
        for name, table in tables.items():
            run_table(name, table, output, seeds, quick=given.quick)
        return 0

    return run_command("paper", command, "interrupted; the same command continues")


def _with_arms(table: Table, names: Sequence[str] | None) -> Table:
    if names is None:
        return table
    known = {arm.name: arm for arm in table.arms}
    if unknown := [name for name in names if name not in known]:
        raise FieldError("--arms", f"there is no arm '{unknown[0]}'; known: {', '.join(known)}")
    return replace(table, arms=tuple(known[name] for name in names), reference=names[0])


if __name__ == "__main__":
    sys.exit(main())
