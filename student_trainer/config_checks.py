"""Checks of settings that depend on each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel

from data.reasoning_steps import StepBlocks
from kvcore.early_checks import check_data, check_model, check_output
from kvcore.errors import FieldError
from kvcore.extras import missing, needs
from kvcore.plan import CODED, Selection

if TYPE_CHECKING:
    from student_trainer.config import TrainConfig


def check_inputs(config: TrainConfig) -> None:
    """Checks, without torch, that a run's student, data, store and trackers are there, and that it can write.

    Raises:
        FieldError: names the field and the path.
    """
    check_output(config.run.output_dir, "run.output_dir")
    check_model(config.student.path, "student.path")
    for tracker in config.run.trackers:
        if lacking := missing(tracker):
            raise FieldError("run.trackers", f"'{tracker}' {needs(tracker, *lacking)}")
    for stage in [config.stage(index) for index in range(len(config.stages))] or [config]:
        check_data(stage.data.train, "data.train")
        if stage.data.val is not None:
            check_data(stage.data.val, "data.val")
        store = stage.kv.store
        if stage.kv.mode == "record" and store is not None:
            check_output(store, "kv.store")
        for teacher in stage.teachers:
            if teacher.kv_map is not None and not teacher.kv_map.is_file():
                problem = f"there is no file {teacher.kv_map}; kvdistill calibrate writes one"
                raise FieldError(f"teachers: '{teacher.name}': kv_map", problem)
        if stage.kv.mode == "offline" and store is not None and not store.is_dir():
            raise FieldError("kv.store", f"there is no directory {store}; kv.mode record writes one")


def shared_endpoint_warning(config: TrainConfig) -> str | None:
    """What is doubtful about two teachers at one endpoint; None if there are none."""
    first: dict[str, str] = {}
    for teacher in config.teachers if config.kv.mode != "offline" else ():
        for endpoint in teacher.endpoints:
            if (other := first.setdefault(endpoint, teacher.name)) != teacher.name:
                both = f"'{other}' and '{teacher.name}'"
                return f"the teachers {both} have the same endpoint {endpoint}, so they are one teacher with two names"
    return None


def check_trained_maps(config: TrainConfig) -> None:
    """Checks that every map between teacher and student that is to be trained has a loss that trains it.

    Raises:
        ValueError: begins with the name of a field that conflicts with another.
    """
    align, direction, routed = config.align, config.direction, config.fuse.kind == "learnable"
    if config.fuse.kind != "fixed" and direction != "to_student":
        raise ValueError(
            f"fuse.kind: '{config.fuse.kind}' fuses in the student's space: set align.direction to_student"
        )
    if direction == "to_student" and align.head_adapter == "linear" and not routed:
        raise ValueError(
            "align.head_adapter: 'linear' is trained by the router loss alone: it needs fuse.kind 'learnable' or "
            "align.direction 'to_teacher'"
        )
    if direction == "to_teacher" and align.head_adapter == "identity":
        raise ValueError(
            "align.head_adapter: 'identity' has no map that align.direction 'to_teacher' could train; use 'ridge'"
        )
    if align.layer_map == "learned" and not routed:
        raise ValueError("align.layer_map: 'learned' is trained by the router loss: it needs fuse.kind 'learnable'")
    if routed:
        _check_router_tokens(config.kv.selection)


def check_refits(config: TrainConfig) -> None:
    """Checks that the warm-up ends, and that a map which is to be fitted again is fitted to the student and frozen.

    Raises:
        ValueError: begins with the name of a field that conflicts with another.
    """
    align, steps = config.align, config.run.steps
    if steps is not None and align.warmup_steps >= steps:
        raise ValueError(f"align.warmup_steps: {align.warmup_steps} must be below run.steps ({steps})")
    frozen = ("ridge", "procrustes") if config.direction == "to_student" else ("procrustes",)
    if align.recalibrate_every and (align.head_adapter not in frozen or align.layer_map == "learned"):
        raise ValueError(
            f"align.recalibrate_every: no map stays frozen with align.direction {config.direction}, head_adapter "
            f"{align.head_adapter} and layer_map {align.layer_map}, so there is nothing to fit again; use 0"
        )


def check_basis(config: TrainConfig) -> None:
    """Checks that a basis of the teachers' own is compared in the teachers' space, by a map that is trained.

    Raises:
        ValueError: begins with the name of a field that conflicts with another.
    """
    align = config.align
    if align.basis_rank is None:
        return
    if config.direction != "to_teacher":
        raise ValueError(
            "align.basis_rank: the components belong to the teacher's space, so they need align.direction "
            f"'to_teacher'; got '{config.direction}'"
        )
    if align.head_adapter not in ("ridge", "linear"):
        raise ValueError(
            "align.basis_rank: a trained map must lead from heads to components: use align.head_adapter 'ridge' or "
            f"'linear'; got '{align.head_adapter}'"
        )
    if align.layer_map == "ratio":
        raise ValueError(
            "align.basis_rank: align.layer_map 'ratio' mixes layers, but each layer has its own basis; use 'uniform'"
        )


def check_ridge_rank(config: TrainConfig) -> None:
    """Checks that a limited rank is one of frozen ridge maps.

    Raises:
        ValueError: begins with the name of a field that conflicts with another.
    """
    if config.align.ridge_rank is None:
        return
    found = {"direction": config.direction, "head_adapter": config.align.head_adapter}
    for field, wanted in (("direction", "to_student"), ("head_adapter", "ridge")):
        if found[field] != wanted:
            raise ValueError(f"align.ridge_rank: needs align.{field} '{wanted}'; got '{found[field]}'")


def check_kv_maps(config: TrainConfig) -> None:
    """Checks that the KV maps of teachers are used with their codec, and not with a map that the run fits.

    Raises:
        ValueError: begins with the name of a field that conflicts with another.
    """
    given = [teacher.name for teacher in config.teachers if teacher.kv_map is not None]
    if not given:
        return
    where = f"the kv_map of teacher '{given[0]}'"
    if config.kv.codec.name != CODED:
        raise ValueError(f"teachers: {where} needs kv.codec.name '{CODED}'; got '{config.kv.codec.name}'")
    if config.align.basis_rank is not None:
        raise ValueError(f"align.basis_rank: the run fits this basis itself, without {where}; leave one of them out")
    if config.align.map_at == "teacher":
        raise ValueError(
            f"align.map_at: 'teacher' has teachers send K/V in the student's shape, but {where} is for their own K/V; "
            "leave kv_map out, or use 'trainer'"
        )
    for name in ("quality", "bytes_per_token"):
        if getattr(config.kv.codec, name) is not None:
            raise ValueError(f"kv.codec.{name}: {where} has its own quality; leave kv.codec.{name} out")


def check_map_at(config: TrainConfig) -> None:
    """Checks that a map which the teachers are to apply is theirs to apply, and stays as it was fitted.

    Raises:
        ValueError: begins with the name of a field that conflicts with another.
    """
    align = config.align
    if align.map_at == "trainer":
        return
    reasons = {
        "linear": "align.head_adapter 'linear' is trained, so a teacher would need its weights after every step",
        "identity": "align.head_adapter 'identity' has no map to apply",
        "learned": "align.layer_map 'learned' is trained, so a teacher would need its weights after every step",
        "cka": "align.layer_map 'cka' needs the K/V of all layers, and a mapped plan has only some of them",
    }
    problem = reasons.get(align.head_adapter) or reasons.get(align.layer_map)
    if config.direction != "to_student":
        problem = (
            "align.direction 'to_teacher' maps the student's K/V, not the teacher's; use 'to_student', or set "
            "align.basis_rank so that teachers send less"
        )
    elif align.recalibrate_every:
        problem = "align.recalibrate_every needs whole K/V to fit the maps again, but teachers send mapped K/V; use 0"
    if problem:
        raise ValueError(f"align.map_at: {problem}" + "; or use 'trainer'")


def _check_router_tokens(selection: Selection) -> None:
    if selection.scope != "sample" or selection.span not in ("reasoning", "all"):
        raise ValueError(
            "kv.selection: the router loss needs the same tokens of the reasoning in all layers and heads: "
            "fuse.kind 'learnable' needs scope 'sample' and span 'reasoning' or 'all'; got "
            f"'{selection.scope}' and '{selection.span}'"
        )


def check_selection(config: TrainConfig) -> None:
    """Checks that the selected tokens fit what the student compares them with.

    Raises:
        ValueError: begins with the name of a field that conflicts with another.
    """
    selection, latents, align = config.kv.selection, config.student.latents, config.align
    if config.student.mode == "token" and selection.scope != "sample":
        raise ValueError(
            "kv.selection.scope: token mode compares the same token in all layers and heads, so use 'sample'; "
            f"got '{selection.scope}'"
        )
    if config.student.mode == "token" and align.time != "none":
        raise ValueError(
            f"align.time: token mode compares tokens, so nothing is resampled; use 'none', got '{align.time}'"
        )
    if align.tokens == "overlap" and (config.student.mode, selection.selector, selection.span) != (
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
            "align.time: resampling to the latents needs the same tokens of the reasoning in all layers: it "
            "needs kv.selection.span 'reasoning' or 'all' and scope 'sample'; got "
            f"'{selection.span}' and '{selection.scope}'"
        )
    fits = selection.selector != "full" and selection.budget == latents
    if config.student.mode == "latent" and not fits and not resamples:
        raise ValueError(
            f"kv.selection: latent mode matches {latents} latents (student.latents), so it needs a selector with "
            f"that budget, or align.time to resample; got '{selection.selector}' with budget {selection.budget}"
        )


# The settings of these sections that `self_teacher` uses; the others align, fuse or send the K/V of teachers.
_OF_SELF_TEACHER = {"align": ("calibration_samples",), "fuse": (), "kv.codec": ()}


def check_self_teacher(config: TrainConfig) -> None:
    """Checks that the student can be its own teacher, and that no setting is about other teachers.

    Raises:
        ValueError: begins with the name of a field that conflicts with another.
    """
    kv, loss, mode = config.kv, config.loss, config.student.mode
    if config.teachers:
        raise ValueError(
            "self_teacher: true conflicts with teachers, because a latent would have two targets, which kv_loss would "
            "mix; leave out teachers, or set self_teacher to false"
        )
    if mode != "latent":
        raise ValueError(f"self_teacher: the latents learn from the reasoning: use student.mode 'latent'; got '{mode}'")
    if loss.reasoning_ce_weight == 0:
        raise ValueError(
            "loss.reasoning_ce_weight: must be above 0 with self_teacher, because nothing else trains the student to "
            "read the reasoning; got 0"
        )
    if kv.mode != "online" or kv.store is not None:
        field = "mode" if kv.mode != "online" else "store"
        raise ValueError(
            f"kv.{field}: with self_teacher the K/V change with the weights, so they cannot be stored; use kv.mode "
            f"'online' without kv.store; got {field} '{kv.mode if field == 'mode' else kv.store}'"
        )
    if kv.selection.span != "reasoning":
        raise ValueError(f"kv.selection.span: self_teacher needs 'reasoning'; got '{kv.selection.span}'")
    if kv.control == "shuffled" and config.run.micro_batch == 1:
        raise ValueError(
            "kv.control: 'shuffled' takes the K/V of another sample of the micro-batch, so run.micro_batch must be at "
            "least 2; got 1"
        )
    _refuse_settings_of_other_teachers(config)
    check_selection(config)


def _refuse_settings_of_other_teachers(config: TrainConfig) -> None:
    sections: dict[str, BaseModel] = {"align": config.align, "fuse": config.fuse, "kv.codec": config.kv.codec}
    for section, values in sections.items():
        for name, field in type(values).model_fields.items():
            value = getattr(values, name)
            if value != field.default and name not in _OF_SELF_TEACHER[section]:
                raise ValueError(
                    f"{section}.{name}: is for other teachers; with self_teacher nothing is aligned, fused or sent; "
                    f"leave it out; got '{value}'"
                )


def check_step_blocks(config: TrainConfig) -> None:
    """Checks that the latents can be divided into blocks, and that the loss of the steps has blocks.

    Raises:
        ValueError: begins with the name of a field that conflicts with another.
    """
    student, size = config.student, config.student.latents_per_step
    if (size is None) != (config.loss.step_ce_weight == 0):
        given, needed = (
            ("loss.step_ce_weight", "student.latents_per_step")
            if size is None
            else ("student.latents_per_step", "loss.step_ce_weight above 0")
        )
        raise ValueError(f"{given}: needs {needed}")
    if size is None:
        return
    if student.mode != "latent":
        raise ValueError("student.latents_per_step: needs student.mode 'latent'")
    if student.latents % size:
        raise ValueError(f"student.latents_per_step: {size} does not divide student.latents ({student.latents})")


def check_projection(config: TrainConfig) -> None:
    """Checks that a student without a projection has latents.

    Raises:
        ValueError: begins with the name of the field.
    """
    if not config.student.projection and config.student.mode != "latent":
        raise ValueError(
            "student.projection: false needs student.mode 'latent', because other students have no latents"
        )


def check_curriculum(config: TrainConfig) -> None:
    """Checks that settings of the curriculum and of its losses have blocks of latents that they apply to.

    Raises:
        ValueError: begins with the name of a field that conflicts with another.
    """
    blocks = step_blocks(config)
    if config.loss.step_ce_passes != "last" and blocks is None:
        raise ValueError(f"loss.step_ce_passes: '{config.loss.step_ce_passes}' needs student.latents_per_step")
    if config.loss.step_ce_passes != "last" and config.student.passes == 1:
        raise ValueError("loss.step_ce_passes: 'all' is the same as 'last' with student.passes 1; use more passes")
    if config.run.curriculum_epochs is None:
        return
    if blocks is None:
        raise ValueError("run.curriculum_epochs: needs student.latents_per_step and loss.step_ce_weight above 0")
    if blocks.blocks == 1:
        raise ValueError(
            f"run.curriculum_epochs: student.latents ({blocks.latents}) are one block of student.latents_per_step "
            f"({blocks.per_step}), so there is a single stage; use smaller blocks, or leave it out"
        )


def step_blocks(config: TrainConfig) -> StepBlocks | None:
    """The blocks of latents that learn the steps of the reasoning; None if the latents are not divided."""
    size = config.student.latents_per_step
    return None if size is None else StepBlocks(config.data.steps, config.student.latents, size)
