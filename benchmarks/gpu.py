"""Checks and measures a GPU in at most 8 minutes: served K/V in bf16, then a student trained from a larger teacher.

All weights are random, so nothing is downloaded. The student has the shape of Qwen2.5-1.5B and gets LoRA adapters, the
teacher that of Qwen2.5-7B; both run on the first GPU, which needs 40 GB. Prints one JSON object as its last line; what
is known earlier goes to stderr.

- `served`: the norm of the difference over the norm, for the worst layer, between served K/V, transformers in bf16, and
  transformers in fp32. The first two should be equally far from the third.
- `training`: 50 steps in token mode and in latent mode: speed, waiting, memory of the trainer and of the device.

Examples:
  python -m benchmarks.gpu
  python -m benchmarks.gpu --steps 20 --global-batch 64
  CUDA_VISIBLE_DEVICES= python -m benchmarks.gpu --tiny     # checks the script on a CPU
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen2Config

from benchmarks.train_step_process import Job, measured
from data.records import write_records
from data.synthetic import ChainTask, make_splits
from experiments.demo.tokenizers import build_tokenizer
from experiments.real.served_kv import compare_caches, compare_served
from student_trainer.launching.local_teachers import LocalTeachers

RECORDS = 4096
COMPARED_TEXTS = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen2 model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool


STUDENT = Shape(28, 1536, 8960, 12, 2, 151936, tied=True)
TEACHER = Shape(28, 3584, 18944, 28, 4, 152064, tied=False)
TINY_STUDENT = Shape(2, 64, 128, 4, 2, 1024, tied=True)
TINY_TEACHER = Shape(3, 96, 192, 6, 2, 1024, tied=False)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the training runs."""

    steps: int
    global_batch: int
    micro_batch: int
    latents: int
    calibration: int


class GpuBench:
    """Models, data and runs in one folder.

    Args:
        folder: of everything that it writes; models and students take 25 GB.
        sizes: of the runs.
        tiny: whether the models are tiny.
    """

    def __init__(self, folder: Path, sizes: Sizes, *, tiny: bool) -> None:
        self._folder, self._sizes = folder, sizes
        self._device = "cuda:0" if torch.cuda.is_available() else "cpu"
        self._shapes = {
            "student": TINY_STUDENT if tiny else STUDENT,
            "teacher": TINY_TEACHER if tiny else TEACHER,
        }
        # Without LoRA's default rank of 128, which a tiny model does not have.
        self._lora = {"r": 8} if tiny else {}
        self._texts: list[str] = []

    def prepare(self) -> None:
        """Writes models and data."""
        records = make_splits(ChainTask(operations=14, fillers=64), RECORDS, 1, 1, seed=0).train
        write_records(self._folder / "train.jsonl", records)
        self._texts = [record.text for record in records[:COMPARED_TEXTS]]
        tokenizer = build_tokenizer("teacher_a", records)
        for name, shape in self._shapes.items():
            _save_random(self._folder / name, shape, tokenizer, self._device)

    def served(self) -> dict[str, Any]:
        """Differences of the student's shape, served in bf16 and read by transformers."""
        model = self._folder / "student"
        with self._servers({"student": model}) as endpoints:
            arguments = (endpoints["student"], model, self._texts, ("raw",))
            (half,) = compare_served(*arguments, dtype=torch.bfloat16, device=self._device)
            (whole,) = compare_served(*arguments, dtype=torch.float32, device=self._device)
        floor = compare_caches(model, self._texts, torch.bfloat16, torch.float32, device=self._device)
        _release()
        return {
            "served_to_transformers_bf16": half.worst_relative,
            "served_to_transformers_fp32": whole.worst_relative,
            "transformers_bf16_to_fp32": floor.worst_relative,
        }

    def training(self) -> dict[str, Any]:
        """Trains in token mode and in latent mode from one server."""
        found: dict[str, Any] = {}
        with self._servers({"teacher": self._folder / "teacher"}) as endpoints:
            found["teacher_device_gib"] = _used_gib()
            for mode in ("token", "latent"):
                found[mode] = self._train(mode, endpoints["teacher"])
                _say({mode: found[mode]})
        return found

    def _servers(self, models: Mapping[str, Path]) -> LocalTeachers:
        named = {name: str(path) for name, path in models.items()}
        return LocalTeachers(named, self._folder / "logs", device=self._device, dtype="bf16", ready_seconds=300)

    def _train(self, mode: str, endpoint: str) -> dict[str, Any]:
        found = measured(Job("kvdistill", self._config(mode, endpoint)), self._folder / f"{mode}.log")
        return {
            "samples_per_s": self._sizes.global_batch / found["step"],
            "teacher_tokens_per_s": found["teacher_tokens_per_second"],
            "stall_fraction": found["stall_fraction"],
            "bytes_per_sample": found["bytes_per_sample"],
            "step_ms": 1000 * found["step"],
            "parts_ms": {name: 1000 * value for name, value in found["parts"].items()},
            "trainer_gib": found["device_peak_mib"] / 1024,
            "trainer_host_mib": found["peak_mib"],
        }

    def _config(self, mode: str, endpoint: str) -> dict[str, Any]:
        sizes = self._sizes
        latent = {"selector": "right", "budget": sizes.latents, "span": "reasoning"}
        return {
            "student": {
                "path": str(self._folder / "student"),
                "dtype": "bf16",
                "mode": mode,
                "latents": sizes.latents,
                "lora": self._lora,
            },
            "teachers": [{"name": "teacher", "endpoints": [endpoint]}],
            "kv": {"selection": latent if mode == "latent" else {"selector": "full", "span": "all"}},
            "align": {"direction": "to_teacher", "layer_map": "uniform", "calibration_samples": sizes.calibration},
            "data": {"train": str(self._folder / "train.jsonl")},
            "run": {
                "output_dir": str(self._folder / f"run_{mode}"),
                "steps": sizes.steps,
                "global_batch": sizes.global_batch,
                "micro_batch": sizes.micro_batch,
                "log_every": 1,
            },
        }


