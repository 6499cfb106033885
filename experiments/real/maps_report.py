"""The results of the comparison of maps: maps.json, and a table on stdout."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments.real.maps_config import REFERENCE, MapArm, healing_name, run_name
from experiments.real.real_config import RealPaths
from experiments.real.real_results import RealRunResult, gather_run
from kvcore.files import write_json
from kvdistill.report.report_table import markdown
from kvdistill.sweep.sweep_table import Mean

UNKNOWN = "-"
HEADINGS = (
    "arm",
    "perplexity by seed",
    "mean",
    "cross-entropy by seed",
    "mean",
    "minus all heads",
    "bytes per sample",
    "of the bf16 cache",
    "explained, keys / values",
)


@dataclass(frozen=True, slots=True)
class ArmResults:
    """One arm: its runs in the order of the seeds, and what the table shows of them.

    Attributes:
        shown: what the table calls it.
        runs: one per seed.
        perplexity: mean held-out perplexity.
        cross_entropy: mean held-out cross-entropy.
        minus_reference: mean over seeds of the cross-entropy minus that of `REFERENCE` with the same seed; None for
            `REFERENCE` itself, and without it.
        bytes_per_sample: encoded K/V, mean over seeds; None without a teacher.
        share_of_cache: these bytes over those of all layers' K/V of the text in bf16.
        explained: by tensor, explained variance after training on held-out records, mean over layers and seeds, of
            what the arm compares: components of a basis, or the mapped K/V.
    """

    shown: str
    runs: list[RealRunResult]
    perplexity: Mean
    cross_entropy: Mean
    minus_reference: Mean | None
    bytes_per_sample: float | None
    share_of_cache: float | None
    explained: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class MapsResults:
    """The content of maps.json. Intervals are Student's t over the seeds, 95 %.

    Attributes:
        seeds: of the arms.
        arms: by their names.
        data: the facts of `Prepared`.
        settings: sizes of the runs.
        healing: steps on cross-entropy alone before the arms; 0 without.
        healed: by seed, the run that trained the student from which the arms start; empty without.
    """

    seeds: tuple[int, ...]
    arms: Mapping[str, ArmResults]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    healing: int = 0
    healed: Sequence[RealRunResult] = ()

    @property
    def file(self) -> str:
        """The name of the file."""
        return f"maps_healed{self.healing}.json" if self.healing else "maps.json"


def gather(
    paths: RealPaths,
    arms: Sequence[MapArm],
    seeds: Sequence[int],
    *,
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    healing: int = 0,
) -> MapsResults:
    """Reads all runs.

    Raises:
        IncompleteError, ResultError: a run is not finished.
    """
    batch = int(settings["batch"])

    def by_seed(name: Callable[[int], str]) -> list[RealRunResult]:
        return [gather_run(paths.runs, name(seed), batch) for seed in seeds]

    runs = {arm.name: by_seed(partial(run_name, arm, healing=healing)) for arm in arms}
    shown = {arm.name: arm.shown for arm in arms}
    healed = by_seed(partial(healing_name, steps=healing)) if healing else []
    return MapsResults(tuple(seeds), summarise(shown, runs), data, settings, healing, healed)


def summarise(shown: Mapping[str, str], runs: Mapping[str, list[RealRunResult]]) -> dict[str, ArmResults]:
    """The means of each arm, by its name.

    Args:
        shown: what the table calls each arm.
        runs: of each arm, in the same order of seeds.
    """
    reference = runs.get(REFERENCE)
    return {
        name: _arm(shown[name], by_seed, None if name == REFERENCE else reference) for name, by_seed in runs.items()
    }


def table(arms: Mapping[str, ArmResults]) -> str:
    """The table as Markdown."""
    return markdown(HEADINGS, [_row(arm) for arm in arms.values()])


def write_report(results: MapsResults, output: Path) -> None:
    """Writes maps.json, or that of healed students, and prints the table."""
    file = output / results.file
    write_json(file, asdict(results))
    if results.healed:
        reached = " / ".join(f"{run.held_out['perplexity']:.1f}" for run in results.healed)
        sys.stdout.write(f"\nperplexity by seed before the arms, after {results.healing} steps: {reached}\n")
    sys.stdout.write(f"\n{table(results.arms)}\n{file}\n")
    sys.stdout.flush()


def _arm(shown: str, runs: list[RealRunResult], reference: list[RealRunResult] | None) -> ArmResults:
    perplexity, losses = ([run.held_out[name] for run in runs] for name in ("perplexity", "ce_loss"))
    minus = None
    if reference is not None:
        others = [run.held_out["ce_loss"] for run in reference]
        minus = Mean.of([own - other for own, other in zip(losses, others, strict=True)])
    sent = _mean([run.bytes_per_sample for run in runs])
    cache = _mean([run.cache_bytes_per_sample for run in runs])
    return ArmResults(
        shown=shown,
        runs=runs,
        perplexity=Mean.of(perplexity),
        cross_entropy=Mean.of(losses),
        minus_reference=minus,
        bytes_per_sample=sent,
        share_of_cache=None if sent is None or cache is None else sent / cache,
        explained={
            tensor: statistics.fmean(value for run in runs for value in run.explained_after[tensor])
            for tensor in runs[0].explained_after
        },
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _row(arm: ArmResults) -> list[str]:
    return [
        arm.shown,
        " / ".join(f"{run.held_out['perplexity']:.1f}" for run in arm.runs),
        f"{arm.perplexity.value:.1f}",
        " / ".join(f"{run.held_out['ce_loss']:.3f}" for run in arm.runs),
        arm.cross_entropy.shown(".3f"),
        UNKNOWN if arm.minus_reference is None else arm.minus_reference.shown("+.3f"),
        UNKNOWN if arm.bytes_per_sample is None else f"{arm.bytes_per_sample:,.0f}",
        UNKNOWN if arm.share_of_cache is None else f"1/{1 / arm.share_of_cache:.0f}",
        " / ".join(f"{value:.2f}" for value in arm.explained.values()) or UNKNOWN,
    ]
