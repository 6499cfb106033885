"""The configuration of `kvdistill train`. Free of torch, so that `--help` and validation are instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, cast

from pydantic import ConfigDict, Field, model_validator

from kvcore.config import StrictModel, parse
from kvcore.errors import FieldError
from kvcore.plan import CodecSpec, Selection
from kvcore.plugins import NameTable

# Where a run keeps its best model, and the next stage finds it.
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

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Section = dict[str, object]


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
    """How a teacher's geometry meets the student's; docs/alignment.md has the formulas.

    `direction`: `to_student` maps the teacher's K/V into the student's space and keeps that map frozen; `to_teacher`
    maps the student's K/V into each teacher's space with a regressor that trains.
    `tokens`: how tokens of two tokenizers pair, `boundary` or `overlap` (token mode, whole text).
    `time`: resamples the slots that a teacher sent to the student's latents; `none` needs as many.
    `layer_map`: `cka` compares the layers on the calibration samples; `learned` starts from `ratio` and trains.
    `head_adapter`: `ridge` (closed form), `procrustes` (a rotation), `pool` (averages heads and dims), `linear` (starts
    from ridge and trains) or `identity` (same geometry). With `to_student`, what trains on the teacher's side
    (`linear`, `learned`) is trained by the router loss alone, since the KV loss would empty its own target.
    `calibration_samples`: how many training samples the map and the targets' scale are measured on before the first
    step. `sink_tokens`: the first tokens of a text, on which models park attention, left out of calibration and of
    token mode's KV loss. `min_explained_variance`: layers that the map explains less of are warned about.
    """

    direction: Literal["to_student", "to_teacher"] = "to_student"
    tokens: Literal["boundary", "overlap"] = "boundary"
    time: Literal["none", "linear", "nearest", "segment"] = "none"
    layer_map: Literal["ratio", "uniform", "last", "skip", "cka", "learned"] = "ratio"
    head_adapter: Literal["ridge", "procrustes", "pool", "linear", "identity"] = "ridge"
    calibration_samples: Positive = 512
    sink_tokens: Annotated[int, Field(ge=0)] = 1
    min_explained_variance: Fraction = 0.2


class FuseConfig(StrictModel):
    """How several teachers become one target.

    `kind`: `fixed` takes the teachers' `weight`; `similarity` weighs each teacher, sample by sample, by how near its
    aligned K/V are to what the student's own are on the same text (`metric`); `learnable` asks a `router`
    that sees the prompt and is trained by the answer's cross-entropy after written reasoning with the fused K/V in the
    student's cache.
    `router_width`: its hidden size. `per_layer`: weights for each layer. `choose`: `soft` mixes, `top1` takes the best.
    The temperature of the softmax is max(`temperature_floor`, `temperature` - `temperature_decay` x epoch).
    `entropy_weight`: how much an even distribution is rewarded (`learnable`). `collapse_at`: a mean weight above it is
    warned about.
    """

    kind: Literal["fixed", "similarity", "learnable"] = "fixed"
    metric: Literal["cosine", "dot", "euclidean"] = "cosine"
    router: Literal["mlp", "gate", "attention"] = "mlp"
    router_width: Positive = 256
    router_loss_weight: Annotated[float, Field(gt=0.0)] = 1.0
    per_layer: bool = False
    choose: Literal["soft", "top1"] = "soft"
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    temperature_decay: NonNegative = 0.1
    temperature_floor: Annotated[float, Field(gt=0.0)] = 0.5
    entropy_weight: NonNegative = 0.01
    collapse_at: Annotated[float, Field(gt=0.5, le=1.0)] = 0.95

    @model_validator(mode="after")
    def _floor_below_start(self) -> Self:
        if self.temperature < self.temperature_floor:
            raise ValueError(
                f"temperature_floor: {self.temperature_floor} is above fuse.temperature ({self.temperature}), which "
                "would never be used; lower it"
            )
        return self


class LossConfig(StrictModel):
    """What is minimised.

    Latent mode: answer CE + `reasoning_ce_weight` x text CE + `kv_weight` x KV + `codi_weight` x CODI, where the text
    is reasoning and answer, read without latents. Token mode: text CE + `kv_weight` x KV.

    `kv_weight: auto` is set before the first step, so that the KV loss's gradient is `kv_gradient_ratio` times as long
    as the cross-entropy's. `kv_loss`: `mse` and `smooth_l1` of K/V in units of the targets' deviation, `cosine`
    per head, or `cka` over a batch's slots. `codi_weight`: CODI's loss on the hidden states before the answer.
    """

    kv_weight: NonNegative | Literal["auto"] = 1.0
    kv_gradient_ratio: Annotated[float, Field(gt=0.0)] = 1.0
    kv_loss: Annotated[str, KV_LOSSES] = "smooth_l1"
    reasoning_ce_weight: NonNegative = 1.0
    codi_weight: NonNegative = 0.0


class DataConfig(StrictModel):
    """Training and validation samples with `id`, `prompt`, `reasoning` and `answer`.

    `train`, `val`: JSON Lines, or a directory made by `save_to_disk` of the datasets library. `max_tokens`: the longest
    sample, in the student's tokens. `answer_tokens`: how many the student may write in validation (in token mode its
    reasoning counts too). `val_samples`: only the first so many of `val`.
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
    number of ranks; `micro_batch` of them go through a rank at a time. Intervals of 0 mean only at the end. `best_by`:
    what the validation that `best_model` comes from is best in; among equals in accuracy the lower loss is better.
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
    best_by: Literal["accuracy", "loss", "kv_loss"] = "accuracy"
    resume: Literal["auto", "never"] = "auto"

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("steps: set exactly one of run.steps and run.epochs")
        return self


