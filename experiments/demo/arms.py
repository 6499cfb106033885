"""Runs several trainings in one torchrun launch: `torchrun ... -m experiments.demo.arms PLAN.json`.

The plan is a list of runs, each with a name, a configuration of `kvdistill train`, and a file of test items or null.
After each run its best model is loaded from disk and answers the test items.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.collate import Collator
from data.records import load_records
from experiments.demo.demo_config import PROGRESS
from kvcore.config import parse
from kvcore.files import write_json
from student_trainer.config import TrainConfig
from student_trainer.loop import ds_engine, trainer
from student_trainer.loop.greedy_answers import answer, is_correct, mean_over_ranks, rank_batches
from student_trainer.model.latent import LatentStudent, load_reasoning
from student_trainer.model.pretrained import load_pretrained

_TEST_BATCH = 250


def main(plan: Path) -> None:
    """Runs the plan; writes `result.json` into each run's directory."""
    runs: list[dict[str, Any]] = json.loads(plan.read_text(encoding="utf-8"))
    try:
        for run in runs:
            run_arm(run["name"], parse(run["config"], TrainConfig), run["test"])
    finally:
        ds_engine.stop()


def run_arm(name: str, config: TrainConfig, test: str | None = None) -> None:
    """Trains one run, answers the test items if there are any, and writes `result.json` into the run's directory."""
    rank, _ = ds_engine.start(config.run.seed)
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", force=True)
    began = time.monotonic()
    if rank == 0:
        print(f"{PROGRESS}{name}", flush=True)
    summary = trainer.run(config)
    result: dict[str, Any] = {"test_accuracy": None}
    outcome = f"{summary['steps']} steps"
    if test is not None:
        result["test_accuracy"] = _test_accuracy(config, Path(test))
        outcome = f"{result['test_accuracy']:.1%} of the test items"
    result["seconds"] = time.monotonic() - began
    if rank == 0:
        write_json(config.run.output_dir / "result.json", result)
        print(f"{PROGRESS}{name}: {outcome}, {result['seconds']:.0f} s", flush=True)


@torch.no_grad()
def _test_accuracy(config: TrainConfig, test: Path) -> float:
    """The share of test items that the saved best model answers correctly after its latents. Ranks share the items."""
    directory, student = config.run.output_dir / "best_model", config.student
    lm, tokenizer = load_pretrained(str(directory), "fp32", "run.output_dir")
    reasoning = load_reasoning(lm, directory, student.latents, student.passes, projects=student.projection)
    assert reasoning is not None, "the trainer saves latents with the model"
    model = LatentStudent(lm, reasoning).eval()
    collator = Collator(tokenizer, config.data.max_tokens)
    records, longest = load_records(test), config.data.answer_tokens
    assert longest is not None, "the demo's arms set it"
    totals = {"count": 0.0, "accuracy": 0.0}
    for indices, counted in rank_batches(len(records), _TEST_BATCH, dist.get_rank(), dist.get_world_size()):
        chosen = [records[index] for index in indices]
        completions = answer(model, collator, tokenizer, chosen, longest, ds_engine.device(), latent=True)
        correct = [
            is_correct(given.text, record, latent=True) for given, record in zip(completions, chosen, strict=True)
        ]
        totals["count"] += counted
        totals["accuracy"] += sum(correct[:counted])
    return mean_over_ranks(totals, ds_engine.device())["accuracy"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
