"""How K/V become a loss: the alignment, fusion and loss sections of `kvdistill train`'s configuration."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import model_validator

from kvcore.config import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StrictModel,
)
from kvcore.plugins import NameTable

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


class AlignConfig(StrictModel):
    """How a teacher's K/V are mapped to the student's geometry; docs/methods.md has the formulas."""

    direction: Literal["auto", "to_student", "to_teacher"] = "auto"
    """`to_student` maps the teacher's K/V into the student's space with a frozen map. `to_teacher` maps the student's
    K/V into each teacher's space with a trained map. `auto` is `to_teacher` for one teacher (in a pilot with a real
    model it lowered the held-out perplexity from 85 to 72; the frozen map raised it to 128). It is `to_student` if
    several teachers are fused, `fuse.kind` is not `fixed`, or `head_adapter` is `identity`."""
    tokens: Literal["boundary", "overlap"] = "boundary"
    """How tokens of two tokenizers are paired in token mode. `boundary`: by byte ends; `overlap`: by shared bytes
    (needs the whole text)."""
    time: Literal["none", "linear"] = "none"
    """`linear` resamples the teacher's slots to the student's latents; `none` needs equal numbers of both."""
    layer_map: Literal["ratio", "uniform", "last", "skip", "cka", "learned"] = "uniform"
    """Teacher layers for each student layer. `uniform`: the nearest in relative depth; `ratio` interpolates between
    two, so teachers send up to twice as much; `last`: the last layers; `skip`: every k-th layer; `cka`: the most
    similar layers on the calibration samples; `learned` starts from `ratio` and is trained, with `to_student` by the
    router loss alone."""
    head_adapter: Literal["ridge", "procrustes", "pool", "linear", "identity"] = "ridge"
    """Map between heads: `ridge` (closed form), `procrustes` (a rotation), `pool` (averages heads and dims), `linear`
    (starts from ridge and is trained, with `to_student` by the router loss alone, because the KV loss would collapse
    its own target) or `identity` (same geometry)."""
    ridge_rank: PositiveInt | None = None
    """Highest rank of the maps of `head_adapter: ridge` with `to_student` (reduced-rank ridge regression). By default
    it is not limited."""
    basis_rank: PositiveInt | None = None
    """Number of principal components of keys, and of values, that teachers send per layer instead of all heads. Needs
    `to_teacher`. The components are fitted on the calibration samples. By default teachers send all heads."""
    map_at: Literal["trainer", "teacher"] = "trainer"
    """Where the frozen map of `to_student` is applied. `teacher`: each teacher receives its map after calibration and
    sends K/V with the student's heads and head dimension, or with the codec `pca` their principal components. This
    needs a map that does not change after it was fitted, and a layer map with one teacher layer for each student
    layer."""
    calibration_samples: PositiveInt = 512
    """Maximum number of training samples on which maps and the targets' scale are fitted."""
    settled_within: NonNegativeFloat = 0.01
    """Calibration stops early if the last eighth of the samples changed the explained variance by less than this. 0: it
    uses all samples."""
    warmup_steps: NonNegativeInt = 0
    """Number of steps at the start that train on cross-entropy alone, without requests to teachers. Alignments are then
    fitted to the warmed student, whose K/V are easier to map to. With `stages`, set it in the stage that starts with an
    untrained student."""
    recalibrate_every: NonNegativeInt = 0
    """Steps between fits of the frozen maps and the targets' scale to the current student. 0: they are fitted once."""
    sink_tokens: NonNegativeInt = 1
    """Number of first tokens (attention sinks) left out of calibration, and of the KV loss in token mode."""