def _save_random(directory: Path, shape: Shape, tokenizer: PreTrainedTokenizerBase, device: str) -> None:
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    # In bf16 from the start: the teacher takes 30 GB in fp32.
    with torch.device(device):
        lm: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lm.save_pretrained(directory)
    tokenizer.save_pretrained(str(directory))
    del lm
    _release()


def _release() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _used_gib() -> float | None:
    """Memory in use on the device, by all processes; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def _say(found: Mapping[str, Any]) -> None:
    sys.stderr.write(json.dumps(found) + "\n")
    sys.stderr.flush()


def main() -> None:
    """Parses the arguments, runs both parts and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models and few steps, to check the script on a CPU")
    parser.add_argument("--steps", type=int, help="optimiser steps in each mode; 50 by default")
    parser.add_argument("--global-batch", type=int, default=32, help="samples per step; default: %(default)s")
    parser.add_argument("--micro-batch", type=int, default=16, help="samples per forward pass; default: %(default)s")
    parser.add_argument("--folder", type=Path, help="folder for models and runs; a temporary one by default")
    given = parser.parse_args()
    if not torch.cuda.is_available() and not given.tiny:
        parser.error("there is no GPU; --tiny checks the script on a CPU")
    steps, calibration, latents = (4, 16, 8) if given.tiny else (50, 256, 24)
    sizes = Sizes(given.steps or steps, given.global_batch, given.micro_batch, latents, calibration)
    if given.folder is not None:
        given.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    began = time.monotonic()
    try:
        bench = GpuBench(folder, sizes, tiny=given.tiny)
        bench.prepare()
        result: dict[str, Any] = {
            "benchmark": "gpu",
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "tiny": given.tiny,
            "sizes": asdict(sizes),
            "prepare_s": time.monotonic() - began,
            "served": bench.served(),
        }
        _say(result)
        result["training"] = bench.training()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result["total_s"] = time.monotonic() - began
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
