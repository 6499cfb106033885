"""One training run of `benchmarks.train_step` or `benchmarks.gpu`, in a process of its own.

Steps are timed between the ends of the optimiser's steps. All kinds of runs read the same batches.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import LlamaForCausalLM, LlamaModel, Qwen2ForCausalLM, Qwen2Model

from benchmarks.train_step_references import TeacherInside, train_in_process, train_plain
from experiments.real.real_config import SKIPPED_STEPS
from experiments.real.step_clock import StepClock, StepTimes
from kvcore.config import parse
from kvcore.errors import KVDistillError
from kvcore.monitoring.process_memory import peak_memory_mib
from student_trainer.config import TrainConfig
from student_trainer.launching.processes import tail
from student_trainer.loop import ds_engine, trainer
from student_trainer.model.distill_model import DistillModel

_BODIES = (LlamaModel, Qwen2Model)
_MODELS = {
    "kvdistill": (DistillModel,),
    "plain": (LlamaForCausalLM, Qwen2ForCausalLM),
    "in_process": (TeacherInside,),
}
_FETCH = ("queue", "prefill", "encode", "network")
# Forked from a process that has imported this module, so that a short run does not begin with seconds of imports.
_SERVER_PRELOAD = ["benchmarks.train_step_process"]


class BenchmarkError(KVDistillError):
    """A measured process failed."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one process measures.

    Attributes:
        kind: `kvdistill`: the trainer with `config`; `plain`: supervised fine-tuning by transformers' Trainer;
            `in_process`: the same with a loss on the K/V of a teacher in this process.
        config: of `kvdistill train`; the other kinds take the student, data, sizes and LoRA adapter from it.
        teacher: directory of the teacher, for `in_process`.
        layers: teacher layers that it compares, one per student layer.
    """

    kind: Literal["kvdistill", "plain", "in_process"]
    config: dict[str, Any]
    teacher: str = ""
    layers: Sequence[int] = ()


def measured(job: Job, log: Path, *, forked: bool = False) -> dict[str, Any]:
    """Runs a job in a new process, with its output in `log`.

    Args:
        job: what to measure.
        log: file for the process's output.
        forked: fork a process that never used a GPU; otherwise start Python anew.

    Returns:
        Seconds, medians over the steps: `step`, `cpu` (CPU time of all threads), `parts` of one micro-batch, `passes`
        of the student's body, and `fetch`, what a batch took at the teacher and on the way, beside the steps.
        `stall_share`: waiting over all steps' time, with one micro-batch per step. MiB up to the last step:
        `peak_mib`, and `grown_mib` since the imports. `kvdistill` adds figures of the run's summary.

    Raises:
        BenchmarkError: the process failed; with the end of its log.
    """
    context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
    if forked:
        context.set_forkserver_preload(_SERVER_PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(job, log, sender), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        process.join()
        raise BenchmarkError(
            f"{log.stem} ended with code {process.exitcode}; the end of its log:\n{tail(log)}"
        ) from error
    finally:
        receiver.close()
        process.join()


def _send(job: Job, log: Path, sender: Connection) -> None:
    with log.open("w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    logging.basicConfig(level=logging.WARNING)
    sender.send(_measure(job))


def _measure(job: Job) -> dict[str, Any]:
    config = parse(job.config, TrainConfig)
    if job.kind != "plain":
        ds_engine.start(config.run.seed)
    before = peak_memory_mib()
    peaks = [before]
    found: dict[str, Any] = {}
    stages: dict[str, list[float]] = {}
    with contextlib.ExitStack() as undo:
        undo.callback(ds_engine.stop)
        # A run that has ended saves its model, and not every kind does.
        undo.callback(register_optimizer_step_post_hook(lambda *_: peaks.append(peak_memory_mib())).remove)
        clock = undo.enter_context(StepClock(_MODELS[job.kind], *_BODIES))
        match job.kind:
            case "kvdistill":
                summary = trainer.run(config)
                totals = ("bytes_per_sample", "stall_fraction", "teacher_tokens_per_second")
                found = {name: summary[name] for name in totals}
                stages = _stages(config.run.output_dir / "metrics.jsonl")
            case "plain":
                train_plain(config)
            case "in_process":
                train_in_process(config, job.teacher, job.layers)
    return found | _times(clock.times, stages) | _memory(before, peaks[-1])


def _memory(before: float, peak: float) -> dict[str, float]:
    """MiB, on the host and on the GPU."""
    device = torch.cuda.max_memory_reserved() / 2**20 if torch.cuda.is_available() else 0.0
    return {"peak_mib": peak, "grown_mib": peak - before, "device_peak_mib": device}


def _stages(metrics: Path) -> dict[str, list[float]]:
    """Seconds of each step by stage, as the trainer logs them if `run.log_every` is 1; empty without a teacher."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "kv/stall_s" in line]
    stages = {name: [line[f"kv/{name}_s"] for line in steps] for name in ("stall", "decode", "align")} if steps else {}
    if steps and "kv/network_s" in steps[0]:
        stages["fetch"] = [sum(line[f"kv/{name}_s"] for name in _FETCH) for line in steps]
    return stages


def _times(times: StepTimes, stages: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians over the steps after the first ones, in which memory is allocated."""
    parts = {"wait": stages.get("stall"), "decode": stages.get("decode"), "align": stages.get("align")}
    parts |= {"forward": times.forward, "backward": times.backward, "optimizer": times.optimizer}
    if "align" in stages:
        parts["forward"] = [all_s - align_s for all_s, align_s in zip(times.forward, stages["align"], strict=True)]
    steps, cpu = (
        _settled([after - before for before, after in itertools.pairwise(ends)])
        for ends in (times.ends, times.cpu_ends)
    )
    found: dict[str, Any] = {
        "step": statistics.median(steps),
        "cpu": statistics.median(cpu),
        "parts": {name: statistics.median(_settled(values)) for name, values in parts.items() if values},
        "passes": times.median_passes(),
    }
    if stages:
        found["fetch"] = statistics.median(_settled(stages["fetch"]))
        # As many steps as have a duration: the first one has none.
        found["stall_share"] = sum(stages["stall"][-len(steps) :]) / sum(steps)
    return found


def _settled(values: Sequence[float]) -> Sequence[float]:
    return values[SKIPPED_STEPS:] or values
