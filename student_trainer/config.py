"""The configuration of `kvdistill train`. Imports no torch, so that `--help` and validation are fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, cast

from pydantic import ConfigDict, Field, model_validator

from kvcore.config import (
    FileName,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Port,
    PositiveFloat,
    PositiveInt,
    StrictModel,
    Text,
    parse,
)
from kvcore.errors import FieldError
from kvcore.plan import CodecSpec, Selection
from kvcore.plugins import NameTable
from student_trainer.config_checks import check_selection, check_trained_maps

# Folder of a run's best model, from which the next stage starts.
BEST_MODEL = "best_model"

KV_LOSSES = NameTable(
    "KV loss",
    "kvdistill.losses",
    {
        "mse": "student_trainer.model.losses:mse",
        "smooth_l1": "student_trainer.model.losses:smooth_l1",
        "cosine": "student_trainer.model.losses:cosine",
        "cka": "student_trainer.model.losses:cka",
    },
)

Section = dict[str, object]


class StudentConfig(StrictModel):
    """The model that is trained."""

    path: str
    """Directory or hub id of a transformers model, or the `best_model` of an earlier run."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Data type of the weights."""
    mode: Literal["latent", "token"] = "latent"
    """`latent` reasons in latent positions (PCCoT, KaVa); `token` reads and writes its reasoning as text."""
    latents: PositiveInt = 24
    """Number of latent positions."""
    passes: PositiveInt = 3
    """Number of Jacobi passes that refine the latents."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""


class TeacherConfig(StrictModel):
    """One teacher and its replicas."""

    name: FileName
    """Name in logs and metrics, and of the teacher's folder in `kv.store`."""
    endpoints: tuple[Annotated[str, Field(pattern=r"^[^\s/]+:\d{1,5}$")], ...] = ()
    """HOST:PORT of each replica."""
    weight: PositiveFloat = 1.0
    """Weight of the teacher with `fuse.kind: fixed`."""


class KVConfig(StrictModel):
    """The source of K/V, and what the teachers send."""

    mode: Literal["online", "offline", "record"] = "online"
    """`online`: from the teachers; `record`: from the teachers, and written to `store`; `offline`: from `store`."""
    store: Path | None = None
    """Directory of the store."""
    selection: Selection = Selection(selector="r_kv", budget=24)
    """The tokens that teachers send."""
    codec: CodecSpec = CodecSpec()
    """How K/V are encoded for transfer and storage."""
    prefetch: Annotated[int, Field(ge=0, le=64)] = 4
    """Number of batches fetched ahead. 0 disables prefetching."""
    request_timeout_s: PositiveFloat = 120.0
    """Deadline of a request in seconds."""
    patience_s: NonNegativeFloat = 30.0
    """Seconds a teacher may be unreachable before it counts as lost."""
    on_missing: Literal["fail", "mask"] = "fail"
    """What to do with a sample whose K/V a teacher cannot give. `fail`: end the run; `mask`: keep its cross-entropy,
    leave it out of the KV loss, count it and log it."""
    control: Literal["none", "shuffled"] = "none"
    """`shuffled` gives each sample the K/V of another one in training, as an experiment's control. Alignment and
    validation keep the true pairs."""

    @model_validator(mode="after")
    def _store_for_mode(self) -> Self:
        if self.mode != "online" and self.store is None:
            raise ValueError(f"store: kv.mode '{self.mode}' needs the directory of the store")
        return self


class AlignConfig(StrictModel):
    """How a teacher's K/V are mapped to the student's geometry; docs/alignment.md has the formulas."""

    direction: Literal["to_student", "to_teacher"] = "to_student"
    """`to_student` maps the teacher's K/V into the student's space with a map that stays frozen; `to_teacher` maps the
    student's K/V into each teacher's space with a regressor that is trained."""
    tokens: Literal["boundary", "overlap"] = "boundary"
    """How tokens of two tokenizers are paired in token mode: by byte ends, or by shared bytes (needs the whole
    text)."""
    time: Literal["none", "linear", "nearest", "segment"] = "none"
    """How the teacher's slots are resampled to the student's latents. `none` needs equal numbers of both."""
    layer_map: Literal["ratio", "uniform", "last", "skip", "cka", "learned"] = "ratio"
    """Teacher layers for each student layer. `cka` compares layers on the calibration samples; `learned` starts from
    `ratio` and is trained, with `to_student` by the router loss alone."""
    head_adapter: Literal["ridge", "procrustes", "pool", "linear", "identity"] = "ridge"
    """Map between heads: `ridge` (closed form), `procrustes` (a rotation), `pool` (averages heads and dims), `linear`
    (starts from ridge and is trained, with `to_student` by the router loss alone, because the KV loss would collapse
    its own target) or `identity` (same geometry)."""
    calibration_samples: PositiveInt = 512
    """Number of training samples on which the map and the targets' scale are fitted before the first step."""
    sink_tokens: NonNegativeInt = 1
    """Number of first tokens (attention sinks) left out of calibration, and of the KV loss in token mode."""
    min_explained_variance: Fraction = 0.2
    """Explained variance of a layer's map below which a warning is logged."""