class FuseConfig(StrictModel):
    """How the K/V of several teachers are combined into one target."""

    kind: Literal["fixed", "similarity", "learnable"] = "fixed"
    """Source of the teachers' weights. `fixed`: their `weight`; `similarity`: for each sample, the similarity of their
    aligned K/V to the student's own K/V of the same text; `learnable`: a router that reads the prompt. It is trained
    by the answer's cross-entropy with the fused K/V in the student's cache."""
    metric: Literal["cosine", "dot", "euclidean"] = "cosine"
    """Similarity measure for `similarity`."""
    warmup_ratio: Fraction = 0.1
    """Fraction of the steps at the start in which `similarity` uses the fixed weights, because the similarity to an
    untrained student says nothing about a teacher."""
    router: Literal["mlp", "gate", "attention"] = "mlp"
    """Architecture of the router for `learnable`."""
    router_width: PositiveInt = 256
    """Hidden size of the router."""
    choose: Literal["soft", "top1"] = "soft"
    """`soft` averages the teachers; `top1` takes the teacher with the highest weight."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature over teachers in the first epoch."""
    temperature_decay: NonNegativeFloat = 0.1
    """Decrease of the temperature per epoch."""
    temperature_floor: PositiveFloat | None = None
    """Lowest temperature: an epoch uses max(floor, temperature - decay x epoch). Defaults to the smaller of 0.5 and
    `temperature`."""
    entropy_weight: NonNegativeFloat = 0.01
    """Weight of the entropy bonus of the router, which rewards even weights."""

    @property
    def lowest_temperature(self) -> float:
        """`temperature_floor`, or its default."""
        return min(0.5, self.temperature) if self.temperature_floor is None else self.temperature_floor

    @model_validator(mode="after")
    def _floor_below_start(self) -> Self:
        if self.temperature_floor is not None and self.temperature < self.temperature_floor:
            raise ValueError(
                f"temperature_floor: {self.temperature_floor} is above fuse.temperature ({self.temperature}), which "
                "would never be used; lower it"
            )
        return self


class LossConfig(StrictModel):
    """The training loss.

    Latent mode: answer CE + `reasoning_ce_weight` x text CE + `step_ce_weight` x step CE + `kv_weight` x KV +
    `codi_weight` x CODI, where the text is reasoning and answer, read without latents. With `run.curriculum_epochs`,
    the CE of the steps that are still text is added. Token mode: text CE + `kv_weight` x KV.
    """

    kv_weight: NonNegativeFloat | Literal["auto"] = "auto"
    """Weight of the KV loss. `auto` measures the gradients after the alignments are fitted, and sets the weight by
    `kv_gradient_ratio`. With real models a weight of 1.0 has no effect, because the KV loss's gradient is far smaller
    than the cross-entropy's."""
    kv_weight_max: PositiveFloat = 1000.0
    """Highest weight that `kv_weight: auto` sets."""
    kv_gradient_ratio: PositiveFloat = 1.0
    """For `kv_weight: auto`: the norm of the weighted KV loss's gradient divided by that of the cross-entropy's
    gradient."""
    kv_decay: Literal["none", "linear"] = "none"
    """How the weight of the KV loss changes over the run. `linear` lowers it to 0 at the end."""
    kv_loss: Annotated[str, KV_LOSSES] = "smooth_l1"
    """Distance between K/V: `mse` or `smooth_l1` in the units of `kv_scale`, `cosine` per head, or `cka` over a batch's
    slots."""
    kv_scale: Literal["layer", "none"] = "layer"
    """What both sides of `mse` and `smooth_l1` are divided by. `layer`: the standard deviation of a layer's targets,
    keys and values apart, from calibration; `none`: nothing, so layers with large keys or values weigh more."""
    reasoning_ce_weight: NonNegativeFloat = 1.0
    """Weight of the cross-entropy of reasoning and answer as text, in latent mode."""
    codi_weight: NonNegativeFloat = 0.0
    """Weight of CODI's loss on the hidden states before the answer, in latent mode."""
    step_ce_weight: NonNegativeFloat = 0.0
    """Weight of the cross-entropy of the reasoning's steps, in latent mode: latent i of block k predicts token i of
    step k through the language-model head (LOTUS, which uses 0.05). Needs `student.latents_per_step`."""
    step_ce_passes: Literal["last", "all"] = "last"
    """The passes after which the steps are predicted from the latents. `last`: the last one (LOTUS); `all`: the loss is
    the mean over the passes."""

    @model_validator(mode="after")
    def _scale_has_an_effect(self) -> Self:
        if self.kv_scale == "none" and self.kv_loss in ("cosine", "cka"):
            raise ValueError(
                f"kv_scale: 'none' changes nothing, because loss.kv_loss '{self.kv_loss}' does not depend on a scale; "
                "leave it out"
            )
        return self
