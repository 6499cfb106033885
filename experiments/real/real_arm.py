"""Trains one run in this process: `python -m experiments.real.real_arm JOB.json`.

The job has a name, a configuration of `kvdistill train`, and a key. The run's directory gets `result.json` with that
key and the parts of a step.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from transformers import LlamaModel

from experiments.demo.arms import run_arm
from experiments.real.step_clock import StepClock
from kvcore.config import parse
from kvcore.files import write_json
from student_trainer.config import TrainConfig
from student_trainer.loop import ds_engine
from student_trainer.model.distill_model import DistillModel


def main(path: Path) -> None:
    """Runs the job."""
    job: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config = parse(job["config"], TrainConfig)
    out = config.run.output_dir
    shutil.rmtree(out, ignore_errors=True)  # An unfinished run starts over.
    try:
        with StepClock(DistillModel, LlamaModel) as clock:
            run_arm(job["name"], config)
    finally:
        ds_engine.stop()
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    # A result with a key is that of a finished run.
    write_json(out / "result.json", result | {"step_seconds": clock.times.medians(), "key": job["key"]})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
