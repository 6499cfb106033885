"""The results of the run on a real model, read from the files of its runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.demo.demo_config import DemoPaths
from experiments.demo.results import Replay, finished, gather_replay, stages_ms, summary
from experiments.real.real_config import ARMS, LATENT_ARMS, SKIPPED_STEPS, TEACHER, RealPaths
from kvcore.errors import KVDistillError
from kvcore.types import TENSORS
from kvdistill.report.finished_runs import Run

# fp32 on both sides: what is left is the order of sums.
MOST_SERVED_ERROR = 1e-4
_BY_LAYER = "val/kv_loss/{}/layer"
LOSSES = ("ce_loss", "answer_ce", "perplexity", "kv_loss")
# The parts of a step in the order of a table, in milliseconds.
PARTS = ("fetch", "wait", "decode", "align", "forward", "backward", "optimizer", "step")


class IncompleteError(KVDistillError):
    """A run is missing or not finished."""


@dataclass(frozen=True, slots=True)
class RealRunResult:
    """What one training run showed.

    Attributes:
        name: of the run.
        held_out: the losses `ce_loss`, `answer_ce`, `perplexity` and `kv_loss` on held-out records.
        explained: explained variance by tensor and student layer, when the alignment was fitted before the first step.
        explained_after: 1 - normalised error by tensor and student layer, after training, on held-out records.
        milliseconds: medians of a step's parts. `fetch` runs in the background; `wait` is what is left of it.
        peak_memory_mb: of the training process.
        stall_fraction: share of the time spent waiting; None without a teacher.
        bytes_per_sample: encoded K/V; None without a teacher.
        cache_bytes_per_sample: all layers' K/V of the text in bf16, without a codec; None without a teacher.
        seconds: of the whole run, with start and validation.
    """

    name: str
    held_out: Mapping[str, float]
    explained: Mapping[str, list[float | None]]
    explained_after: Mapping[str, list[float]]
    milliseconds: Mapping[str, float]
    peak_memory_mb: float
    stall_fraction: float | None
    bytes_per_sample: float | None
    cache_bytes_per_sample: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class RealResults:
    """The values of the report. `arms` and `latent`: runs by arm, the arms' one per seed."""

    seeds: tuple[int, ...]
    arms: Mapping[str, list[RealRunResult]]
    latent: Mapping[str, RealRunResult]
    served: list[dict[str, Any]]
    replay: Replay
    server_mb: float
    evaluation: Mapping[str, Any]
    extracted: Mapping[str, Any]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    seconds: Mapping[str, float]

    @property
    def served_error(self) -> float:
        """The largest relative difference of any layer, sent as fp32."""
        (raw,) = (one for one in self.served if one["codec"] == "raw")
        return max(max(layers) for layers in raw["relative_KL"])

    @property
    def works(self) -> bool:
        """Whether served K/V equal transformers' and the replay repeats the recording. No condition on learning."""
        return self.served_error <= MOST_SERVED_ERROR and self.replay.matches

    def perplexities(self, arm: str) -> list[float]:
        """The held-out perplexity of an arm by seed."""
        return [run.held_out["perplexity"] for run in self.arms[arm]]

    def as_json(self) -> dict[str, Any]:
        """The content of real.json."""
        return asdict(self) | {"works": self.works, "served_error": self.served_error}


def gather(paths: RealPaths, seeds: Sequence[int], **rest: Any) -> RealResults:
    """Reads all runs. `rest`: the fields of `RealResults` that are not read from files.

    Raises:
        IncompleteError, ResultError: a run is not finished.
    """
    runs = paths.runs
    batch = int(rest["settings"]["batch"])
    return RealResults(
        seeds=tuple(seeds),
        arms={arm: [gather_run(runs, f"{arm}-seed{seed}", batch) for seed in seeds] for arm in ARMS},
        latent={arm: gather_run(runs, arm, batch) for arm in LATENT_ARMS},
        replay=gather_replay(runs),
        evaluation=_json(runs.output / "eval.json"),
        extracted=_json(runs.output / "extracted" / "train_kv.report.json"),
        **rest,
    )


def run_result(directory: Path) -> dict[str, Any] | None:
    """The result.json of a run, None if there is none."""
    path = directory / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def gather_run(paths: DemoPaths, name: str, batch: int) -> RealRunResult:
    """Reads one run of `batch` records per step.

    Raises:
        IncompleteError, ResultError: it is not finished.
    """
    run, result = finished(paths.run(name)), run_result(paths.run(name))
    if result is None or "key" not in result:
        raise IncompleteError(f"{paths.run(name)} is not finished; run the command again")
    found = summary(run)
    taught = bool(found["alignment"])
    return RealRunResult(
        name=name,
        held_out={loss: run.validation[f"val/{loss}"] for loss in LOSSES if f"val/{loss}" in run.validation},
        explained=found["alignment"][TEACHER]["explained_variance"] if taught else {},
        explained_after=explained_by_layer(run),
        milliseconds=_milliseconds(run, result["step_seconds"], batch),
        peak_memory_mb=found["peak_memory_mb"]["rank0"],
        stall_fraction=found["stall_fraction"] if taught else None,
        bytes_per_sample=found["bytes_per_sample"] if taught else None,
        cache_bytes_per_sample=found["raw_bf16_bytes_per_sample"] if taught else None,
        seconds=result["seconds"],
    )


def explained_by_layer(run: Run) -> dict[str, list[float]]:
    """The last held-out explained variance of keys and of values, by student layer; empty without a KV loss."""
    found: dict[str, list[float]] = {}
    for tensor in TENSORS:
        prefix = _BY_LAYER.format(tensor)
        # Layers are logged in ascending order.
        values = [1 - run.series(prefix + layer)[-1][1] for layer in run.names(prefix)]
        if values:
            found[tensor] = values
    return found


def _milliseconds(run: Run, measured: Mapping[str, float], batch: int) -> dict[str, float]:
    speeds = [value for _, value in run.series("train/samples_per_second")]
    parts = {name: 1000 * value for name, value in measured.items()}
    parts["step"] = 1000 * batch / statistics.median(speeds[SKIPPED_STEPS:] or speeds)
    for name, metric in (("wait", "kv/stall_s"), ("decode", "kv/decode_s"), ("align", "kv/align_s")):
        values = [1000 * value for _, value in run.series(metric)]
        if values:
            parts[name] = statistics.median(values[SKIPPED_STEPS:] or values)
    stages = stages_ms(run, 1)
    if stages:
        parts["fetch"] = sum(stages[name] for name in ("queue", "prefill", "encode", "network") if name in stages)
    return {name: parts[name] for name in PARTS if name in parts}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise IncompleteError(f"{path} is missing; run the command again")
    return json.loads(path.read_text(encoding="utf-8"))
