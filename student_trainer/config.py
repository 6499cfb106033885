"""The configuration of `kvdistill train`. Imports no torch, so that `--help` and validation are fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, cast

from pydantic import ConfigDict, Field, field_validator, model_validator

from data.reasoning_steps import StepKind
from kvcore.config import (
    Endpoint,
    FileName,
    Fraction,
    ModelPath,
    NonNegativeFloat,
    NonNegativeInt,
    Port,
    PositiveFloat,
    PositiveInt,
    Seed,
    StrictModel,
    Text,
    parse,
)
from kvcore.errors import FieldError
from kvcore.plan import CodecConfig, Selection, changed_selection
from student_trainer.config_checks import (
    check_basis,
    check_curriculum,
    check_kv_maps,
    check_map_at,
    check_projection,
    check_refits,
    check_ridge_rank,
    check_selection,
    check_self_teacher,
    check_step_blocks,
    check_trained_maps,
)
from student_trainer.method_config import AlignConfig, FuseConfig, LossConfig

# Folder of a run's best model, from which the next stage starts.
BEST_MODEL = "best_model"

Section = dict[str, object]
# What a partial `kv.selection` is completed with.
DEFAULT_SELECTION = Selection(selector="r_kv", budget=24)


class LoraConfig(StrictModel):
    """LoRA adapters, which are trained while the student's own weights are frozen. The defaults are those of KaVa."""

    r: PositiveInt = 128
    """Rank."""
    alpha: PositiveInt = 32
    """Scale: the output of a LoRA adapter is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Dropout on the inputs of LoRA adapters."""
    target_modules: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Names of the linear layers that get a LoRA adapter, such as `q_proj`. By default all linear layers except the
    head."""


class StudentConfig(StrictModel):
    """The model that is trained."""

    path: ModelPath
    """Directory or hub id of a transformers model, or the `best_model` of an earlier run."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Data type of the weights."""
    mode: Literal["latent", "token"] = "latent"
    """`latent` reasons in latent positions (PCCoT, KaVa); `token` reads and writes its reasoning as text."""
    latents: PositiveInt = 24
    """Number of latent positions."""
    passes: PositiveInt = 3
    """Number of Jacobi passes that refine the latents."""
    projection: bool = True
    """Compute the input of a latent from the hidden state one position before it by two linear layers and a layer norm.
    `false`: the input is this hidden state itself, without parameters of its own."""
    latents_per_step: PositiveInt | None = None
    """Divides the latents into blocks of this size. Block k learns step k of the reasoning, with the weight
    `loss.step_ce_weight`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    lora: LoraConfig | None = None
    """Train LoRA adapters and freeze the student's own weights. Off by default: all weights are trained."""


