"""The arms of `benchmarks.train_step`: what each of them trains, and which of them are compared."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from align.layer_map import LayerMapper
from benchmarks.train_step_process import Job
from data.records import write_records
from data.synthetic import ChainTask, make_splits
from experiments.demo.tokenizers import build_tokenizer

KVMode = Literal["text", "online", "record", "offline"]
_KV_MODES: tuple[KVMode, ...] = ("text", "online", "record", "offline")

LATENTS = 8
PASSES = 3
LORA = {"r": 16, "alpha": 32, "dropout": 0.0, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train. `kv`: where K/V come from; `text` is training without a teacher."""

    kind: Literal["kvdistill", "plain", "in_process"] = "kvdistill"
    mode: Literal["token", "latent"] = "token"
    kv: KVMode = "text"
    lora: bool = False


def _arms() -> Iterator[tuple[str, Arm]]:
    """Every arm by name. A recording precedes the arm that replays it."""
    for lora, end in ((False, ""), (True, "_lora")):
        yield f"plain{end}", Arm("plain", lora=lora)
        yield f"in_process{end}", Arm("in_process", lora=lora)
        for kv in _KV_MODES:
            yield f"{kv}{end}", Arm(kv=kv, lora=lora)
        for kv in _KV_MODES:
            yield f"latent_{kv}{end}", Arm(mode="latent", kv=kv, lora=lora)


ARMS: dict[str, Arm] = dict(_arms())
# Arms whose steps are compared: the first is divided by the second, with all weights and with LoRA.
COMPARED = (
    ("online", "offline"),
    ("record", "offline"),
    ("latent_online", "latent_offline"),
    ("online", "plain"),
    ("text", "plain"),
    ("online", "in_process"),
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama model with heads of 32 dimensions, four query heads per KV head."""

    layers: int
    hidden: int
    intermediate: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the benchmark.

    Attributes:
        student: shape of the student.
        teacher: shape of the teacher, with about four times the student's parameters.
        vocabulary: of both.
        fillers: words in a record's reasoning beside the numbers; a record has about 45 tokens more.
        records: training records.
        calibration: records on which alignments are fitted.
        steps: of each arm in each round.
        batch: records in a step.
        rounds: in each of them every arm runs once.
        supply_steps: of each arm with a delayed teacher.
    """

    student: Shape = Shape(8, 256, 640)
    teacher: Shape = Shape(16, 512, 1536)
    vocabulary: int = 49152
    fillers: int = 40
    records: int = 512
    calibration: int = 16
    steps: int = 7
    batch: int = 4
    rounds: int = 3
    supply_steps: int = 20


FULL = Sizes()
QUICK = Sizes(
    student=Shape(6, 128, 384),
    teacher=Shape(12, 256, 1024),
    vocabulary=16384,
    fillers=32,
    records=256,
    calibration=8,
    steps=6,
    rounds=1,
    supply_steps=16,
)
# Weights, gradients and moments take more memory than activations, as in real training.
MEMORY = Sizes(
    student=Shape(8, 512, 1536),
    teacher=Shape(10, 1024, 2816),
    vocabulary=16384,
    fillers=16,
    records=64,
    calibration=16,
    steps=3,
    batch=2,
    rounds=1,
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Models and data on disk."""

    student: Path
    teacher: Path
    data: Path

    def student_layers(self) -> int:
        """The student's number of layers."""
        return AutoConfig.from_pretrained(self.student).num_hidden_layers

    def compared_layers(self) -> list[int]:
        """The teacher's layers that are compared, one per student layer."""
        layers = AutoConfig.from_pretrained(self.teacher).num_hidden_layers
        return list(LayerMapper(layers, self.student_layers(), "uniform").layers_needed)


def make_inputs(folder: Path, sizes: Sizes) -> Inputs:
    """Writes models with random weights, and records."""
    folder.mkdir(parents=True, exist_ok=True)
    records = make_splits(ChainTask(operations=14, fillers=sizes.fillers), sizes.records, 1, 1, seed=0).train
    write_records(folder / "train.jsonl", records)
    tokenizer = build_tokenizer("student", records)
    for name, shape in (("student", sizes.student), ("teacher", sizes.teacher)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=sizes.vocabulary,
            num_hidden_layers=shape.layers,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.hidden // 32,
            num_key_value_heads=max(1, shape.hidden // 128),
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(str(folder / name))
    return Inputs(folder / "student", folder / "teacher", folder / "train.jsonl")


@dataclass(frozen=True, slots=True)
class Runs:
    """Makes the jobs of arms, which write into `folder`."""

    inputs: Inputs
    sizes: Sizes
    folder: Path

    def job(self, name: str, arm: Arm, endpoint: str, steps: int) -> Job:
        """What the process of an arm runs. An arm that records starts with an empty store.

        Args:
            name: of the run's folder, which is removed.
            arm: what it trains.
            endpoint: of its teacher.
            steps: optimiser steps.
        """
        shutil.rmtree(self.folder / "runs" / name, ignore_errors=True)
        if arm.kv == "record":
            shutil.rmtree(self._store(arm), ignore_errors=True)
        inside = arm.kind == "in_process"
        teacher, layers = (str(self.inputs.teacher), self.inputs.compared_layers()) if inside else ("", [])
        return Job(
            arm.kind, self._student(arm) | self._run(name, steps) | self._teacher(arm, endpoint), teacher, layers
        )

    def _store(self, arm: Arm) -> Path:
        return self.folder / f"store_{arm.mode}{'_lora' * arm.lora}"

    def _student(self, arm: Arm) -> dict[str, Any]:
        student: dict[str, Any] = {"path": str(self.inputs.student), "mode": arm.mode}
        if arm.mode == "latent":
            student |= {"latents": LATENTS, "passes": PASSES}
        if arm.lora:
            student["lora"] = LORA
        return {"student": student, "data": {"train": str(self.inputs.data), "max_tokens": 1024}}

    def _run(self, name: str, steps: int) -> dict[str, Any]:
        batch = self.sizes.batch
        sizes = {"steps": steps, "global_batch": batch, "micro_batch": batch, "zero_stage": 0, "log_every": 1}
        return {"run": {"output_dir": str(self.folder / "runs" / name), **sizes}}

    def _teacher(self, arm: Arm, endpoint: str) -> dict[str, Any]:
        if arm.kv == "text":
            return {}
        selection: dict[str, Any] = {"selector": "full", "span": "all"}
        if arm.mode == "latent":
            selection = {"selector": "right", "budget": LATENTS, "span": "reasoning"}
        samples = self.sizes.calibration
        return {
            "teachers": [{"name": "teacher", "endpoints": [] if arm.kv == "offline" else [endpoint]}],
            "kv": {"mode": arm.kv, "store": str(self._store(arm)), "selection": selection},
            "align": {"direction": "to_teacher", "layer_map": "uniform", "calibration_samples": samples},
            "loss": {"kv_weight": 1.0},
        }
