"""Checks of settings that depend on each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcore.plan import Selection

if TYPE_CHECKING:
    from student_trainer.config import TrainConfig


def check_trained_maps(config: TrainConfig) -> None:
    """Checks that every map between teacher and student that is to be trained has a loss that trains it.

    Raises:
        ValueError: begins with the name of a field that conflicts with another.
    """
    align, routed = config.align, config.fuse.kind == "learnable"
    if config.fuse.kind != "fixed" and align.direction != "to_student":
        raise ValueError(
            f"fuse.kind: '{config.fuse.kind}' fuses in the student's space: set align.direction to_student"
        )
    if align.direction == "to_student" and align.head_adapter == "linear" and not routed:
        raise ValueError(
            "align.head_adapter: 'linear' is trained by the router loss alone: it needs fuse.kind 'learnable' or "
            "align.direction 'to_teacher'"
        )
    if align.direction == "to_teacher" and align.head_adapter == "identity":
        raise ValueError("align.head_adapter: 'identity' leaves align.direction 'to_teacher' nothing to train")
    if align.layer_map == "learned" and not routed:
        raise ValueError("align.layer_map: 'learned' is trained by the router loss: it needs fuse.kind 'learnable'")
    if routed:
        _check_router_tokens(config.kv.selection)


def _check_router_tokens(selection: Selection) -> None:
    if selection.scope != "sample" or selection.span not in ("reasoning", "all"):
        raise ValueError(
            "kv.selection: the router loss puts K/V at the reasoning's tokens, the same in all layers and heads: "
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
            "kv.selection.scope: token mode compares one token in all layers and heads, so it needs 'sample'; "
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
            "align.time: only reasoning is resampled to the latents, with the same tokens in all layers: it "
            "needs kv.selection.span 'reasoning' or 'all' and scope 'sample'; got "
            f"'{selection.span}' and '{selection.scope}'"
        )
    fits = selection.selector != "full" and selection.budget == latents
    if config.student.mode == "latent" and not fits and not resamples:
        raise ValueError(
            f"kv.selection: latent mode matches {latents} latents (student.latents), so it needs a selector with "
            f"that budget, or align.time to resample; got '{selection.selector}' with budget {selection.budget}"
        )
