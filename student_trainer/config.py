"""The configuration of `kvdistill train`. Free of torch, so that `--help` and validation are instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvcore.config import StrictModel
from kvcore.plan import CodecSpec, Selection

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class StudentConfig(StrictModel):
    """The model that learns.

    `path`: a directory or hub id that transformers loads, or a `best_model` of an earlier run.
    `mode`: `latent` reasons in `latents` positions refined by `passes` Jacobi passes (PCCoT, KaVa);
    `token` reads and writes its reasoning as text.
    """

    path: str
    dtype: Literal["fp32", "bf16"] = "fp32"
    mode: Literal["latent", "token"] = "latent"
    latents: Positive = 24
    passes: Positive = 3
    gradient_checkpointing: bool = False


class TeacherConfig(StrictModel):
    """One teacher: replicas behind `endpoints` (host:port), and its weight in the fusion.

    Its store is the folder `name` under `kv.store`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}$")]
    endpoints: tuple[Annotated[str, Field(pattern=r"^[^\s/]+:\d{1,5}$")], ...] = ()
    weight: Annotated[float, Field(gt=0.0)] = 1.0


class KVConfig(StrictModel):
    """Where K/V come from and what leaves the teachers.

    `mode`: `online` pulls from the teachers, `record` does too and writes what it got to `store`, `offline` reads
    `store` alone. `prefetch`: batches fetched ahead, 0 for none. `patience_s`: how long a teacher may be unreachable
    before it counts as lost. `on_missing`: a sample whose K/V a teacher cannot give ends the run (`fail`) or keeps
    its cross-entropy and is masked out of the KV loss, counted and logged (`mask`). `control: shuffled` hands
    each sample another one's K/V in training (alignment and validation keep the true pairs): an experiment's control.
    """

    mode: Literal["online", "offline", "record"] = "online"
    store: Path | None = None
    selection: Selection = Selection(selector="r_kv", budget=24)
    codec: CodecSpec = CodecSpec()
    prefetch: Annotated[int, Field(ge=0, le=64)] = 4
    request_timeout_s: Annotated[float, Field(gt=0.0)] = 120.0
    patience_s: NonNegative = 30.0
    on_missing: Literal["fail", "mask"] = "fail"
    control: Literal["none", "shuffled"] = "none"

    @model_validator(mode="after")
    def _store_for_mode(self) -> Self:
        if self.mode != "online" and self.store is None:
            raise ValueError(f"store: kv.mode '{self.mode}' needs the directory of the store")
        return self


class AlignConfig(StrictModel):
    """How a teacher's geometry meets the student's.

    `direction`: `to_student` maps the teacher's K/V into the student's space and keeps that map frozen; `to_teacher`
    maps the student's K/V into each teacher's space with a regressor that trains.
    `head_adapter`: `ridge` (closed form), `linear` (starts from ridge and trains) or `identity` (same geometry).
    `calibration_samples`: how many training samples the map and the targets' scale are measured on before the first
    step.
    """

    direction: Literal["to_student", "to_teacher"] = "to_student"
    layer_map: Literal["ratio"] = "ratio"
    head_adapter: Literal["ridge", "linear", "identity"] = "ridge"
    calibration_samples: Positive = 512


class LossConfig(StrictModel):
    """What is minimised.

    Latent mode: answer CE + `reasoning_ce_weight` x text CE + `kv_weight` x KV, where the text is reasoning and answer,
    read without latents. Token mode: text CE + `kv_weight` x KV.
    """

    kv_weight: NonNegative = 1.0
    kv_loss: Literal["mse", "smooth_l1"] = "smooth_l1"
    reasoning_ce_weight: NonNegative = 1.0


class DataConfig(StrictModel):
    """Training and validation samples: JSON Lines with `id`, `prompt`, `reasoning` and `answer`.

    `max_tokens`: the longest sample, in the student's tokens. `answer_tokens`: how many the student may write in
    validation (in token mode its reasoning counts too). `val_samples`: only the first so many of `val`.
    """

    train: Path
    val: Path | None = None
    max_tokens: Positive = 2048
    answer_tokens: Positive = 32
    val_samples: Positive | None = None


class OptimConfig(StrictModel):
    """AdamW with linear warm-up, then `schedule`."""

    lr: Annotated[float, Field(gt=0.0)] = 2e-5
    weight_decay: NonNegative = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    warmup_ratio: Fraction = 0.1
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0


class RunConfig(StrictModel):
    """Length, batch, parallelism, and what is written when.

    Exactly one of `steps` and `epochs` sets the length. `global_batch` samples make one optimiser step, whatever the
    number of ranks; `micro_batch` of them go through a rank at a time. Intervals of 0 mean only at the end.
    """

    output_dir: Path
    seed: int = 0
    steps: Positive | None = None
    epochs: Positive | None = None
    global_batch: Positive = 64
    micro_batch: Positive = 8
    zero_stage: Literal[0, 1, 2, 3] = 2
    log_every: Positive = 10
    eval_every: Annotated[int, Field(ge=0)] = 0
    save_every: Annotated[int, Field(ge=0)] = 0
    keep_checkpoints: Positive = 2
    resume: Literal["auto", "never"] = "auto"

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("steps: set exactly one of run.steps and run.epochs")
        return self


class TrainConfig(StrictModel):
    """Everything about one run. Without teachers it is plain supervised training."""

    student: StudentConfig
    teachers: tuple[TeacherConfig, ...] = ()
    kv: KVConfig = KVConfig()
    align: AlignConfig = AlignConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    run: RunConfig

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError(f"teachers: names must differ, got {names}")
        for teacher in self.teachers:
            if self.kv.mode != "offline" and not teacher.endpoints:
                raise ValueError(f"teachers: '{teacher.name}' has no endpoints, which kv.mode '{self.kv.mode}' needs")
        if self.teachers:
            self._check_selection(self.kv.selection)
        return self

    def _check_selection(self, selection: Selection) -> None:
        latents = self.student.latents
        if self.student.mode == "token" and selection.scope != "sample":
            raise ValueError(
                "kv.selection.scope: token mode compares one token in all layers and heads, so it needs 'sample'; "
                f"got '{selection.scope}'"
            )
        if self.student.mode == "latent" and (selection.selector == "full" or selection.budget != latents):
            raise ValueError(
                f"kv.selection: latent mode matches {latents} latents (student.latents), so it "
                f"needs a selector with that budget; got '{selection.selector}' with budget {selection.budget}"
            )