class TeacherConfig(StrictModel):
    """One teacher and its replicas."""

    name: FileName
    """Name of the teacher in logs and metrics, and of its folder in `kv.store`."""
    endpoints: tuple[Endpoint, ...] = ()
    """HOST:PORT of each replica."""
    weight: PositiveFloat = 1.0
    """Weight of the teacher with `fuse.kind: fixed`."""
    format: Literal["plain", "chat"] | None = None
    """How the teacher reads samples: as text, or in its own chat template. The default is the student's
    `data.format`."""
    kv_map: Path | None = None
    """File that `kvdistill calibrate` wrote for this teacher, for `kv.codec.name: pca`. By default each run fits the
    codec to its calibration samples."""

    @field_validator("endpoints")
    @classmethod
    def _replicas_differ(cls, endpoints: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [one for one in dict.fromkeys(endpoints) if endpoints.count(one) > 1]:
            raise ValueError(f"'{twice[0]}' is listed twice; each endpoint is one replica")
        return endpoints


class KVConfig(StrictModel):
    """The source of K/V, and what the teachers send."""

    mode: Literal["online", "offline", "record"] = "online"
    """`online`: from the teachers; `record`: from the teachers, and written to `store`; `offline`: from `store`."""
    store: Path | None = None
    """Directory of the store."""
    selection: Selection = DEFAULT_SELECTION
    """The tokens that teachers send. Keys that you leave out keep their defaults, except the options of selectors that
    you did not choose."""
    codec: CodecConfig = CodecConfig()
    """How K/V are encoded for transfer and storage."""
    prefetch: Annotated[int, Field(ge=0, le=64)] = 4
    """Number of batches that are fetched ahead in training, calibration and validation. Fewer batches are fetched ahead
    if a teacher's encoded K/V take over 512 MiB. 0 disables prefetching."""
    request_timeout_s: PositiveFloat = 120.0
    """Deadline of a request in seconds."""
    patience_s: NonNegativeFloat = 30.0
    """Seconds a teacher may be unreachable before it counts as lost."""
    hedge: bool = True
    """Ask another replica for the same samples if an answer takes longer than 95 % of the last ones, and use what
    arrives first. This costs the teachers a few percent more work, and avoids waiting for a slow replica."""
    on_missing: Literal["fail", "mask"] = "fail"
    """What to do with a sample if a teacher cannot return its K/V. `fail`: end the run; `mask`: keep its cross-entropy,
    leave it out of the KV loss, count it and log it."""
    on_lost: Literal["fail", "mask"] = "fail"
    """What to do when no replica of a teacher answers within `patience_s`. `fail`: save a checkpoint and end the run;
    `mask`: train without the teacher's K/V until it answers again. If a teacher is lost while alignments are fitted,
    the run ends in both cases."""
    lost_steps: PositiveInt = 100
    """With `on_lost: mask`, the number of consecutive steps that a teacher may be lost before the run ends."""
    min_teachers: NonNegativeInt = 0
    """With `on_lost: mask`, the number of teachers that must answer; with fewer, the run ends."""
    control: Literal["none", "shuffled"] = "none"
    """`shuffled` trains each sample on the K/V of another sample, as the control of an experiment. Alignment and
    validation use each sample's own K/V."""

    @field_validator("selection", mode="before")
    @classmethod
    def _completed(cls, value: object) -> object:
        return changed_selection(DEFAULT_SELECTION, cast("Section", value)) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _store_for_mode(self) -> Self:
        if self.mode != "online" and self.store is None:
            raise ValueError(f"store: kv.mode '{self.mode}' needs the directory of the store")
        return self


class ColumnsConfig(StrictModel):
    """The columns of your own data. A field that is not set here is read from the column of the same name.

    If any field is set, files need no ids: the id of a record is then FILE:LINE.
    """

    id: Text | None = None
    """Column of the unique ids."""
    prompt: Text | None = None
    """Column of the question to the student."""
    reasoning: Text | None = None
    """Column of the worked steps."""
    answer: Text | None = None
    """Column of the answer that the student must give."""
    dataset: Text | None = None
    """Column of the dataset's name, by which validation groups its metrics."""

    def names(self) -> dict[str, str]:
        """The columns that are set, by field."""
        return self.model_dump(exclude_none=True)


class DataConfig(StrictModel):
    """Training and validation samples with `id`, `prompt`, `reasoning` and `answer`."""

    train: Path
    """Training samples: JSON Lines, or a directory written by `save_to_disk` of the datasets library."""
    val: Path | None = None
    """Validation samples, in the same formats."""
    columns: ColumnsConfig = ColumnsConfig()
    """The column of each field in your own data, such as `{prompt: question, reasoning: rationale, answer: label}`."""
    format: Literal["plain", "chat"] = "plain"
    """How the student reads samples. `plain`: as one text; `chat`: in its tokenizer's chat template, with reasoning and
    answer as the assistant's turn."""
    system_prompt: Text | None = None
    """System message of samples that have none, for models that read samples as a chat."""
    steps: StepKind = "lines"
    """How the reasoning is divided into steps: into its `lines`, or into its `equations` between << and >>, as in GSM8K
    and GSM8K-Aug. A line `####` is no step."""
    drop_last_step: bool = False
    """Leave the last step of each reasoning out, for students and teachers, because it usually states the answer. A
    reasoning of one step stays whole."""
    max_tokens: PositiveInt = 2048
    """Maximum length of a sample in the student's tokens."""
    answer_tokens: PositiveInt | None = None
    """Maximum number of tokens that the student generates in validation; in token mode this includes its reasoning. The
    default is 1.25 times the longest answer of the validation samples, at most 512."""
    val_samples: PositiveInt | None = None
    """Number of validation samples to use, from the first. All by default."""
    sort_by_length: bool = True
    """Put samples of similar length into a micro-batch, which reduces padding. The order of the micro-batches stays
    random. `false`: every micro-batch is a random draw."""


class OptimConfig(StrictModel):
    """AdamW and the learning-rate schedule."""

    lr: PositiveFloat = 2e-5
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""
    warmup_ratio: Fraction = 0.1
    """Fraction of the steps in which the learning rate rises linearly, at the start and again after
    `align.warmup_steps`."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Learning-rate schedule after the rise."""
    max_grad_norm: PositiveFloat = 1.0
    """Norm at which gradients are clipped."""


class RunConfig(StrictModel):
    """Length, batch size, parallelism, and how often results are written."""

    output_dir: Path
    """Directory for checkpoints, metrics and the best model."""
    seed: Seed = 0
    """Seed of data order, latents and dropout."""
    steps: PositiveInt | None = None
    """Number of optimiser steps. Set exactly one of `steps` and `epochs`."""
    epochs: PositiveInt | None = None
    """Number of passes over the training samples."""
    curriculum_epochs: PositiveFloat | None = None
    """Epochs per stage of the curriculum (LOTUS, which uses 1). In stage s the first s steps of the reasoning are
    latent, in s blocks of `student.latents_per_step` latents. The other steps follow as text. There are as many stages
    as blocks. In the last stage, which lasts until the run ends, all reasoning is latent. By default it is always
    latent."""
    global_batch: PositiveInt = 64
    """Number of samples per optimiser step, over all ranks."""
    micro_batch: PositiveInt = 8
    """Number of samples per forward pass of a rank."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    offload_optimizer: bool = False
    """Keep the optimiser's fp32 weights and moments in host memory and step there, which is slower. Needs `zero_stage`
    1 or higher."""
    allow_tf32: bool = False
    """Let GPUs round the factors of fp32 matrix products to TF32: faster, but only about three decimal digits."""
    license: Text = "other"
    """Licence of the student in its model card, as the hub names it, such as `apache-2.0`. The licences of the base
    model, the teachers and the data limit your choice."""
    log_every: PositiveInt = 10
    """Steps between log lines."""
    eval_every: NonNegativeInt = 0
    """Steps between validations. 0: only at the end."""
    save_every: NonNegativeInt = 0
    """Steps between checkpoints. The last step is saved too. 0: a checkpoint is saved only if the run is interrupted,
    and removed when the run has ended."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    best_by: Literal["accuracy", "ce_loss", "loss", "kv_loss"] = "accuracy"
    """Validation metric that selects the best model. If accuracies are equal, the lower cross-entropy (`ce_loss`)
    is better. `loss` is the total loss, in which the KV loss can weigh far more than the cross-entropy."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Experiment trackers that also receive the metrics. Configure each by its own environment variables, and install
    the extra of the same name, as in `pip install 'kvdistill[wandb]'`."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` continues from the newest checkpoint in `output_dir`; `never` starts from the first step."""

    @model_validator(mode="after")
    def _parts_of_a_run_agree(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("steps: set exactly one of run.steps and run.epochs")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer: needs run.zero_stage 1, 2 or 3, and it is 0")
        return self


class MonitorConfig(StrictModel):
    """HTTP server of rank 0 while it trains: a live page, `/metrics` for Prometheus, `/healthz` for probes.

    It has no authentication: keep it on loopback or in a private network.
    """

    host: Text = "127.0.0.1"
    """Address to listen on."""
    port: Port | None = None
    """Port to listen on. If it is 0 or in use, the server picks a free port, which the log names. Without a port there
    is no server."""


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
    """One training run, or several consecutive ones (`stages`).

    Without `teachers` and `self_teacher`, it is supervised training.
    """

    student: StudentConfig
    """The model that is trained."""
    teachers: tuple[TeacherConfig, ...] = ()
    """The teachers."""
    self_teacher: bool = False
    """Whether the student is its own teacher, as in KaVa: its latents' K/V learn from its K/V of the reasoning that it
    reads as text, with the current weights. It replaces `teachers`, and needs latent mode and no server.
    `kv.selection` selects the tokens, and `loss` sets distance and weight."""
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
    """Consecutive runs, each of which starts from the best model of the previous one."""

    def stage(self, index: int) -> TrainConfig:
        """The complete configuration of one stage.

        Raises:
            FieldError: a change of the stage is invalid; names its index in `stages`.
        """
        stage = self.stages[index]
        tree = self.model_dump(mode="json", exclude={"stages"})
        for section, changes in stage.model_dump(mode="json", exclude={"name"}).items():
            tree[section] = _merged(tree[section], changes)
        if isinstance(selection := stage.kv.get("selection"), dict):
            tree["kv"]["selection"] = changed_selection(self.kv.selection, cast("Section", selection))
        tree["run"]["output_dir"] = str(self.run.output_dir / stage.name)
        if index > 0:
            tree["student"]["path"] = str(self.run.output_dir / self.stages[index - 1].name / BEST_MODEL)
        try:
            return parse(tree, TrainConfig)
        except FieldError as error:
            raise FieldError(f"stages.{index}.{error.field}", error.problem) from error

    @property
    def direction(self) -> Literal["to_student", "to_teacher"]:
        """`align.direction` of this run, with `auto` resolved."""
        if self.align.direction != "auto":
            return self.align.direction
        fuses = len(self.teachers) > 1 or self.fuse.kind != "fixed"
        return "to_student" if fuses or self.align.head_adapter == "identity" else "to_teacher"

    @model_validator(mode="after")
    def _stages_are_runs(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: names must differ, got {names}")
        if self.stages and self.data.val is None:
            raise ValueError(
                "data.val: is required with stages, because each starts from the best model of the previous one"
            )
        for index, stage in enumerate(self.stages):
            for field in ("output_dir", "resume"):
                if field in stage.run:
                    raise ValueError(f"stages.{index}.run.{field}: belongs to all stages; set run.{field}")
            if self.stage(index).data.val is None:
                raise ValueError(
                    f"stages.{index}.data.val: is required, because the next stage starts from the best model"
                )
        return self

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError(f"teachers: names must differ, got {names}")
        for teacher in self.teachers:
            if self.kv.mode != "offline" and not teacher.endpoints:
                raise ValueError(f"teachers: '{teacher.name}' has no endpoints, which kv.mode '{self.kv.mode}' needs")
        if self.kv.min_teachers > len(self.teachers):
            raise ValueError(f"kv.min_teachers: {self.kv.min_teachers}, and there are {len(self.teachers)} teachers")
        formats = {self.data.format, *(teacher.format for teacher in self.teachers)}
        if self.data.system_prompt is not None and "chat" not in formats:
            raise ValueError("data.system_prompt: needs data.format 'chat', or a teacher with format 'chat'")
        if self.run.best_by == "kv_loss" and not (self.teachers or self.self_teacher):
            raise ValueError("run.best_by: 'kv_loss' needs teachers or self_teacher")
        if self.self_teacher:
            check_self_teacher(self)
        if self.teachers:
            check_selection(self)
            check_trained_maps(self)
            check_refits(self)
            check_basis(self)
            check_ridge_rank(self)
            check_kv_maps(self)
            check_map_at(self)
        check_step_blocks(self)
        check_projection(self)
        check_curriculum(self)
        if self.loss.codi_weight > 0 and (self.student.mode != "latent" or self.loss.reasoning_ce_weight == 0):
            raise ValueError("loss.codi_weight: CODI needs student.mode 'latent' and loss.reasoning_ce_weight above 0")
        return self
