"""Checks that the keys and values that are read from a model are those that its attention reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvcore.models.attention_taps import LayerTap
from kvcore.tensors.projections import unsupported
from teacher_server.engines.batch_check import check_finite

# Attention arguments of some models that scaled-dot-product attention ignores.
_INEXACT_ARGUMENTS = ("softcap", "s_aux", "position_bias")
# Relative tolerance for the rounding of half-precision rotary embeddings; a transformed key or value differs far more.
_SAME = 0.02


def exact_kv_heads(name: str, taps: Mapping[int, LayerTap], layers: int) -> int:
    """Check that captured keys and values are those of the attention in all layers; returns the number of KV heads.

    The rotary embedding does not rotate the first position and changes no key's norm, except for one constant factor of
    some RoPE scalings.

    Raises:
        NonFiniteLayerError: keys or values are not finite.
        UnsupportedModelError: they are not, in some layer, or the layers differ in KV heads.
    """
    if len(taps) != layers:
        missing = sorted(set(range(layers)) - taps.keys())
        raise unsupported(name, f"layers {missing} do not attend with keys and values of their own")
    for layer, tap in sorted(taps.items()):
        check_finite(name, layer, tap.k_BHTD, tap.v_BHTD)
        inexact = [argument for argument in _INEXACT_ARGUMENTS if tap.extras.get(argument) is not None]
        if inexact:
            raise unsupported(name, f"layer {layer} attends with {', '.join(inexact)}")
        if not _attended_as_read(tap):
            more = "by more than a rotary embedding between their projection and the attention"
            raise unsupported(name, f"layer {layer} changes its keys or values {more}")
    heads = {tap.k_BHTD.shape[1] for tap in taps.values()}
    if len(heads) != 1:
        raise unsupported(name, f"its layers differ in key/value heads: {sorted(heads)}")
    return heads.pop()


def _attended_as_read(tap: LayerTap) -> bool:
    if tap.attended_v_BHTD.shape != tap.v_BHTD.shape or tap.rotated_k_BHTD.shape != tap.k_BHTD.shape:
        return False
    read, attended = tap.k_BHTD.float(), tap.rotated_k_BHTD.float()
    first, attended_first = read[:, :, 0], attended[:, :, 0]
    factor = (first * attended_first).sum() / first.square().sum()
    return (
        torch.equal(tap.attended_v_BHTD, tap.v_BHTD)
        and bool((attended_first - factor * first).norm() <= _SAME * attended_first.norm())
        and torch.allclose(attended.norm(dim=-1), factor * read.norm(dim=-1), rtol=_SAME)
    )
