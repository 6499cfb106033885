"""Builds a run's context on each rank, and prints how much memory that took: `torchrun ... CONFIG.json OUTPUT`.

The peak is that of the process, so each launch measures one configuration.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from kvcore.config import parse
from kvcore.files import write_json
from kvcore.monitoring.process_memory import peak_memory_mib
from student_trainer.config import TrainConfig
from student_trainer.loop import ds_engine
from student_trainer.loop.training_context import build_context


def main(config: Path, output: Path) -> None:
    """Writes OUTPUT/rank<N>.json: bytes of parameters after loading, and the growth of the peak of memory in bytes."""
    settings = parse(json.loads(config.read_text(encoding="utf-8")), TrainConfig)
    rank, world_size = ds_engine.start(0)
    (torch.ones(8, 8) @ torch.ones(8, 8)).sum()
    before = peak_memory_mib()
    context = build_context(settings, rank, world_size)
    try:
        held = [getattr(p, "ds_tensor", p) for p in context.model.student.lm.parameters()]
        found = {
            "held": sum(part.numel() * part.element_size() for part in held),
            "peak": (peak_memory_mib() - before) * 2**20,
        }
        write_json(output / f"rank{rank}.json", found)
    finally:
        context.close()
        ds_engine.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