class FuseConfig(StrictModel):
    """How the K/V of several teachers are combined into one target."""

    kind: Literal["fixed", "similarity", "learnable"] = "fixed"
    """Source of the teachers' weights. `fixed`: their `weight`; `similarity`: per sample, the similarity of their
    aligned K/V to the student's own K/V of the same text; `learnable`: a router that reads the prompt and is trained
    by the answer's cross-entropy with the fused K/V in the student's cache."""
    metric: Literal["cosine", "dot", "euclidean"] = "cosine"
    """Similarity measure for `similarity`."""
    router: Literal["mlp", "gate", "attention"] = "mlp"
    """Architecture of the router for `learnable`."""
    router_width: PositiveInt = 256
    """Hidden size of the router."""
    router_loss_weight: PositiveFloat = 1.0
    """Weight of the router loss."""
    per_layer: bool = False
    """Use separate weights for each layer."""
    choose: Literal["soft", "top1"] = "soft"
    """`soft` averages the teachers; `top1` takes the teacher with the highest weight."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature over teachers in the first epoch."""
    temperature_decay: NonNegativeFloat = 0.1
    """Decrease of the temperature per epoch."""
    temperature_floor: PositiveFloat = 0.5
    """Lowest temperature: it is max(floor, temperature - decay x epoch)."""
    entropy_weight: NonNegativeFloat = 0.01
    """Weight of the entropy bonus of the router, which rewards even weights."""
    collapse_at: Annotated[float, Field(gt=0.5, le=1.0)] = 0.95
    """Mean weight of one teacher above which a warning is logged."""

    @model_validator(mode="after")
    def _floor_below_start(self) -> Self:
        if self.temperature < self.temperature_floor:
            raise ValueError(
                f"temperature_floor: {self.temperature_floor} is above fuse.temperature ({self.temperature}), which "
                "would never be used; lower it"
            )
        return self


class LossConfig(StrictModel):
    """The training loss.

    Latent mode: answer CE + `reasoning_ce_weight` x text CE + `kv_weight` x KV + `codi_weight` x CODI, where the text
    is reasoning and answer, read without latents. Token mode: text CE + `kv_weight` x KV.
    """

    kv_weight: NonNegativeFloat | Literal["auto"] = 1.0
    """Weight of the KV loss. `auto` sets it before the first step from `kv_gradient_ratio`."""
    kv_gradient_ratio: PositiveFloat = 1.0
    """Norm of the KV loss's gradient relative to the cross-entropy's, for `kv_weight: auto`."""
    kv_loss: Annotated[str, KV_LOSSES] = "smooth_l1"
    """Distance between K/V: `mse` or `smooth_l1` in units of the targets' standard deviation, `cosine` per head, or
    `cka` over a batch's slots."""
    reasoning_ce_weight: NonNegativeFloat = 1.0
    """Weight of the cross-entropy of reasoning and answer as text, in latent mode."""
    codi_weight: NonNegativeFloat = 0.0
    """Weight of CODI's loss on the hidden states before the answer, in latent mode."""


class DataConfig(StrictModel):
    """Training and validation samples with `id`, `prompt`, `reasoning` and `answer`."""

    train: Path
    """Training samples: JSON Lines, or a directory written by `save_to_disk` of the datasets library."""
    val: Path | None = None
    """Validation samples, in the same formats."""
    max_tokens: PositiveInt = 2048
    """Maximum length of a sample in the student's tokens."""
    answer_tokens: PositiveInt = 32
    """Maximum number of tokens that the student generates in validation, in token mode including its reasoning."""
    val_samples: PositiveInt | None = None
    """Number of validation samples to use, from the first. All by default."""


class OptimConfig(StrictModel):
    """AdamW and the learning-rate schedule."""

    lr: PositiveFloat = 2e-5
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's betas."""
    warmup_ratio: Fraction = 0.1
    """Fraction of the steps with linear warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    max_grad_norm: PositiveFloat = 1.0
    """Norm at which gradients are clipped."""


class RunConfig(StrictModel):
    """Length, batch size, parallelism, and what is written when."""

    output_dir: Path
    """Directory for checkpoints, metrics and the best model."""
    seed: int = 0
    """Seed of data order, latents and dropout."""
    steps: PositiveInt | None = None
    """Number of optimiser steps. Set exactly one of `steps` and `epochs`."""
    epochs: PositiveInt | None = None
    """Number of passes over the training samples."""
    global_batch: PositiveInt = 64
    """Number of samples per optimiser step, over all ranks."""
    micro_batch: PositiveInt = 8
    """Number of samples per forward pass of a rank."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    log_every: PositiveInt = 10
    """Steps between log lines."""
    eval_every: NonNegativeInt = 0
    """Steps between validations. 0: only at the end."""
    save_every: NonNegativeInt = 0
    """Steps between checkpoints. 0: only at the end."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    best_by: Literal["accuracy", "loss", "kv_loss"] = "accuracy"
    """Validation metric of the best model. Equal accuracies are ordered by loss."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` continues from the newest checkpoint in `output_dir`; `never` starts anew."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("steps: set exactly one of run.steps and run.epochs")
        return self


