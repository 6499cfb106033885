"""The configuration of `experiments/train_multi_teacher_kv.py`. Imports no torch, so that `--help` is fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from kvcore.config import (
    Alias,
    Device,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Port,
    PositiveFloat,
    PositiveInt,
    Seed,
    StrictModel,
    Text,
    Variable,
)
from kvcore.flags import FlagSet

FusionKind = Literal["fixed", "similarity", "learnable"]
# Stages of three-stage routing, in order: the folder and the fusion of each.
STAGES: tuple[tuple[str, FusionKind], ...] = (
    ("stage1_fixed", "fixed"),
    ("stage2_similarity", "similarity"),
    ("stage3_learnable", "learnable"),
)
# The guide's name of its mix of datasets.
MIX = "multi_reasoning_cot_direct"
# Default numbers of records of datasets.
TRAIN_SAMPLES, VAL_SAMPLES = 15000, 2000


class RecipeSettings(StrictModel):
    """One run of the recipe. Every field is a flag, and job scripts set those with a variable."""

    headings: ClassVar = {
        "Student": "student_model_name_or_path",
        "Teachers": "teacher_models",
        "Data": "dataset_name",
        "Fusion": "train_phase",
        "Keys and values": "kv_mode",
        "Optimisation": "learning_rate",
        "Output": "output_dir",
    }

    student_model_name_or_path: Annotated[Text, Alias("student_model"), Variable("STUDENT")]
    """Directory or hub id of the student, or the best_model of an earlier run."""
    student_mode: Literal["latent", "token"] = "latent"
    """`latent` reasons in latent positions; `token` reads and writes its reasoning as text."""
    num_latents: Annotated[PositiveInt, Variable("NUM_LATENTS")] = 24
    """Number of latent positions. `right` and `r_kv` keep the same number of tokens."""
    latent_passes: PositiveInt = 3
    """Number of Jacobi passes that refine the latents."""
    bf16: Annotated[bool, Variable("USE_BF16")] = True
    """Keep the student's weights in bfloat16 instead of float32."""
    gradient_checkpointing: Annotated[bool, Variable("GRADIENT_CHECKPOINTING")] = True
    """Recompute activations in the backward pass to save memory."""

    teacher_models: Annotated[tuple[str, ...], Field(min_length=1), Variable("TEACHERS"), Variable("TEACHER_MODELS")]
    """Directories or hub ids of the teachers."""
    num_teachers: Annotated[PositiveInt | None, Variable("NUM_TEACHERS")] = None
    """Use only the first N of `teacher_models`. All by default."""
    teacher_endpoints: tuple[str, ...] = ()
    """Running servers as NAME=HOST:PORT[,HOST:PORT], where NAME is the last part of the model; or @FILE with one per
    line. By default the command starts a server for each model on this machine, and stops it at the end."""
    teacher_device: Device = "auto"
    """Device of servers that this command starts: auto, cpu, cuda or cuda:N."""
    load_in_8bit: Annotated[bool, Variable("LOAD_IN_8BIT")] = False
    """Quantise the weights of servers that this command starts to 8 bits (bitsandbytes, needs a GPU)."""
    load_in_4bit: Annotated[bool, Variable("LOAD_IN_4BIT")] = False
    """Quantise the weights of servers that this command starts to 4 bits (bitsandbytes, needs a GPU)."""
    bnb_4bit_compute_dtype: Annotated[Literal["bfloat16", "float16", "float32"], Variable("BNB_4BIT_COMPUTE_DTYPE")] = (
        "bfloat16"
    )
    """Data type of the computation with quantised weights."""

    dataset_name: Annotated[tuple[str, ...], Field(min_length=1), Variable("DATASET")] = (MIX,)
    """The guide's mix (multi_reasoning_cot_direct), names of datasets, or a directory with train and val."""
    train_samples: Annotated[PositiveInt | None, Variable("TRAIN_SAMPLES")] = None
    """Number of training records. Defaults to 15000 for datasets, and to all records of a directory."""
    val_samples: Annotated[PositiveInt | None, Variable("VAL_SAMPLES")] = None
    """Number of validation records. Defaults to 2000 for datasets, and to all records of a directory."""
    use_extended_datasets: Annotated[bool, Variable("USE_EXTENDED")] = True
    """Add math, arc_challenge and hotpotqa to the mix."""
    math23k_ratio: Annotated[Fraction, Variable("MATH23K_RATIO")] = 0.2
    """Fraction of Chinese questions in the mix."""
    data_dir: Annotated[Path | None, Variable("DATA_DIR")] = None
    """Directory of local copies of the datasets. Defaults to $KVDISTILL_DATA_DIR. Without either, datasets come from
    the hub."""
    max_length: Annotated[PositiveInt, Variable("MAX_LENGTH")] = 2048
    """Maximum length of a sample in the student's tokens."""
    prepare_only: bool = False
    """Write the data and exit."""

    train_phase: Annotated[Literal["1", "2", "3", "all"] | None, Variable("TRAIN_PHASE")] = None
    """Stage of three-stage routing: 1 fixed, 2 similarity, 3 learnable. `all` runs the three stages in order, each in
    its own folder and from the best model of the stage before."""
    fusion_strategy: Annotated[FusionKind | None, Variable("FUSION_STRATEGY")] = None
    """How teachers are fused. Defaults to the fusion of `train_phase`, and to fixed without `train_phase`."""
    fixed_weights: Annotated[tuple[PositiveFloat, ...], Variable("FIXED_WEIGHTS")] = ()
    """Weight of each teacher for `fixed`, as 0.5,0.5 or 0.5 0.5. Equal by default."""
    similarity_metric: Annotated[Literal["cosine", "dot", "euclidean"], Variable("SIMILARITY_METRIC")] = "cosine"
    """Similarity measure for `similarity`."""
    temperature: Annotated[PositiveFloat | None, Variable("TEMPERATURE")] = None
    """Softmax temperature over teachers. Defaults to 0.2 for similarity. For learnable, the default starts at 1.0 and
    falls to 0.5."""
    router_type: Annotated[Literal["mlp", "gate", "attention"], Variable("ROUTER_TYPE")] = "mlp"
    """Architecture of the router for `learnable`."""
    router_hidden_dim: Annotated[PositiveInt, Variable("ROUTER_HIDDEN_DIM")] = 256
    """Hidden size of the router."""
    entropy_reg_weight: Annotated[NonNegativeFloat, Variable("ENTROPY_REG_WEIGHT")] = 0.01
    """Weight of the router's entropy bonus, which rewards even weights."""

    kv_mode: Annotated[Literal["online", "offline", "record"], Variable("KV_MODE")] = "online"
    """`online`: from the teachers; `record`: from the teachers, and written to a store; `offline`: from the store."""
    kv_store: Annotated[Path | None, Variable("KV_STORE")] = None
    """Directory of the store. Defaults to OUTPUT_DIR/kv_store."""
    kv_compression: Annotated[Literal["full", "right", "r_kv"], Variable("KV_COMPRESSION")] = "right"
    """Tokens of the reasoning that teachers send. `full`: all, resampled to the latents; `right`: the last ones;
    `r_kv`: those with the highest R-KV score."""
    kv_loss_type: Annotated[Literal["mse", "smooth_l1", "cosine", "cka"], Variable("KV_LOSS_TYPE")] = "smooth_l1"
    """Distance between the student's K/V and the fused K/V."""
    kv_loss_weight: Annotated[NonNegativeFloat | Literal["auto"], Variable("KV_LOSS_WEIGHT")] = "auto"
    """Weight of the KV loss. `auto` makes its gradient as large as the cross-entropy's."""
    layer_map_strategy: Annotated[
        Literal["ratio", "uniform", "last", "skip", "cka", "learned"], Variable("LAYER_MAP_STRATEGY")
    ] = "uniform"
    """Teacher layers for each student layer. `learned` starts from `ratio` and is trained in a learnable stage."""
    head_adapt_strategy: Annotated[
        Literal["ridge", "procrustes", "pool", "linear", "identity"], Variable("HEAD_ADAPT_STRATEGY")
    ] = "ridge"
    """Map between heads. `linear` starts from `ridge` and is trained in a learnable stage."""
    rope_scaling: bool = True
    """Must be true: keys are compared without their rotation, so models may have different RoPE parameters."""
    calibration_samples: PositiveInt = 512
    """Number of samples on which the maps are fitted before the first step."""

    learning_rate: Annotated[PositiveFloat, Variable("LEARNING_RATE")] = 2e-5
    """Peak learning rate."""
    warmup_ratio: Annotated[Fraction, Variable("WARMUP_RATIO")] = 0.1
    """Fraction of the steps with linear warm-up."""
    max_grad_norm: Annotated[PositiveFloat, Variable("MAX_GRAD_NORM")] = 1.0
    """Norm at which gradients are clipped."""
    per_device_train_batch_size: Annotated[PositiveInt, Variable("BATCH_SIZE")] = 2
    """Number of samples per forward pass of a rank."""
    gradient_accumulation_steps: Annotated[PositiveInt, Variable("GRAD_ACCUM")] = 16
    """Forward passes per optimiser step. One step takes batch size x these passes x ranks samples."""
    num_train_epochs: Annotated[PositiveInt, Variable("NUM_EPOCHS")] = 3
    """Number of passes over the training records."""
    max_steps: PositiveInt | None = None
    """Number of optimiser steps. Replaces `num_train_epochs`."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], Variable("ZERO_STAGE")] = 2
    """DeepSpeed ZeRO stage."""
    allow_tf32: Annotated[bool, Variable("ALLOW_TF32")] = False
    """Let GPUs round the factors of fp32 matrix products to TF32: faster, but only about three decimal digits."""
    seed: Annotated[Seed, Variable("SEED")] = 0
    """Seed of data order, latents and dropout."""

    output_dir: Annotated[Path, Variable("OUTPUT_DIR")]
    """Directory for checkpoints, best_model, metrics and TensorBoard, on a disk that all ranks share."""
    eval_steps: Annotated[NonNegativeInt, Variable("EVAL_STEPS")] = 500
    """Steps between validations. 0: only at the end."""
    save_steps: Annotated[NonNegativeInt, Variable("SAVE_STEPS")] = 1000
    """Steps between checkpoints. 0: only if the run is interrupted."""
    logging_steps: Annotated[PositiveInt, Variable("LOGGING_STEPS")] = 50
    """Steps between log lines."""
    monitor_port: Annotated[Port, Variable("MONITOR_PORT")] = 8010
    """Port of the run's live page on loopback. If it is 0 or in use, the run picks a free port, which the log names."""
    answer_tokens: PositiveInt | None = None
    """Maximum number of tokens that the student generates in validation. The default is enough for the validation
    data."""
    metric_for_best_model: Literal[
        "accuracy", "ce_loss", "loss", "kv_loss", "eval_accuracy", "eval_ce_loss", "eval_loss", "eval_kv_loss"
    ] = "accuracy"
    """Validation metric of best_model."""

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teachers that are used: the first `num_teachers`."""
        return self.teacher_models[: self.num_teachers]

    @property
    def fusion(self) -> FusionKind:
        """How teachers are fused in a run of one stage."""
        if self.train_phase in (None, "all"):
            return self.fusion_strategy or "fixed"
        return STAGES[int(self.train_phase) - 1][1]

    @property
    def store(self) -> Path | None:
        """Directory of the store, or None without one."""
        return None if self.kv_mode == "online" else self.kv_store or self.output_dir / "kv_store"

    @model_validator(mode="after")
    def _teachers_agree(self) -> Self:
        if self.num_teachers is not None and self.num_teachers > len(self.teacher_models):
            raise ValueError(
                f"num_teachers: {self.num_teachers} is more than the {len(self.teacher_models)} of teacher_models"
            )
        if self.fixed_weights and len(self.fixed_weights) != len(self.teachers):
            raise ValueError(
                f"fixed_weights: expected {len(self.teachers)} weights, one per teacher, got "
                f"{len(self.fixed_weights)} (separate them by spaces in sbatch --export, where a comma ends a value)"
            )
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_4bit: conflicts with load_in_8bit; set one of them")
        if self.teacher_endpoints and (self.load_in_8bit or self.load_in_4bit):
            raise ValueError(
                "teacher_endpoints: running servers have loaded their weights; quantise there "
                "(kvdistill serve --load-in-8bit), without load_in_8bit and load_in_4bit"
            )
        if self.teacher_endpoints and self.kv_mode == "offline":
            raise ValueError("teacher_endpoints: kv_mode 'offline' uses no teacher")
        return self

    @model_validator(mode="after")
    def _phase_agrees(self) -> Self:
        if self.train_phase is not None and self.fusion_strategy is not None:
            if self.train_phase == "all":
                raise ValueError("fusion_strategy: conflicts with train_phase 'all', which runs all three")
            if self.fusion_strategy != self.fusion:
                raise ValueError(
                    f"fusion_strategy: train_phase {self.train_phase} is '{self.fusion}', got '{self.fusion_strategy}'"
                )
        if not self.rope_scaling:
            raise ValueError(
                "rope_scaling: cannot be false: teachers send keys without their rotation, so keys of models with "
                "different RoPE parameters are compared exactly"
            )
        return self


FLAGS = FlagSet(
    RecipeSettings,
    """Train a student on the keys and values of one or several teachers.

After an interruption, the same command continues from the newest checkpoint.""",
    """# Two teachers with fixed weights; starts a server for each teacher on this machine
COMMAND --student-model Qwen/Qwen2.5-1.5B \\
    --teacher-models Qwen/Qwen2.5-7B Qwen/Qwen2.5-14B --fusion-strategy fixed --fixed-weights 0.5,0.5 \\
    --output-dir outputs/two_teachers
# All three stages of a scenario on 8 ranks, with servers that already run
torchrun --standalone --nproc_per_node 8 experiments/train_multi_teacher_kv.py \\
    --config configs/experiments/one_family_qwen.yaml \\
    --teacher-endpoints Qwen2.5-7B=node1:50051 Qwen2.5-14B=node2:50051
# Teachers in 8 bits
COMMAND --config configs/experiments/one_family_llama.yaml \\
    --load-in-8bit true --bnb-4bit-compute-dtype bfloat16
# Only prepare the data, from local copies of the datasets
COMMAND --config configs/experiments/one_family_qwen.yaml --data-dir copies --prepare-only""",
    config_file=True,
    script="experiments/train_multi_teacher_kv.py",
)