class MonitorConfig(StrictModel):
    """HTTP on rank 0 while it trains: a page for people, `/metrics` for Prometheus, `/healthz` for probes.

    Off without a `port`; 0 takes a free one, which the log names. There is no password: leave it on loopback, or in a
    private network.
    """

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] | None = None


def _merged(base: Section, changes: Section) -> Section:
    """`base` with what `changes` names, at any depth."""
    merged = dict(base)
    for name, value in changes.items():
        below = merged.get(name)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[name] = _merged(cast("Section", below), cast("Section", value)) if both else value
    return merged


class StageConfig(StrictModel):
    """One of several runs after one another: its folder under `run.output_dir`, and what it changes, at any depth."""

    # A number that is not finite is kept, so that the whole configuration refuses it by its name.
    model_config = ConfigDict(ser_json_inf_nan="constants")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}$")]
    kv: Section = Field(default_factory=dict)
    align: Section = Field(default_factory=dict)
    fuse: Section = Field(default_factory=dict)
    loss: Section = Field(default_factory=dict)
    data: Section = Field(default_factory=dict)
    optim: Section = Field(default_factory=dict)
    run: Section = Field(default_factory=dict)


class TrainConfig(StrictModel):
    """Everything about one run, or about `stages` of it, each of which starts from the best model of the one before.

    Without teachers it is plain supervised training.
    """

    student: StudentConfig
    teachers: tuple[TeacherConfig, ...] = ()
    kv: KVConfig = KVConfig()
    align: AlignConfig = AlignConfig()
    fuse: FuseConfig = FuseConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    run: RunConfig
    monitor: MonitorConfig = MonitorConfig()
    stages: tuple[StageConfig, ...] = ()

    def stage(self, index: int) -> TrainConfig:
        """The whole configuration of one stage.

        Raises:
            FieldError: what the stage changes is not valid, named by its place in `stages`.
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
            raise ValueError("data.val: stages pass on the best model, which validation finds; set it")
        for index, stage in enumerate(self.stages):
            for field in ("output_dir", "resume"):
                if field in stage.run:
                    raise ValueError(f"stages.{index}.run.{field}: belongs to all stages; set run.{field}")
            if self.stage(index).data.val is None:
                raise ValueError(f"stages.{index}.data.val: stages pass on the best model, which validation finds")
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
            self._check_selection(self.kv.selection)
            self._check_training_maps()
        if self.loss.codi_weight > 0 and (self.student.mode != "latent" or self.loss.reasoning_ce_weight == 0):
            raise ValueError("loss.codi_weight: CODI needs student.mode 'latent' and loss.reasoning_ce_weight above 0")
        return self

    def _check_training_maps(self) -> None:
        align, routed = self.align, self.fuse.kind == "learnable"
        if self.fuse.kind != "fixed" and align.direction != "to_student":
            raise ValueError(
                f"fuse.kind: '{self.fuse.kind}' fuses in the student's space: set align.direction to_student"
            )
        if align.direction == "to_student" and align.head_adapter == "linear" and not routed:
            raise ValueError(
                "align.head_adapter: nothing but the router loss may train a target's map: 'linear' needs fuse.kind "
                "'learnable' or align.direction 'to_teacher'"
            )
        if align.direction == "to_teacher" and align.head_adapter == "identity":
            raise ValueError("align.head_adapter: 'identity' leaves align.direction 'to_teacher' nothing to train")
        if align.layer_map == "learned" and not routed:
            raise ValueError("align.layer_map: 'learned' is trained by the router loss: it needs fuse.kind 'learnable'")
        if routed:
            self._check_judged_tokens(self.kv.selection)

    def _check_judged_tokens(self, selection: Selection) -> None:
        if selection.scope != "sample" or selection.span not in ("reasoning", "all"):
            raise ValueError(
                "kv.selection: the router loss puts K/V at the reasoning's tokens, the same in all layers and heads: "
                "fuse.kind 'learnable' needs scope 'sample' and span 'reasoning' or 'all'; got "
                f"'{selection.scope}' and '{selection.span}'"
            )

    def _check_selection(self, selection: Selection) -> None:
        latents, align = self.student.latents, self.align
        if self.student.mode == "token" and selection.scope != "sample":
            raise ValueError(
                "kv.selection.scope: token mode compares one token in all layers and heads, so it needs 'sample'; "
                f"got '{selection.scope}'"
            )
        if self.student.mode == "token" and align.time != "none":
            raise ValueError(
                f"align.time: token mode compares tokens, so there is nothing to resample; got '{align.time}'"
            )
        if align.tokens == "overlap" and (self.student.mode, selection.selector, selection.span) != (
            "token",
            "full",
            "all",
        ):
            raise ValueError(
                "align.tokens: 'overlap' needs every token's first byte: student.mode 'token' and a kv.selection with "
                "selector 'full' and span 'all'"
            )
        resamples = align.time != "none"
        if resamples and (selection.span not in ("reasoning", "all") or selection.scope != "sample"):
            raise ValueError(
                "align.time: what is resampled to the latents is the reasoning, the same tokens in all layers: it "
                "needs kv.selection.span 'reasoning' or 'all' and scope 'sample'; got "
                f"'{selection.span}' and '{selection.scope}'"
            )
        fits = selection.selector != "full" and selection.budget == latents
        if self.student.mode == "latent" and not fits and not resamples:
            raise ValueError(
                f"kv.selection: latent mode matches {latents} latents (student.latents), so it needs a selector with "
                f"that budget, or align.time to resample; got '{selection.selector}' with budget {selection.budget}"
            )