class MonitorConfig(StrictModel):
    """HTTP server of rank 0 while it trains: a live page, `/metrics` for Prometheus, `/healthz` for probes.

    It has no authentication: keep it on loopback or in a private network.
    """

    host: Text = "127.0.0.1"
    """Address to listen on."""
    port: Port | None = None
    """Port to listen on. 0 picks a free port, which the log names. Off by default."""


def _merged(base: Section, changes: Section) -> Section:
    """`base` updated with `changes`, at any depth."""
    merged = dict(base)
    for name, value in changes.items():
        below = merged.get(name)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[name] = _merged(cast("Section", below), cast("Section", value)) if both else value
    return merged


class StageConfig(StrictModel):
    """One of several consecutive runs, and the settings that it changes."""

    # Keeps numbers that are not finite, so that the whole configuration refuses them by name.
    model_config = ConfigDict(ser_json_inf_nan="constants")

    name: FileName
    """Folder of the stage under `run.output_dir`."""
    kv: Section = Field(default_factory=dict)
    """Changes of `kv`."""
    align: Section = Field(default_factory=dict)
    """Changes of `align`."""
    fuse: Section = Field(default_factory=dict)
    """Changes of `fuse`."""
    loss: Section = Field(default_factory=dict)
    """Changes of `loss`."""
    data: Section = Field(default_factory=dict)
    """Changes of `data`."""
    optim: Section = Field(default_factory=dict)
    """Changes of `optim`."""
    run: Section = Field(default_factory=dict)
    """Changes of `run`."""


class TrainConfig(StrictModel):
    """One training run, or several consecutive ones (`stages`). Without teachers, it is supervised training."""

    student: StudentConfig
    """The model that is trained."""
    teachers: tuple[TeacherConfig, ...] = ()
    """The teachers."""
    kv: KVConfig = KVConfig()
    """The source of K/V."""
    align: AlignConfig = AlignConfig()
    """The map from teachers to the student."""
    fuse: FuseConfig = FuseConfig()
    """The combination of several teachers."""
    loss: LossConfig = LossConfig()
    """The training loss."""
    data: DataConfig
    """The samples."""
    optim: OptimConfig = OptimConfig()
    """The optimiser."""
    run: RunConfig
    """Length, batch size and output."""
    monitor: MonitorConfig = MonitorConfig()
    """HTTP server for metrics."""
    stages: tuple[StageConfig, ...] = ()
    """Consecutive runs, each of which starts from the best model of the one before."""

    def stage(self, index: int) -> TrainConfig:
        """The complete configuration of one stage.

        Raises:
            FieldError: a change of the stage is invalid; names its index in `stages`.
        """
        stage = self.stages[index]
        tree = self.model_dump(mode="json", exclude={"stages"})
        for section, changes in stage.model_dump(mode="json", exclude={"name"}).items():
            tree[section] = _merged(tree[section], changes)
        tree["run"]["output_dir"] = str(self.run.output_dir / stage.name)
        if index > 0:
            tree["student"]["path"] = str(self.run.output_dir / self.stages[index - 1].name / BEST_MODEL)
        try:
            return parse(tree, TrainConfig)
        except FieldError as error:
            raise FieldError(f"stages.{index}.{error.field}", error.problem) from error

    @model_validator(mode="after")
    def _stages_are_runs(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: names must differ, got {names}")
        if self.stages and self.data.val is None:
            raise ValueError("data.val: is required with stages, because they pass on the best model")
        for index, stage in enumerate(self.stages):
            for field in ("output_dir", "resume"):
                if field in stage.run:
                    raise ValueError(f"stages.{index}.run.{field}: belongs to all stages; set run.{field}")
            if self.stage(index).data.val is None:
                raise ValueError(f"stages.{index}.data.val: is required, because stages pass on the best model")
        return self

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError(f"teachers: names must differ, got {names}")
        for teacher in self.teachers:
            if self.kv.mode != "offline" and not teacher.endpoints:
                raise ValueError(f"teachers: '{teacher.name}' has no endpoints, which kv.mode '{self.kv.mode}' needs")
        if self.run.best_by == "kv_loss" and not self.teachers:
            raise ValueError("run.best_by: 'kv_loss' needs teachers")
        if self.teachers:
            check_selection(self)
            check_trained_maps(self)
        if self.loss.codi_weight > 0 and (self.student.mode != "latent" or self.loss.reasoning_ce_weight == 0):
            raise ValueError("loss.codi_weight: CODI needs student.mode 'latent' and loss.reasoning_ce_weight above 0")
        return self
