"""What `experiments/train_multi_teacher_kv.py` takes, as flags or in a YAML file. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvcore.config import StrictModel

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]

FusionKind = Literal["fixed", "similarity", "learnable"]
# Stages of three-stage routing, in order: the folder of each, and its way of fusing.
STAGES: tuple[tuple[str, FusionKind], ...] = (
    ("stage1_fixed", "fixed"),
    ("stage2_similarity", "similarity"),
    ("stage3_learnable", "learnable"),
)
# The guide's mix of datasets, by the name that it has there.
MIX = "multi_reasoning_cot_direct"
# How many records datasets give where no number is asked for.
TRAIN_SAMPLES, VAL_SAMPLES = 15000, 2000


class RecipeSettings(StrictModel):
    """One run of the recipe: every field is a flag of the same name."""

    student_model_name_or_path: Annotated[str, Field(min_length=1)]
    student_mode: Literal["latent", "token"] = "latent"
    num_latents: Positive = 24
    latent_passes: Positive = 3
    bf16: bool = True
    gradient_checkpointing: bool = True

    teacher_models: Annotated[tuple[str, ...], Field(min_length=1)]
    num_teachers: Positive | None = None
    teacher_endpoints: tuple[str, ...] = ()
    teacher_device: str = "auto"
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    dataset_name: Annotated[tuple[str, ...], Field(min_length=1)] = (MIX,)
    train_samples: Positive | None = None
    val_samples: Positive | None = None
    use_extended_datasets: bool = True
    math23k_ratio: Share = 0.2
    data_dir: Path | None = None
    max_length: Positive = 2048
    prepare_only: bool = False

    train_phase: Literal["1", "2", "3", "all"] | None = None
    fusion_strategy: FusionKind | None = None
    fixed_weights: tuple[Weight, ...] = ()
    similarity_metric: Literal["cosine", "dot", "euclidean"] = "cosine"
    temperature: Weight | None = None
    router_type: Literal["mlp", "gate", "attention"] = "mlp"
    router_hidden_dim: Positive = 256
    entropy_reg_weight: Annotated[float, Field(ge=0.0)] = 0.01

    kv_mode: Literal["online", "offline", "record"] = "online"
    kv_store: Path | None = None
    kv_compression: Literal["full", "right", "r-kv"] = "right"
    kv_loss_type: Literal["mse", "smooth_l1", "cosine", "cka"] = "smooth_l1"
    kv_loss_weight: Annotated[float, Field(ge=0.0)] | Literal["auto"] = "auto"
    layer_map_strategy: Literal["ratio", "uniform", "last", "skip", "cka", "learned"] = "ratio"
    head_adapt_strategy: Literal["ridge", "procrustes", "pool", "linear", "identity"] = "ridge"
    rope_scaling: bool = True
    calibration_samples: Positive = 512

    learning_rate: Weight = 2e-5
    warmup_ratio: Share = 0.1
    max_grad_norm: Weight = 1.0
    per_device_train_batch_size: Positive = 2
    gradient_accumulation_steps: Positive = 16
    num_train_epochs: Positive = 3
    max_steps: Positive | None = None
    zero_stage: Literal[0, 1, 2, 3] = 2
    seed: int = 0

    output_dir: Path
    eval_steps: NotNegative = 500
    save_steps: NotNegative = 1000
    logging_steps: Positive = 50
    answer_tokens: Positive = 32
    metric_for_best_model: Literal["accuracy", "loss", "kv_loss", "eval_accuracy", "eval_loss", "eval_kv_loss"] = (
        "accuracy"
    )

    @property
    def teachers(self) -> tuple[str, ...]:
        """The models that teach: the first `num_teachers` of those named."""
        return self.teacher_models[: self.num_teachers]

    @property
    def fusion(self) -> FusionKind:
        """How teachers are fused where there is one stage."""
        if self.train_phase in (None, "all"):
            return self.fusion_strategy or "fixed"
        return STAGES[int(self.train_phase) - 1][1]

    @property
    def store(self) -> Path | None:
        """Where K/V are recorded or read."""
        return None if self.kv_mode == "online" else self.kv_store or self.output_dir / "kv_store"

    @model_validator(mode="after")
    def _teachers_agree(self) -> Self:
        if self.num_teachers is not None and self.num_teachers > len(self.teacher_models):
            raise ValueError(
                f"num_teachers: {self.num_teachers} asked for, and teacher_models names {len(self.teacher_models)}"
            )
        if self.fixed_weights and len(self.fixed_weights) != len(self.teachers):
            raise ValueError(
                f"fixed_weights: {len(self.teachers)} teachers need as many weights, got {len(self.fixed_weights)} "
                "(a comma inside sbatch --export ends a value: separate weights by spaces there)"
            )
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_4bit: weights are read in 8 or in 4 bits, not both")
        if self.teacher_endpoints and (self.load_in_8bit or self.load_in_4bit):
            raise ValueError(
                "teacher_endpoints: servers that run already have loaded their weights; quantise there "
                "(kvdistill serve --load-in-8bit) and leave load_in_8bit and load_in_4bit out"
            )
        if self.teacher_endpoints and self.kv_mode == "offline":
            raise ValueError("teacher_endpoints: kv_mode 'offline' asks no teacher")
        return self

    @model_validator(mode="after")
    def _phase_agrees(self) -> Self:
        if self.train_phase is not None and self.fusion_strategy is not None:
            if self.train_phase == "all":
                raise ValueError("fusion_strategy: train_phase 'all' runs all three; leave one of them out")
            if self.fusion_strategy != self.fusion:
                raise ValueError(
                    f"fusion_strategy: train_phase {self.train_phase} is '{self.fusion}', got '{self.fusion_strategy}'"
                )
        if not self.rope_scaling:
            raise ValueError(
                "rope_scaling: keys travel without their rotation, undone by each teacher's own rope parameters, so "
                "models with different ones compare exactly; there is nothing to switch off"
            )
        return self
